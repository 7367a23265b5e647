"""Franka Emika's Panda with its hand, from primitive shapes and the published numbers.

Kinematics, limits and forces: Franka's data sheet and FCI manual ("Denavit-Hartenberg parameters",
"Limits"; Franka Hand: stroke, force). Masses, centres of mass and inertias: identified by Gaz et
al. (2019), as MuJoCo Menagerie has them. Frames as Franka's: x forward, y left, z up; lengths in m,
masses in kg, angles in rad.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mujoco
import numpy as np

ARM_JOINTS = tuple(f"joint{i}" for i in range(1, 8))
FINGER_JOINTS = ("finger_joint1", "finger_joint2")
JOINT_LOW = np.array([-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973])
"""Lowest angle of each joint of the arm, rad."""
JOINT_HIGH = np.array([2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973])
"""Highest angle of each joint of the arm, rad."""
SPEED_LIMITS = np.array([2.175, 2.175, 2.175, 2.175, 2.61, 2.61, 2.61])
"""Largest speed of each joint of the arm, rad/s."""
TORQUE_LIMITS = np.array([87.0, 87.0, 87.0, 87.0, 12.0, 12.0, 12.0])
"""Largest torque of each joint of the arm, N·m."""
MAX_OPENING = 0.08
"""Widest opening of the hand, m."""
MAX_GRIP_FORCE = 70.0
"""Continuous grip force of the hand, N."""
STIFFNESS = np.array([4500.0, 4500.0, 3500.0, 3500.0, 2000.0, 2000.0, 2000.0])
"""Position gains of the arm's joints, N·m/rad."""
DAMPING = 0.05 * STIFFNESS
"""Velocity gains of the arm's joints, N·m·s/rad."""
LAG = 0.04
"""Time constant of every actuator's response, s.

Targets that jump once a control step are approached smoothly, as by Franka's own controller."""
FINGER_INERTIA = 0.05
"""Inertia of the hand's motor, as felt at each finger, kg."""
FINGER_DAMPING = 10.0
"""Resistance of each finger, N·s/m: a force of 1 N closes at Franka's top speed of 0.1 m/s."""
READY_POSE = np.array([0.0, 0.15133, 0.0, -2.39803, 0.0, 2.54936, 0.7854])
"""Joint angles with the hand pointing down and its tip at (0.5, 0, 0.15) m, rad."""
TIP_OFFSET = 0.1034
"""Distance from the hand's frame to the point between the pads, m."""
PAD_HALF_SIZE = (0.0105, 0.004, 0.0105)
"""Half-sizes of a finger's pad, m: across, along the closing direction, and down."""

SENSOR_WIDTHS = {
    "joint_positions": 21,
    "joint_axes": 21,
    "tip_position": 3,
    "hand_x": 3,
    "hand_y": 3,
    "hand_z": 3,
    "tip_velocity": 3,
    "pad_forces": 2,
    "joint_angles": 7,
    "pad_positions": 6,
    "pad_velocities": 6,
}
"""Sensors of an arm in their order, name -> numbers; see ``add_actuators_and_sensors``."""

_NO_TURN = (1, 0, 0, 0)
_QUARTER_TURN = (1, 1, 0, 0)
_QUARTER_TURN_BACK = (1, -1, 0, 0)

Point = tuple[float, float, float]
Capsule = tuple[Point, Point, float]
"""Start and end of the axis in the link's frame, and radius, m."""


class ArmLink(NamedTuple):
    """One link of the arm, in the frame of the link before it."""

    position: Point
    """Of the link's frame, m."""
    turn: tuple[int, int, int, int]
    """Rotation of the link's frame about x, as a quaternion to be normalised."""
    mass: float
    """kg."""
    centre: Point
    """Centre of mass, m."""
    inertia: tuple[float, float, float, float, float, float]
    """About the centre of mass, kg·m²: xx, yy, zz, xy, xz, yz."""


