"""Unitree's Go2 from primitive shapes, and other quadruped models driven in the same way.

Masses, inertias, link lengths, limits and joint order are those of Unitree's ``go2_description``
(unitree_ros, BSD-3), the lower leg's those of its newer revision; motor armature and joint damping
are as in MuJoCo Menagerie. Frames: x forward, y left, z up. A leg is F(ront) or R(ear), then
R(ight) or L(eft).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import mujoco
import numpy as np

from metarobot.envs.robots import model_files
from metarobot.tasks.model_edits import ModelError, compile_spec

LEGS = ("FR", "FL", "RR", "RL")
LEG_PARTS = ("hip", "thigh", "calf")
"""The links of a leg, each moved by the joint of the same name."""
JOINTS = tuple(f"{leg}_{part}" for leg in LEGS for part in LEG_PARTS)
"""The twelve joints in the order of the robot's own motors (SDK2's LowCmd)."""
DEFAULT_POSE = np.array(
    [
        angle
        for leg in LEGS
        for angle in (-0.1 if leg[1] == "R" else 0.1, 0.8 if leg[0] == "F" else 1.0, -1.5)
    ]
)
"""Joint angles that an action of zero asks for, rad."""
STANDING_HEIGHT = 0.283
"""Height of the trunk over level ground when it stands in the default pose, m."""
START_HEIGHT = 0.34
"""Height of the trunk at an episode's start, m: no foot is in the ground, even on rough ground."""
TORQUE_LIMITS = np.tile([23.7, 23.7, 45.43], 4)
"""Largest torque of each joint, N·m."""
SPEED_LIMITS = np.tile([30.1, 30.1, 15.70], 4)
"""Largest speed of each joint, rad/s."""
TOTAL_MASS = 15.206
"""Mass of the whole robot, kg."""
STIFFNESS = 25.0
"""Position gain of the actuators, N·m/rad."""
DAMPING = 0.5
"""Velocity gain of the actuators, N·m·s/rad."""
ACTION_SCALE = 0.25
"""How far from the default pose an action of 1 moves a joint's target, rad."""
ACTION_LIMIT = 4.0
"""Actions are clipped to ± this."""
LAG = 0.01
"""Time constant of the actuators' response, s."""
LATENCY = 0.005
"""Nominal delay from an action to the actuators, s."""
MAX_LATENCY = 0.04
"""Largest delay that a task may ask for, s."""
TIMESTEP = 0.005
"""Physics step, s."""
PAYLOAD_POSITION = (0.0, 0.0, 0.09)
"""Position of a payload on the trunk, m."""
FOOT_RADIUS = 0.022
"""Radius of a foot, m."""

_HIP_X = 0.1934
"""Distance of the hips from the trunk's centre along x, m."""
_HIP_Y = 0.0465
"""Distance of the hips from the trunk's centre along y, m."""
_THIGH_Y = 0.0955
"""Distance of a thigh from its hip along y, m."""
_LINK_LENGTH = 0.213
"""Length of a thigh and of a calf, m."""
_JOINT_RANGES = {
    "hip": {"F": (-1.0472, 1.0472), "R": (-1.0472, 1.0472)},
    "thigh": {"F": (-1.5708, 3.4907), "R": (-0.5236, 4.5379)},
    "calf": {"F": (-2.7227, -0.83776), "R": (-2.7227, -0.83776)},
}
"""Lowest and highest angle of a joint in a front and in a rear leg, rad."""


class LinkInertia(NamedTuple):
    """How the mass of a link is distributed, in the link's frame."""

    mass: float
    """kg."""
    centre: tuple[float, float, float]
    """Centre of mass, m."""
    inertia: tuple[float, float, float, float, float, float]
    """About the centre of mass, kg·m²: xx, yy, zz, xy, xz, yz."""


_TRUNK_INERTIA = LinkInertia(
    mass=6.921,
    centre=(0.021112, 0.0, -0.005366),
    inertia=(0.02448, 0.098077, 0.107, 0.00012166, 0.0014849, -3.12e-5),
)
_LINK_INERTIAS = {
    "hip": LinkInertia(
        mass=0.678,
        centre=(-0.0054, 0.00194, -0.000105),
        inertia=(0.00048, 0.000884, 0.000596, -3.01e-6, 1.11e-6, -1.42e-6),
    ),
    "thigh": LinkInertia(
        mass=1.152,
        centre=(-0.00374, -0.0223, -0.0327),
        inertia=(0.00584, 0.0058, 0.00103, 8.72e-5, -0.000289, 0.000808),
    ),
    "calf": LinkInertia(
        mass=0.241352,
        centre=(0.00629595, -0.000622121, -0.141417),
        inertia=(0.00146356, 0.0014901, 5.31397e-5, 0.0, 0.0, 0.0),
    ),
}
"""Of the front left leg's links; the other legs are its mirror images."""
_TRUNK_COLOUR = (0.85, 0.87, 0.9, 1.0)
_LEG_COLOUR = (0.2, 0.22, 0.25, 1.0)

