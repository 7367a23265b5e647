"""Franka Emika's Panda with its hand, built from primitive shapes with the published numbers.

Kinematics, limits and forces: Franka's data sheet and FCI manual ("Denavit-Hartenberg parameters",
"Limits"; Franka Hand: stroke, force). Masses, centres of mass and inertias: identified by Gaz et
al. (2019), as MuJoCo Menagerie has them. Frames as Franka's: x forward, y left, z up; lengths in m,
masses in kg, angles in rad.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mujoco
import numpy as np

ARM = tuple(f"joint{i}" for i in range(1, 8))
FINGERS = ("finger_joint1", "finger_joint2")
LOW = np.array([-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973])
HIGH = np.array([2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973])
"""Joint limits, rad."""
SPEED = np.array([2.175, 2.175, 2.175, 2.175, 2.61, 2.61, 2.61])
"""Joint speed limits, rad/s."""
TORQUE = np.array([87.0, 87.0, 87.0, 87.0, 12.0, 12.0, 12.0])
"""Torque limits, N·m."""
STROKE, FORCE = 0.08, 70.0
"""Of the hand: widest opening, m, and continuous grip force, N."""
STIFFNESS = np.array([4500.0, 4500.0, 3500.0, 3500.0, 2000.0, 2000.0, 2000.0])
DAMPING = 0.05 * STIFFNESS
"""Gains of the arm's joint position control, N·m/rad and N·m·s/rad."""
LAG = 0.04
"""Time constant of every drive's response, s: targets that come in steps are moved to smoothly, as
by Franka's own."""
FINGER_INERTIA = 0.05
"""Of the drive, felt at each finger, kg."""
FINGER_DAMPING = 10.0
"""Resistance of each finger, N·s/m: a force of 1 N closes at Franka's top speed of 0.1 m/s."""
READY = np.array([0.0, 0.15133, 0.0, -2.39803, 0.0, 2.54936, 0.7854])
"""Joint angles with the hand pointing down, its tip at (0.5, 0, 0.15)."""
TIP = 0.1034
"""From the hand's frame to between the pads, m."""
PAD = (0.0105, 0.004, 0.0105)
"""Half-sizes of a finger's pad, m: across, along the closing direction, and down."""