_LINKS = (
    ArmLink(
        position=(0, 0, 0.333),
        turn=_NO_TURN,
        mass=4.970684,
        centre=(0.003875, 0.002081, -0.04762),
        inertia=(0.70337, 0.70661, 0.009117, -0.000139, 0.006772, 0.019169),
    ),
    ArmLink(
        position=(0, 0, 0),
        turn=_QUARTER_TURN_BACK,
        mass=0.646926,
        centre=(-0.003141, -0.02872, 0.003495),
        inertia=(0.007962, 0.02811, 0.025995, -0.003925, 0.010254, 0.000704),
    ),
    ArmLink(
        position=(0, -0.316, 0),
        turn=_QUARTER_TURN,
        mass=3.228604,
        centre=(0.027518, 0.039252, -0.066502),
        inertia=(0.037242, 0.036155, 0.01083, -0.004761, -0.011396, -0.012805),
    ),
    ArmLink(
        position=(0.0825, 0, 0),
        turn=_QUARTER_TURN,
        mass=3.587895,
        centre=(-0.05317, 0.104419, 0.027454),
        inertia=(0.025853, 0.019552, 0.028323, 0.007796, -0.001332, 0.008641),
    ),
    ArmLink(
        position=(-0.0825, 0.384, 0),
        turn=_QUARTER_TURN_BACK,
        mass=1.225946,
        centre=(-0.011953, 0.041065, -0.038437),
        inertia=(0.035549, 0.029474, 0.008627, -0.002117, -0.004037, 0.000229),
    ),
    ArmLink(
        position=(0, 0, 0),
        turn=_QUARTER_TURN,
        mass=1.666555,
        centre=(0.060149, -0.014117, -0.010517),
        inertia=(0.001964, 0.004354, 0.005433, 0.000109, -0.001158, 0.000341),
    ),
    ArmLink(
        position=(0.088, 0, 0),
        turn=_QUARTER_TURN,
        mass=0.735522,
        centre=(0.010517, -0.004252, 0.061597),
        inertia=(0.012516, 0.010027, 0.004815, -0.000428, -0.001196, -0.000741),
    ),
)
"""The seven links, from the base outwards."""
_VISUAL_CAPSULES: dict[int, tuple[Capsule, ...]] = {
    0: (((0, 0, -0.28), (0, 0, -0.06), 0.06), ((0, -0.05, 0), (0, 0.05, 0), 0.06)),
    1: (((0, -0.07, 0), (0, -0.20, 0), 0.06),),
    2: (((0, 0, -0.12), (0, 0, -0.05), 0.06), ((0.0825, -0.04, 0), (0.0825, 0.04, 0), 0.055)),
    3: (((-0.0825, 0.06, 0), (-0.0825, 0.1, 0), 0.055),),
    4: (
        ((0, 0, -0.26), (0, 0.02, -0.2), 0.055),
        ((0, 0.06, -0.18), (0, 0.08, -0.02), 0.035),
        ((0, 0, -0.05), (0, 0, 0.02), 0.05),
    ),
    5: (((0, 0, -0.02), (0.07, 0, 0), 0.05),),
    6: (((0, 0, -0.02), (0, 0, 0.08), 0.045),),
}
"""Shapes that are shown and touch nothing, by index of the link."""
_WHITE = (0.93, 0.93, 0.95, 1.0)
_GREY = (0.25, 0.26, 0.28, 1.0)
_INVISIBLE = (0.0, 0.0, 0.0, 0.0)

_BOX = mujoco.mjtGeom.mjGEOM_BOX
_CAPSULE = mujoco.mjtGeom.mjGEOM_CAPSULE


def panda() -> mujoco.MjSpec:
    """Build the arm on a table at the height of its base.

    Pads, palm and table collide with objects, pads and palm collide with the table, and nothing
    else collides. The arm is held against gravity by its own controller, as Franka's is. It needs
    an implicit integrator. ``add_actuators_and_sensors`` completes it.
    """
    spec = mujoco.MjSpec()
    spec.modelname = "panda"
    spec.compiler.degree = False
    spec.compiler.autolimits = True
    body = spec.worldbody
    for i, link in enumerate(_LINKS):
        body = body.add_body(name=f"link{i + 1}", pos=link.position, quat=link.turn, gravcomp=1)
        body.explicitinertial = True
        body.mass = link.mass
        body.ipos = link.centre
        body.fullinertia = link.inertia

        limits = [JOINT_LOW[i], JOINT_HIGH[i]]
        joint = body.add_joint(name=ARM_JOINTS[i], axis=[0, 0, 1], range=limits, armature=0.1)
        joint.damping[0] = 1.0

        for start, end, radius in _VISUAL_CAPSULES[i]:
            _add_visual(body, _CAPSULE, size=[radius, 0, 0], fromto=[*start, *end], rgba=_WHITE)
    flange = body
    _add_hand(flange)
    return spec


