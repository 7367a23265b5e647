"""A simulated robot that walks, step by step: its readings as a controller gets them."""

from types import SimpleNamespace
from typing import Any

import mujoco
import numpy as np
import torch

from metarobot.bridge.policy.metadata import JointLimit
from metarobot.deploy.sim_robot_body import SimulatedRobot
from metarobot.tasks.family import Family, families
from metarobot.training.run_folder import open_run
from metarobot.types import Percept

FAMILY = families.get("QuadrupedFlat")
WEIGHTS = dict(FAMILY.weights)


def legged_meta(family: Family = FAMILY, **changes: Any) -> Any:
    """Return the part of a policy's metadata that a layout reads."""
    assert family.deployment.hardware is not None
    h = family.deployment.hardware()
    limits = {
        j: JointLimit(*where, velocity=v, torque=t)
        for j, where, v, t in zip(h.joints, h.position, h.velocity, h.torque, strict=True)
    }
    about = {
        "reward": {**h.reward, "weights": WEIGHTS},
        "joint_names": h.joints,
        "default_joint_pos": h.pose,
        "action_scale": h.scale,
        "command_names": h.commands,
        "limits": limits,
        "control_hz": 50.0,
    }
    return SimpleNamespace(**about | changes)


def rotation(quat: Any) -> np.ndarray:
    """The rotation matrix of a quaternion."""
    matrix = np.zeros(9)
    mujoco.mju_quat2Mat(matrix, np.array(quat, np.float64))
    return matrix.reshape(3, 3)


def reading_of(robot: SimulatedRobot, seq: int) -> dict[str, float]:
    """Return the robot's reading as a controller gets it."""
    values = dict(zip(robot.signals.reading, robot.reading(), strict=True))
    return {"stamp": 0.02 * seq, "seq": float(seq), **values}


class RecordedEpisode:
    """An episode: its readings, and the simulator's true values."""

    def __init__(self, name: str, task: int, noise: bool) -> None:
        run = open_run(name)
        agent, family = run.load_agent(), run.family
        robot = SimulatedRobot(family, family.space.sample("test", task + 1), noise=noise)
        robot.restart(task, 0)
        zeros = torch.zeros(1)
        percept, context = (
            Percept(robot.obs, torch.zeros(1, 12), zeros, zeros, zeros + 1),
            agent.begin(1),
        )
        self.readings, self.actions = [reading_of(robot, 1)], [np.zeros(12, np.float32)]
        self.terms: list[dict[str, float]] = []
        self.velocity: list[np.ndarray] = []
        self.rewards: list[float] = []
        with torch.no_grad():
            while not robot.over:
                action, context = agent.act(percept, context)
                robot.env.apply_action(action)
                before = robot.terms
                robot.advance(family.substeps)
                percept = Percept(robot.obs, action, torch.tensor([robot.reward]), zeros, zeros)
                self.readings.append(reading_of(robot, len(self.readings) + 1))
                self.actions.append(action[0].clamp(-4, 4).numpy())
                self.terms.append({k: robot.terms[k] - before[k] for k in before})
                self.rewards.append(robot.reward)
                turn = rotation(robot.env.snapshot.qpos[0, 3:7].numpy())
                self.velocity.append(robot.env.snapshot.qvel[0, :3].numpy() @ turn)
        self.fallen = robot.terminated