_TURN = {"+": (1, 1, 0, 0), "-": (1, -1, 0, 0), "0": (1, 0, 0, 0)}
# where each link's frame is in the one before (m), its quarter turn about x; mass kg, centre of
# mass m,
# inertia kg·m² (xx, yy, zz, xy, xz, yz)
_LINKS = (
    (
        (0, 0, 0.333),
        "0",
        4.970684,
        (0.003875, 0.002081, -0.04762),
        (0.70337, 0.70661, 0.009117, -0.000139, 0.006772, 0.019169),
    ),
    (
        (0, 0, 0),
        "-",
        0.646926,
        (-0.003141, -0.02872, 0.003495),
        (0.007962, 0.02811, 0.025995, -0.003925, 0.010254, 0.000704),
    ),
    (
        (0, -0.316, 0),
        "+",
        3.228604,
        (0.027518, 0.039252, -0.066502),
        (0.037242, 0.036155, 0.01083, -0.004761, -0.011396, -0.012805),
    ),
    (
        (0.0825, 0, 0),
        "+",
        3.587895,
        (-0.05317, 0.104419, 0.027454),
        (0.025853, 0.019552, 0.028323, 0.007796, -0.001332, 0.008641),
    ),
    (
        (-0.0825, 0.384, 0),
        "-",
        1.225946,
        (-0.011953, 0.041065, -0.038437),
        (0.035549, 0.029474, 0.008627, -0.002117, -0.004037, 0.000229),
    ),
    (
        (0, 0, 0),
        "+",
        1.666555,
        (0.060149, -0.014117, -0.010517),
        (0.001964, 0.004354, 0.005433, 0.000109, -0.001158, 0.000341),
    ),
    (
        (0.088, 0, 0),
        "+",
        0.735522,
        (0.010517, -0.004252, 0.061597),
        (0.012516, 0.010027, 0.004815, -0.000428, -0.001196, -0.000741),
    ),
)
# pictures alone: capsules from one point to another in a link's frame, m, and their radius
_SHAPES: dict[
    int, tuple[tuple[tuple[float, float, float], tuple[float, float, float], float], ...]
] = {
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
_WHITE, _GREY = (0.93, 0.93, 0.95, 1.0), (0.25, 0.26, 0.28, 1.0)


def panda() -> mujoco.MjSpec:
    """Build the arm on a table at the height of its base, its drives, and what its sensors feel.

    Pads, palm and table touch objects, pads and palm touch the table, and nothing else touches
    anything. The arm is held against gravity by its own controller, as Franka's is. It takes an
    implicit integrator.
    """
    spec = mujoco.MjSpec()
    spec.modelname = "panda"
    spec.compiler.degree = False
    spec.compiler.autolimits = True
    body = spec.worldbody
    for i, (pos, turn, mass, com, (xx, yy, zz, xy, xz, yz)) in enumerate(_LINKS):
        body = body.add_body(name=f"link{i + 1}", pos=pos, quat=_TURN[turn], gravcomp=1)
        body.explicitinertial, body.mass, body.ipos, body.fullinertia = (
            True,
            mass,
            com,
            (xx, yy, zz, xy, xz, yz),
        )
        joint = body.add_joint(name=ARM[i], axis=[0, 0, 1], range=[LOW[i], HIGH[i]], armature=0.1)
        joint.damping[0] = 1.0
        for start, end, radius in _SHAPES[i]:
            _shown(
                body,
                mujoco.mjtGeom.mjGEOM_CAPSULE,
                size=[radius, 0, 0],
                fromto=[*start, *end],
                rgba=_WHITE,
            )
    _add_hand(body)
    return spec


def _add_hand(flange: Any) -> None:
    """Mount the hand: two fingers that move as one."""
    hand = flange.add_body(
        name="hand", pos=[0, 0, 0.107], quat=[0.9238795, 0, 0, -0.3826834], gravcomp=1
    )
    hand.explicitinertial, hand.mass, hand.ipos, hand.inertia = (
        True,
        0.73,
        (-0.01, 0, 0.03),
        (0.001, 0.0025, 0.0017),
    )
    box = mujoco.mjtGeom.mjGEOM_BOX
    _touching(hand, "palm", [0.02, 0.1, 0.03], [0, 0, 0.028], _WHITE)
    hand.add_site(name="tip", pos=[0, 0, TIP], size=[0.005, 0, 0])
    for name, side in zip(("left", "right"), (1, -1), strict=True):
        finger = hand.add_body(name=f"{name}_finger", pos=[0, 0, 0.0584], gravcomp=1)
        finger.explicitinertial, finger.mass, finger.inertia = (
            True,
            0.015,
            (2.375e-6, 2.375e-6, 7.5e-7),
        )
        joint = finger.add_joint(
            name=FINGERS[side < 0], type=mujoco.mjtJoint.mjJNT_SLIDE, axis=[0, side, 0]
        )
        joint.range = [0, STROKE / 2]
        resist(joint)
        _shown(
            finger, box, size=[0.0105, 0.007, 0.0225], pos=[0, side * 0.0145, 0.0225], rgba=_GREY
        )
        _touching(finger, f"{name}_pad", list(PAD), [0, side * PAD[1], 0.0445], _GREY)
        size = [PAD[0] + 0.003, PAD[1], PAD[2] + 0.003]
        finger.add_site(
            name=f"{name}_pad", type=box, size=size, pos=[0, 0, 0.0445], rgba=[0, 0, 0, 0]
        )


def resist(joint: Any, lever: float = -1.0) -> None:
    """Give a finger's joint its inertia, its resistance and hard stops; ``lever`` as for
    ``equip``.
    """
    joint.armature, joint.damping[0] = FINGER_INERTIA * lever**2, FINGER_DAMPING * lever**2
    joint.solref_limit, joint.solimp_limit[:3] = [0.01, 1], [0.99, 0.999, 0.001]


def _touching(body: Any, name: str, size: list[float], pos: list[float], rgba: Any) -> None:
    kind = mujoco.mjtGeom.mjGEOM_BOX
    body.add_geom(
        name=name, type=kind, size=size, pos=pos, rgba=rgba, mass=0, contype=2, conaffinity=1
    )


def _shown(body: Any, kind: Any, **shape: Any) -> None:
    body.add_geom(type=kind, mass=0, contype=0, conaffinity=0, **shape)


def equip(
    spec: mujoco.MjSpec,
    arm: Sequence[str] = ARM,
    fingers: Sequence[str] = FINGERS,
    lever: float = -1.0,
    *,
    tied: bool = False,
) -> mujoco.MjSpec:
    """Add drives and sensors; for another model, to its joints of the arm and to those that close
    its hand.

    ``lever``: how far a pad closes for a finger's joint, m per its unit; ``tied``: whether the
    fingers move as one. Drives: the arm's joints take target angles, rad, the hand a grip force, N,
    positive to close. Sensors, in this order: where each joint stands (21) and how its axis points
    (21); the tip's position (3), the hand's x (3), y (3) and z axes (3), the tip's velocity (3);
    the force on each pad (2); the joints' angles (7); where the pads' faces are (6), and their
    velocities (6).
    """
    for i, (name, target) in enumerate(zip(ARM, arm, strict=True)):
        drive = spec.add_actuator(name=name, target=target, trntype=mujoco.mjtTrn.mjTRN_JOINT)
        drive.gaintype, drive.biastype = mujoco.mjtGain.mjGAIN_FIXED, mujoco.mjtBias.mjBIAS_AFFINE
        drive.gainprm[0], drive.biasprm[:3] = STIFFNESS[i], [0, -STIFFNESS[i], -DAMPING[i]]
        drive.ctrlrange, drive.forcerange = [LOW[i], HIGH[i]], [-TORQUE[i], TORQUE[i]]
        joint = spec.joint(target)
        place = joint.parent.add_site(
            name=name, pos=joint.pos, size=[0.001, 0, 0], rgba=[0, 0, 0, 0]
        )
        place.alt.type, place.alt.zaxis = mujoco.mjtOrientation.mjORIENTATION_ZAXIS, joint.axis
    grip = spec.add_tendon(name="grip")
    for name in fingers:
        grip.wrap_joint(name, 1.0)
    if not tied:
        tie = spec.add_equality(type=mujoco.mjtEq.mjEQ_JOINT, name1=fingers[0], name2=fingers[1])
        tie.data[1], tie.objtype = 1.0, mujoco.mjtObj.mjOBJ_JOINT
    drive = spec.add_actuator(name="grip", target="grip", trntype=mujoco.mjtTrn.mjTRN_TENDON)
    drive.gainprm[0], drive.ctrlrange = lever, [-1, FORCE]
    for drive in spec.actuators:
        drive.dyntype, drive.dynprm[0] = mujoco.mjtDyn.mjDYN_FILTEREXACT, LAG
    site, of = mujoco.mjtObj.mjOBJ_SITE, mujoco.mjtSensor
    for kind in (of.mjSENS_FRAMEPOS, of.mjSENS_FRAMEZAXIS):
        for name in ARM:
            spec.add_sensor(type=kind, objtype=site, objname=name)
    for kind in (
        of.mjSENS_FRAMEPOS,
        of.mjSENS_FRAMEXAXIS,
        of.mjSENS_FRAMEYAXIS,
        of.mjSENS_FRAMEZAXIS,
        of.mjSENS_FRAMELINVEL,
    ):
        spec.add_sensor(type=kind, objtype=site, objname="tip")
    for name in ("left_pad", "right_pad"):
        spec.add_sensor(type=of.mjSENS_TOUCH, objtype=site, objname=name)
    for name in arm:
        spec.add_sensor(type=of.mjSENS_JOINTPOS, objtype=mujoco.mjtObj.mjOBJ_JOINT, objname=name)
    for kind in (of.mjSENS_FRAMEPOS, of.mjSENS_FRAMELINVEL):
        for name in ("left_pad", "right_pad"):
            spec.add_sensor(type=kind, objtype=site, objname=name)
    return spec
