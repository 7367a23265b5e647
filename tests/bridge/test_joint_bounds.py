"""A robot's driver knows what its joints stand, whatever a policy folder says."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from bridging import meta

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.policy.metadata import JointLimit, PolicyMetadata
from metarobot.bridge.robots.joint_bounds import DEFAULT_BOUNDS
from metarobot.bridge.robots.lookup import make_robot
from metarobot.bridge.robots.unitree import GO2_BOUNDS, JOINTS
from metarobot.envs.robots import go2
from metarobot.training.run_folder import open_run


def go2_policy(**changes: Any) -> PolicyMetadata:
    """Return metadata as those of the walking policies in the box."""
    limits = {
        joint: JointLimit(bound.low, bound.high, bound.velocity, bound.torque)
        for joint, bound in GO2_BOUNDS.items()
    }
    policy = meta(
        joint_names=JOINTS,
        joint_stiffness=(25.0,) * 12,
        joint_damping=(0.5,) * 12,
        default_joint_pos=(0.0, 0.9, -1.8) * 4,
        action_scale=(0.25,) * 12,
        limits=limits,
    )
    return replace(policy, **changes)


def test_the_walking_policies_in_the_box_are_within_a_go2s_bounds() -> None:
    run = open_run("QuadrupedMix-rl2")
    hardware = run.family.deployment.hardware()
    policy = go2_policy(
        joint_names=hardware.joints,
        joint_stiffness=hardware.stiffness,
        joint_damping=hardware.damping,
        default_joint_pos=hardware.pose,
        limits={
            joint: JointLimit(*hardware.position[i], hardware.velocity[i], hardware.torque[i])
            for i, joint in enumerate(hardware.joints)
        },
    )
    assert tuple(hardware.joints) == go2.JOINTS
    assert make_robot("unitree", policy).name == "unitree"


@pytest.mark.parametrize(
    ("changed", "value", "line"),
    [
        ("joint_stiffness", 101.0, "a stiffness of 101 at RR_thigh; robot unitree allows 0 to 100"),
        ("joint_stiffness", -1.0, "a stiffness of -1 at RR_thigh"),
        ("joint_damping", 11.0, "a damping of 11 at RR_thigh"),
        ("joint_damping", float("nan"), "a damping of nan at RR_thigh"),
        ("default_joint_pos", -1.0, "a default pose of -1 at RR_thigh"),
        ("low", -0.6, "a lowest angle of -0.6 at RR_thigh; robot unitree allows -0.5236"),
        ("high", 4.6, "a highest angle of 4.6 at RR_thigh"),
        ("velocity", 40.0, "a speed limit of 40 at RR_thigh; robot unitree allows 0 to 30.1"),
        ("torque", 45.0, "a torque limit of 45 at RR_thigh; robot unitree allows 0 to 23.7"),
    ],
)
def test_a_policy_that_asks_a_go2_for_more_is_refused_by_name(
    changed: str, value: float, line: str
) -> None:
    policy = go2_policy()
    joint = JOINTS.index("RR_thigh")
    if changed in ("low", "high", "velocity", "torque"):
        limit = replace(policy.limits["RR_thigh"], **{changed: value})
        policy = replace(policy, limits={**policy.limits, "RR_thigh": limit})
    else:
        values = np.array(getattr(policy, changed))
        values[joint] = value
        policy = replace(policy, **{changed: tuple(values.tolist())})
    with pytest.raises(BridgeError) as caught:
        make_robot("unitree", policy)
    assert line in str(caught.value)


def test_commands_by_name_do_not_pass_a_go2s_limits_by() -> None:
    with pytest.raises(BridgeError, match="robot unitree needs a policy of layout 'legged'"):
        make_robot("unitree", go2_policy(layout="direct"))


@pytest.mark.parametrize("robot", ["sim", "ros2", "bridging:RecordingRobot"])
def test_unknown_robots_have_general_bounds(robot: str) -> None:
    assert make_robot(robot, meta()).name
    above = 1.1 * DEFAULT_BOUNDS.stiffness
    with pytest.raises(BridgeError, match="a stiffness of 2200 at hip"):
        make_robot(robot, meta(joint_stiffness=(above, above)))