def _add_hand(flange: Any) -> None:
    """Add the hand: a palm and two fingers."""
    # turned by −45° about z against the flange, as Franka mounts it
    hand = flange.add_body(
        name="hand", pos=[0, 0, 0.107], quat=[0.9238795, 0, 0, -0.3826834], gravcomp=1
    )
    hand.explicitinertial = True
    hand.mass = 0.73
    hand.ipos = (-0.01, 0, 0.03)
    hand.inertia = (0.001, 0.0025, 0.0017)
    _add_collision(hand, "palm", [0.02, 0.1, 0.03], [0, 0, 0.028], _WHITE)
    hand.add_site(name="tip", pos=[0, 0, TIP_OFFSET], size=[0.005, 0, 0])

    for name, joint_name, side in zip(("left", "right"), FINGER_JOINTS, (1, -1), strict=True):
        finger = hand.add_body(name=f"{name}_finger", pos=[0, 0, 0.0584], gravcomp=1)
        finger.explicitinertial = True
        finger.mass = 0.015
        finger.inertia = (2.375e-6, 2.375e-6, 7.5e-7)
        joint = finger.add_joint(
            name=joint_name, type=mujoco.mjtJoint.mjJNT_SLIDE, axis=[0, side, 0]
        )
        joint.range = [0, MAX_OPENING / 2]
        set_finger_resistance(joint)

        _add_visual(
            finger, _BOX, size=[0.0105, 0.007, 0.0225], pos=[0, side * 0.0145, 0.0225], rgba=_GREY
        )
        pad_position = [0, side * PAD_HALF_SIZE[1], 0.0445]
        _add_collision(finger, f"{name}_pad", list(PAD_HALF_SIZE), pad_position, _GREY)
        # the site encloses the pad's face: a touch sensor counts the contacts within
        size = [PAD_HALF_SIZE[0] + 0.003, PAD_HALF_SIZE[1], PAD_HALF_SIZE[2] + 0.003]
        finger.add_site(
            name=f"{name}_pad", type=_BOX, size=size, pos=[0, 0, 0.0445], rgba=_INVISIBLE
        )


def set_finger_resistance(joint: Any, lever: float = -1.0) -> None:
    """Give a finger's joint its inertia, its resistance and hard stops.

    ``lever`` is how far a pad closes for the joint, m per its unit.
    """
    joint.armature = FINGER_INERTIA * lever**2
    joint.damping[0] = FINGER_DAMPING * lever**2
    joint.solref_limit = [0.01, 1]
    joint.solimp_limit[:3] = [0.99, 0.999, 0.001]


def _add_collision(body: Any, name: str, size: list[float], pos: list[float], rgba: Any) -> None:
    """Add a box without mass that collides with objects and the table."""
    body.add_geom(
        name=name, type=_BOX, size=size, pos=pos, rgba=rgba, mass=0, contype=2, conaffinity=1
    )


def _add_visual(body: Any, kind: Any, **shape: Any) -> None:
    """Add a geom without mass that is shown and collides with nothing."""
    body.add_geom(type=kind, mass=0, contype=0, conaffinity=0, **shape)