_BOX = mujoco.mjtGeom.mjGEOM_BOX
_CAPSULE = mujoco.mjtGeom.mjGEOM_CAPSULE
_SPHERE = mujoco.mjtGeom.mjGEOM_SPHERE


def go2() -> mujoco.MjSpec:
    """Build the robot on a level floor, with its actuators and sensors.

    Feet, knees and trunk collide with the floor and nothing else collides: few pairs of geoms make
    the physics fast.
    """
    spec = mujoco.MjSpec()
    spec.modelname = "go2"
    spec.compiler.degree = False
    trunk = spec.worldbody.add_body(name="base", pos=[0, 0, START_HEIGHT])
    trunk.add_freejoint(name="root")
    _set_inertia(trunk, _TRUNK_INERTIA)
    _add_collision(trunk, "trunk", _BOX, [0.1881, 0.04675, 0.057], rgba=_TRUNK_COLOUR)
    _add_visual(trunk, _BOX, [0.13, 0.075, 0.045], [0.0, 0.0, 0.0], _TRUNK_COLOUR)
    # the head
    _add_visual(trunk, _CAPSULE, [0.045, 0.03, 0.0], [0.285, 0.0, 0.0], _LEG_COLOUR)
    for leg in LEGS:
        _add_leg(trunk, leg)
    return _add_actuators_and_sensors(spec, trunk, [f"{j}_joint" for j in JOINTS], list(LEGS))


def _add_leg(trunk: Any, leg: str) -> None:
    """Add one leg: hip, thigh and calf, mirrored from the front left one."""
    front = 1 if leg[0] == "F" else -1
    left = 1 if leg[1] == "L" else -1
    positions = {
        "hip": (front * _HIP_X, left * _HIP_Y, 0),
        "thigh": (0, left * _THIGH_Y, 0),
        "calf": (0, 0, -_LINK_LENGTH),
    }
    body = trunk
    for part in LEG_PARTS:
        body = body.add_body(name=f"{leg}_{part}", pos=positions[part])
        _set_inertia(body, _mirrored(_LINK_INERTIAS[part], front if part == "hip" else 1, left))

        axis = [1, 0, 0] if part == "hip" else [0, 1, 0]
        joint = body.add_joint(name=f"{leg}_{part}_joint", axis=axis)
        joint.range = _JOINT_RANGES[part][leg[0]]
        joint.armature = 0.01
        joint.damping[0] = 0.1

        if part == "hip":
            # the motor's housing, a capsule along y
            quarter_turn = [1, 1, 0, 0]
            position = [0, left * 0.05, 0]
            _add_visual(body, _CAPSULE, [0.046, 0.02, 0], position, _LEG_COLOUR, quarter_turn)
        else:
            radius = 0.02 if part == "thigh" else 0.012
            size = [radius, _LINK_LENGTH / 2, 0]
            _add_visual(body, _CAPSULE, size, [0, 0, -_LINK_LENGTH / 2], _LEG_COLOUR)

    calf = body
    _add_collision(calf, f"{leg}_knee", _SPHERE, [0.02, 0, 0])
    _add_collision(calf, leg, _SPHERE, [FOOT_RADIUS, 0, 0], [-0.002, 0, -_LINK_LENGTH])


def _mirrored(link: LinkInertia, x: int, y: int) -> LinkInertia:
    """Return the inertia of a link mirrored where ``x`` or ``y`` is −1."""
    mass, (centre_x, centre_y, centre_z), (xx, yy, zz, xy, xz, yz) = link
    centre = (x * centre_x, y * centre_y, centre_z)
    return LinkInertia(mass, centre, (xx, yy, zz, x * y * xy, x * xz, y * yz))


def _set_inertia(body: Any, link: LinkInertia) -> None:
    body.explicitinertial = True
    body.mass = link.mass
    body.ipos = list(link.centre)
    body.fullinertia = list(link.inertia)


def _add_collision(
    body: Any,
    name: str,
    kind: Any,
    size: list[float],
    pos: Iterable[float] = (0, 0, 0),
    rgba: Any = _LEG_COLOUR,
) -> None:
    """Add a geom without mass that collides with the floor alone."""
    body.add_geom(
        name=name, type=kind, size=size, pos=list(pos), rgba=rgba, mass=0, contype=2, conaffinity=1
    )


def _add_visual(
    body: Any,
    kind: Any,
    size: list[float],
    pos: Iterable[float],
    rgba: Any,
    quat: Iterable[float] = (1, 0, 0, 0),
) -> None:
    """Add a geom without mass that is shown and collides with nothing."""
    body.add_geom(
        type=kind,
        size=size,
        pos=list(pos),
        quat=list(quat),
        rgba=rgba,
        mass=0,
        contype=0,
        conaffinity=0,
    )


def load(robot: str) -> mujoco.MjSpec:
    """Read another model of a quadruped and drive it as ours.

    It needs twelve leg joints, a trunk on a free joint, and a named geom at each foot. Its floor,
    actuators, sensors and keyframes are replaced by ours; its masses, shapes and the friction in
    its joints remain.

    Args:
        robot: A path to an MJCF file, or ``menagerie:name``.

    Raises:
        ModelError: Something is missing; the message lists what is there.
    """
    spec = model_files.read_model(robot, "quadruped", "unitree_go2")

    # what we add ourselves, or would clash with it
    foot_sites = [f"{leg}_foot" for leg in LEGS]
    replaced = [
        *spec.actuators,
        *spec.sensors,
        *spec.keys,
        *spec.worldbody.geoms,
        *spec.worldbody.lights,
        *(site for site in spec.sites if site.name in foot_sites),
        *(body for body in spec.bodies if body.name == "payload"),
    ]
    for element in replaced:
        spec.delete(element)

    joint_names = [(f"{joint}_joint", joint) for joint in JOINTS]
    joints = model_files.find_elements(robot, "joint", spec.joints, joint_names)
    foot_names = [(leg, f"{leg}_foot", f"{leg}_foot_collision") for leg in LEGS]
    feet = model_files.find_elements(robot, "foot geom", spec.geoms, foot_names)

    free = mujoco.mjtJoint.mjJNT_FREE
    trunks = [b for b in spec.worldbody.bodies if any(j.type == free for j in b.joints)]
    if len(trunks) != 1:
        raise ModelError(f"{robot} needs one body on a free joint, the trunk; it has {len(trunks)}")
    for name in joints:
        if spec.joint(name).type != mujoco.mjtJoint.mjJNT_HINGE:
            raise ModelError(f"{robot}: joint {name!r} is no hinge")
    return _add_actuators_and_sensors(spec, trunks[0], joints, feet)


def _add_actuators_and_sensors(
    spec: mujoco.MjSpec, trunk: Any, joints: Sequence[str], feet: Sequence[str]
) -> mujoco.MjSpec:
    """Add floor, payload, actuators and sensors, the same for every model.

    Sensors, in this order: position (12) and velocity of each foot (12), force on each foot (4),
    torque of each joint (12); see ``quadruped.QuadrupedSensors``.
    """
    spec.option.timestep = TIMESTEP
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    # hard friction: with MuJoCo's default the feet creep and a standing robot sinks by 2 cm in 10 s
    spec.option.cone = mujoco.mjtCone.mjCONE_PYRAMIDAL
    spec.option.impratio = 100.0
    spec.compiler.autolimits = True

    # priority: the floor's friction counts, not the larger of the two
    plane = mujoco.mjtGeom.mjGEOM_PLANE
    floor = spec.worldbody.add_geom(
        name="floor", type=plane, size=[0, 0, 1], contype=1, conaffinity=3, priority=1
    )
    floor.friction[0] = 0.8
    floor.condim = 3

    payload = trunk.add_body(name="payload", pos=PAYLOAD_POSITION)
    box = payload.add_geom(
        name="payload", type=_BOX, size=[0.08, 0.06, 0.03], mass=1e-3, contype=0, conaffinity=0
    )
    box.rgba = [0.25, 0.35, 0.55, 1]

    for i, joint in enumerate(joints):
        _add_actuator(spec, i, joint)
    for leg, name in zip(LEGS, feet, strict=True):
        foot = spec.geom(name)
        # the site's sphere encloses the foot: a touch sensor counts the contacts within
        foot.parent.add_site(name=f"{leg}_foot", pos=foot.pos, size=[1.5 * foot.size[0], 0, 0])

    foot_sensors = (
        mujoco.mjtSensor.mjSENS_FRAMEPOS,
        mujoco.mjtSensor.mjSENS_FRAMELINVEL,
        mujoco.mjtSensor.mjSENS_TOUCH,
    )
    for kind in foot_sensors:
        for leg in LEGS:
            spec.add_sensor(
                name=f"{leg}_{kind.name[7:].lower()}",
                type=kind,
                objtype=mujoco.mjtObj.mjOBJ_SITE,
                objname=f"{leg}_foot",
            )
    for name in JOINTS:
        spec.add_sensor(
            name=f"{name}_torque",
            type=mujoco.mjtSensor.mjSENS_ACTUATORFRC,
            objtype=mujoco.mjtObj.mjOBJ_ACTUATOR,
            objname=name,
        )
    return spec