def add_actuators_and_sensors(
    spec: mujoco.MjSpec,
    arm_joints: Sequence[str] = ARM_JOINTS,
    finger_joints: Sequence[str] = FINGER_JOINTS,
    lever: float = -1.0,
    *,
    tied: bool = False,
) -> mujoco.MjSpec:
    """Add actuators and sensors, to our own or to another model of the arm.

    Actuators: the arm's joints take target angles, rad; the hand takes a grip force, N, positive to
    close. Sensors, in the order of ``SENSOR_WIDTHS``: position of each joint and direction of its
    axis; the tip's position, the hand's x, y and z axes, the tip's velocity; the force on each pad,
    left then right; the joints' angles; position and velocity of the pads' faces.

    Args:
        spec: The model, to which they are added.
        arm_joints: Its names of the arm's joints.
        finger_joints: Its names of the two joints that close its hand.
        lever: How far a pad closes for a finger's joint, m per its unit.
        tied: Whether the model itself makes the fingers move as one.
    """
    for i, (name, target) in enumerate(zip(ARM_JOINTS, arm_joints, strict=True)):
        _add_joint_actuator(spec, i, name, target)
    _add_grip(spec, finger_joints, lever, tied=tied)
    for actuator in spec.actuators:
        actuator.dyntype = mujoco.mjtDyn.mjDYN_FILTEREXACT
        actuator.dynprm[0] = LAG

    kinds = mujoco.mjtSensor
    site = mujoco.mjtObj.mjOBJ_SITE
    pads = ("left_pad", "right_pad")
    for kind in (kinds.mjSENS_FRAMEPOS, kinds.mjSENS_FRAMEZAXIS):
        for name in ARM_JOINTS:
            spec.add_sensor(type=kind, objtype=site, objname=name)
    for kind in (
        kinds.mjSENS_FRAMEPOS,
        kinds.mjSENS_FRAMEXAXIS,
        kinds.mjSENS_FRAMEYAXIS,
        kinds.mjSENS_FRAMEZAXIS,
        kinds.mjSENS_FRAMELINVEL,
    ):
        spec.add_sensor(type=kind, objtype=site, objname="tip")
    for name in pads:
        spec.add_sensor(type=kinds.mjSENS_TOUCH, objtype=site, objname=name)
    for name in arm_joints:
        spec.add_sensor(type=kinds.mjSENS_JOINTPOS, objtype=mujoco.mjtObj.mjOBJ_JOINT, objname=name)
    for kind in (kinds.mjSENS_FRAMEPOS, kinds.mjSENS_FRAMELINVEL):
        for name in pads:
            spec.add_sensor(type=kind, objtype=site, objname=name)
    return spec


def _add_joint_actuator(spec: mujoco.MjSpec, i: int, name: str, target: str) -> None:
    """Add the position control of joint ``i``, and a site at the joint with z along its axis."""
    actuator = spec.add_actuator(name=name, target=target, trntype=mujoco.mjtTrn.mjTRN_JOINT)
    actuator.gaintype = mujoco.mjtGain.mjGAIN_FIXED
    actuator.biastype = mujoco.mjtBias.mjBIAS_AFFINE
    actuator.gainprm[0] = STIFFNESS[i]
    actuator.biasprm[:3] = [0, -STIFFNESS[i], -DAMPING[i]]
    actuator.ctrlrange = [JOINT_LOW[i], JOINT_HIGH[i]]
    actuator.forcerange = [-TORQUE_LIMITS[i], TORQUE_LIMITS[i]]

    joint = spec.joint(target)
    site = joint.parent.add_site(name=name, pos=joint.pos, size=[0.001, 0, 0], rgba=_INVISIBLE)
    site.alt.type = mujoco.mjtOrientation.mjORIENTATION_ZAXIS
    site.alt.zaxis = joint.axis


def _add_grip(
    spec: mujoco.MjSpec, finger_joints: Sequence[str], lever: float, *, tied: bool
) -> None:
    """Add the actuator of the grip force, which pulls on both fingers' joints."""
    tendon = spec.add_tendon(name="grip")
    for name in finger_joints:
        tendon.wrap_joint(name, 1.0)
    if not tied:
        left, right = finger_joints
        tie = spec.add_equality(type=mujoco.mjtEq.mjEQ_JOINT, name1=left, name2=right)
        tie.data[1] = 1.0
        tie.objtype = mujoco.mjtObj.mjOBJ_JOINT
    actuator = spec.add_actuator(name="grip", target="grip", trntype=mujoco.mjtTrn.mjTRN_TENDON)
    actuator.gainprm[0] = lever
    actuator.ctrlrange = [-1, MAX_GRIP_FORCE]