def _add_actuator(spec: mujoco.MjSpec, i: int, joint: str) -> None:
    """Add the actuator of joint ``i``, which the model calls ``joint``.

    torque = stiffness · (pose + scale · action − q) − damping · q̇, with the action delayed and
    filtered by a first-order lag.
    """
    actuator = spec.add_actuator(name=JOINTS[i], target=joint, trntype=mujoco.mjtTrn.mjTRN_JOINT)
    actuator.gaintype = mujoco.mjtGain.mjGAIN_FIXED
    actuator.biastype = mujoco.mjtBias.mjBIAS_AFFINE
    actuator.ctrlrange = [-ACTION_LIMIT, ACTION_LIMIT]
    actuator.forcerange = [-TORQUE_LIMITS[i], TORQUE_LIMITS[i]]
    actuator.dyntype = mujoco.mjtDyn.mjDYN_FILTEREXACT
    actuator.dynprm[0] = LAG
    actuator.nsample = math.ceil(MAX_LATENCY / TIMESTEP)
    set_latency(actuator, LATENCY)
    set_strength(actuator, i, 1.0)


def set_strength(actuator: Any, i: int, strength: float) -> None:
    """Scale the torque of joint ``i``'s actuator; 0 is dead."""
    stiffness = strength * STIFFNESS
    damping = strength * DAMPING
    actuator.gainprm[0] = stiffness * ACTION_SCALE
    actuator.biasprm[:3] = [stiffness * DEFAULT_POSE[i], -stiffness, -damping]


def set_latency(actuator: Any, latency: float) -> None:
    """Delay an actuator by a whole number of physics steps, s."""
    # just short of it: rounding would make it a step more now and then
    actuator.delay = latency - 1e-9


def joint_columns(spec: mujoco.MjSpec) -> slice | list[int]:
    """Return where ``qvel`` has the joints, in our order; in ``qpos`` they are one column later."""
    compiled = compile_spec(spec)
    columns = [int(compiled.joint(spec.actuator(name).target).dofadr[0]) for name in JOINTS]
    consecutive = slice(columns[0], columns[0] + len(columns))
    if columns == list(range(consecutive.start, consecutive.stop)):
        return consecutive
    return columns


def robot_spec(robot: str = "") -> mujoco.MjSpec:
    """Build our Go2, or read another robot if one is named."""
    return load(robot) if robot else go2()


def leg_geometry(compiled: mujoco.MjModel) -> dict[str, dict[str, list[float]]]:
    """Return what forward kinematics needs: leg -> part -> position in the parent link, m.

    The foot's position is in the calf. The joints' axes are x, y and y, because all links' axes are
    parallel where all joint angles are zero.
    """
    geometry = {}
    for leg in LEGS:
        bodies = [compiled.body(compiled.joint(j).bodyid[0]) for j in _leg_joints(compiled, leg)]
        parts = {part: body.pos.tolist() for part, body in zip(LEG_PARTS, bodies, strict=True)}
        parts["foot"] = compiled.site(f"{leg}_foot").pos.tolist()
        geometry[leg] = parts
    return geometry


def actuator_settings(compiled: mujoco.MjModel) -> dict[str, Any]:
    """Return the fields of ``Hardware`` that describe the joints and their actuators."""
    ranges = [compiled.joint(j).range.tolist() for leg in LEGS for j in _leg_joints(compiled, leg)]
    return {
        "joints": JOINTS,
        "stiffness": (STIFFNESS,) * len(JOINTS),
        "damping": (DAMPING,) * len(JOINTS),
        "pose": tuple(DEFAULT_POSE.tolist()),
        "scale": (ACTION_SCALE,) * len(JOINTS),
        "position": tuple((low, high) for low, high in ranges),
        "velocity": tuple(SPEED_LIMITS.tolist()),
        "torque": tuple(TORQUE_LIMITS.tolist()),
    }


def _leg_joints(compiled: mujoco.MjModel, leg: str) -> list[int]:
    """Return the ids of a leg's joints, from the trunk outwards."""
    return [int(compiled.actuator(f"{leg}_{part}").trnid[0]) for part in LEG_PARTS]
