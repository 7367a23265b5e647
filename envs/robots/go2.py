"""Unitree's Go2 from primitive shapes and published numbers, and any other quadruped model driven
the same way.

Masses, inertias, link lengths, limits and joint order are those of Unitree's ``go2_description``
(unitree_ros, BSD-3), the lower leg's those of its newer revision; motor armature and joint damping
as in MuJoCo Menagerie. Frames: x forward, y left, z up; a leg is F(ront) or R(ear), then R(ight) or
L(eft).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import mujoco
import numpy as np

from metarobot.envs.robots import model_files as models
from metarobot.tasks.mujoco_models import ModelError, compile_spec

LEGS = ("FR", "FL", "RR", "RL")
PARTS = ("hip", "thigh", "calf")
JOINTS = tuple(f"{leg}_{part}" for leg in LEGS for part in PARTS)
"""The twelve joints in the order of the robot's own motors (SDK2's LowCmd)."""
POSE = np.array(
    [
        q
        for leg in LEGS
        for q in (-0.1 if leg[1] == "R" else 0.1, 0.8 if leg[0] == "F" else 1.0, -1.5)
    ]
)
"""Default joint angles, rad."""
HEIGHT, START = 0.283, 0.34
"""Height of the trunk over level ground, m: where the drives hold the default pose, and with no
foot in the ground."""
TORQUE = np.tile([23.7, 23.7, 45.43], 4)
"""Torque limits, N·m."""
SPEED = np.tile([30.1, 30.1, 15.70], 4)
"""Speed limits, rad/s."""
MASS = 15.206
"""Of the whole robot, kg."""
STIFFNESS, DAMPING = 25.0, 0.5
"""PD gains of the drives, N·m/rad and N·m·s/rad."""
ACTION_SCALE, ACTION_LIMIT = 0.25, 4.0
"""An action of 1 moves a joint's target by so many rad from the default pose; actions are clipped
at ± the limit."""
LAG, LATENCY, MAX_LATENCY = 0.01, 0.005, 0.04
"""Time constant of the drives' response, and the delay from action to drive, s: what it is, and
what it may be."""
TIMESTEP = 0.005
PAYLOAD = (0.0, 0.0, 0.09)
"""Where a load sits on the trunk, m."""

FOOT = 0.022
"""Radius of a foot, m."""

_LEG_X, _LEG_Y, _HIP_Y, _LINK = 0.1934, 0.0465, 0.0955, 0.213
_RANGES = {
    "hip": {"F": (-1.0472, 1.0472), "R": (-1.0472, 1.0472)},
    "thigh": {"F": (-1.5708, 3.4907), "R": (-0.5236, 4.5379)},
    "calf": {"F": (-2.7227, -0.83776), "R": (-2.7227, -0.83776)},
}
# mass kg, centre of mass m, inertia kg·m² (xx, yy, zz, xy, xz, yz) of the front left leg's links
_TRUNK = (
    6.921,
    (0.021112, 0.0, -0.005366),
    (0.02448, 0.098077, 0.107, 0.00012166, 0.0014849, -3.12e-5),
)
_LINKS = {
    "hip": (
        0.678,
        (-0.0054, 0.00194, -0.000105),
        (0.00048, 0.000884, 0.000596, -3.01e-6, 1.11e-6, -1.42e-6),
    ),
    "thigh": (
        1.152,
        (-0.00374, -0.0223, -0.0327),
        (0.00584, 0.0058, 0.00103, 8.72e-5, -0.000289, 0.000808),
    ),
    "calf": (
        0.241352,
        (0.00629595, -0.000622121, -0.141417),
        (0.00146356, 0.0014901, 5.31397e-5, 0.0, 0.0, 0.0),
    ),
}
_BODY, _LEG = (0.85, 0.87, 0.9, 1.0), (0.2, 0.22, 0.25, 1.0)


def go2() -> mujoco.MjSpec:
    """Build the robot on a level floor, with its drives and sensors.

    Feet, knees and trunk touch the floor and nothing else touches anything: few pairs, so that it
    is fast.
    """
    spec = mujoco.MjSpec()
    spec.modelname = "go2"
    spec.compiler.degree = False
    trunk = spec.worldbody.add_body(name="base", pos=[0, 0, START])
    trunk.add_freejoint(name="root")
    _weigh(trunk, *_TRUNK)
    _touching(trunk, "trunk", mujoco.mjtGeom.mjGEOM_BOX, [0.1881, 0.04675, 0.057], rgba=_BODY)
    _shown(trunk, mujoco.mjtGeom.mjGEOM_BOX, [0.13, 0.075, 0.045], [0.0, 0.0, 0.0], _BODY)
    _shown(trunk, mujoco.mjtGeom.mjGEOM_CAPSULE, [0.045, 0.03, 0.0], [0.285, 0.0, 0.0], _LEG)
    for leg in LEGS:
        _add_leg(trunk, leg)
    return _equip(spec, trunk, [f"{j}_joint" for j in JOINTS], list(LEGS))


def _add_leg(trunk: Any, leg: str) -> None:
    """Hang one leg: hip, thigh and calf, mirrored from the front left one."""
    x, y = (1 if leg[0] == "F" else -1), (1 if leg[1] == "L" else -1)
    body, places = (
        trunk,
        {"hip": (x * _LEG_X, y * _LEG_Y, 0), "thigh": (0, y * _HIP_Y, 0), "calf": (0, 0, -_LINK)},
    )
    for part in PARTS:
        mass, com, (xx, yy, zz, xy, xz, yz) = _LINKS[part]
        body = body.add_body(name=f"{leg}_{part}", pos=places[part])
        s = x if part == "hip" else 1
        _weigh(
            body, mass, (s * com[0], y * com[1], com[2]), (xx, yy, zz, s * y * xy, s * xz, y * yz)
        )
        joint = body.add_joint(
            name=f"{leg}_{part}_joint", axis=[1, 0, 0] if part == "hip" else [0, 1, 0]
        )
        joint.range, joint.armature, joint.damping[0] = _RANGES[part][leg[0]], 0.01, 0.1
        if part == "hip":
            # a capsule along y: the motor's housing
            _shown(
                body,
                mujoco.mjtGeom.mjGEOM_CAPSULE,
                [0.046, 0.02, 0],
                [0, y * 0.05, 0],
                _LEG,
                [1, 1, 0, 0],
            )
        else:
            size = [0.02, _LINK / 2, 0] if part == "thigh" else [0.012, _LINK / 2, 0]
            _shown(body, mujoco.mjtGeom.mjGEOM_CAPSULE, size, [0, 0, -_LINK / 2], _LEG)
    _touching(body, f"{leg}_knee", mujoco.mjtGeom.mjGEOM_SPHERE, [0.02, 0, 0], rgba=_LEG)
    _touching(body, leg, mujoco.mjtGeom.mjGEOM_SPHERE, [FOOT, 0, 0], [-0.002, 0, -_LINK], _LEG)


def _weigh(body: Any, mass: float, com: Iterable[float], inertia: Iterable[float]) -> None:
    body.explicitinertial, body.mass, body.ipos, body.fullinertia = (
        True,
        mass,
        list(com),
        list(inertia),
    )


def _touching(
    body: Any,
    name: str,
    kind: Any,
    size: list[float],
    pos: Iterable[float] = (0, 0, 0),
    rgba: Any = _LEG,
) -> None:
    body.add_geom(
        name=name, type=kind, size=size, pos=list(pos), rgba=rgba, mass=0, contype=2, conaffinity=1
    )


def _shown(
    body: Any,
    kind: Any,
    size: list[float],
    pos: Iterable[float],
    rgba: Any,
    quat: Iterable[float] = (1, 0, 0, 0),
) -> None:
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
    """Read another model of a quadruped, a path to an MJCF or ``menagerie:name``, and drive it as
    ours.

    It needs twelve leg joints, a trunk on a free joint, and a named sphere at each foot; the error
    lists what is missing and what there is. Its own floor, actuators, sensors and keyframes give
    way to ours; masses, shapes and friction in its joints stay.
    """
    spec = models.read(robot, "quadruped", "unitree_go2")
    ours = [s for s in spec.sites if s.name in [f"{leg}_foot" for leg in LEGS]]
    ours += [b for b in spec.bodies if b.name == "payload"]
    for thing in (
        *spec.actuators,
        *spec.sensors,
        *spec.keys,
        *spec.worldbody.geoms,
        *spec.worldbody.lights,
        *ours,
    ):
        spec.delete(thing)
    joints = models.named(robot, "joint", spec.joints, [(f"{j}_joint", j) for j in JOINTS])
    feet = models.named(
        robot,
        "foot geom",
        spec.geoms,
        [(leg, f"{leg}_foot", f"{leg}_foot_collision") for leg in LEGS],
    )
    trunks = [
        b
        for b in spec.worldbody.bodies
        if any(j.type == mujoco.mjtJoint.mjJNT_FREE for j in b.joints)
    ]
    if len(trunks) != 1:
        raise ModelError(f"{robot} needs one body on a free joint, the trunk; it has {len(trunks)}")
    for name in joints:
        if spec.joint(name).type != mujoco.mjtJoint.mjJNT_HINGE:
            raise ModelError(f"{robot}: joint {name!r} is no hinge")
    return _equip(spec, trunks[0], joints, feet)


def _equip(spec: mujoco.MjSpec, trunk: Any, joints: list[str], feet: list[str]) -> mujoco.MjSpec:
    """Add floor, load, drives and sensors, the same for every model."""
    spec.option.timestep, spec.option.integrator = TIMESTEP, mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    # hard friction: with MuJoCo's default the feet creep and a standing robot sinks by 2 cm in 10 s
    spec.option.cone, spec.option.impratio = mujoco.mjtCone.mjCONE_PYRAMIDAL, 100.0
    spec.compiler.autolimits = True
    plane = mujoco.mjtGeom.mjGEOM_PLANE
    # priority: the floor's friction is what counts, not the larger of the two
    spec.worldbody.add_geom(
        name="floor", type=plane, size=[0, 0, 1], contype=1, conaffinity=3, priority=1
    )
    spec.geom("floor").friction[0], spec.geom("floor").condim = 0.8, 3
    box = trunk.add_body(name="payload", pos=PAYLOAD)
    kind = mujoco.mjtGeom.mjGEOM_BOX
    box.add_geom(
        name="payload", type=kind, size=[0.08, 0.06, 0.03], mass=1e-3, contype=0, conaffinity=0
    )
    spec.geom("payload").rgba = [0.25, 0.35, 0.55, 1]
    for i, name in enumerate(joints):
        _drive(spec, JOINTS[i], name, i)
    for leg, name in zip(LEGS, feet, strict=True):
        foot = spec.geom(name)
        foot.parent.add_site(name=f"{leg}_foot", pos=foot.pos, size=[1.5 * foot.size[0], 0, 0])
    site = mujoco.mjtObj.mjOBJ_SITE
    for kind in (
        mujoco.mjtSensor.mjSENS_FRAMEPOS,
        mujoco.mjtSensor.mjSENS_FRAMELINVEL,
        mujoco.mjtSensor.mjSENS_TOUCH,
    ):
        for leg in LEGS:
            spec.add_sensor(
                name=f"{leg}_{kind.name[7:].lower()}",
                type=kind,
                objtype=site,
                objname=f"{leg}_foot",
            )
    force, actuator = mujoco.mjtSensor.mjSENS_ACTUATORFRC, mujoco.mjtObj.mjOBJ_ACTUATOR
    for name in JOINTS:
        spec.add_sensor(name=f"{name}_torque", type=force, objtype=actuator, objname=name)
    return spec


def _drive(spec: mujoco.MjSpec, name: str, joint: str, i: int) -> None:
    """Add a drive: torque = gain (pose + scale · action − q) − damping q̇, the action delayed and
    lagging.
    """
    drive = spec.add_actuator(name=name, target=joint, trntype=mujoco.mjtTrn.mjTRN_JOINT)
    drive.gaintype, drive.biastype = mujoco.mjtGain.mjGAIN_FIXED, mujoco.mjtBias.mjBIAS_AFFINE
    drive.ctrlrange, drive.forcerange = [-ACTION_LIMIT, ACTION_LIMIT], [-TORQUE[i], TORQUE[i]]
    drive.dyntype, drive.dynprm[0] = mujoco.mjtDyn.mjDYN_FILTEREXACT, LAG
    drive.nsample = math.ceil(MAX_LATENCY / TIMESTEP)
    set_latency(drive, LATENCY)
    set_strength(drive, i, 1.0)


def set_strength(drive: Any, i: int, strength: float) -> None:
    """Scale what joint ``i``'s drive gives for an error; 0 is dead."""
    drive.gainprm[0] = strength * STIFFNESS * ACTION_SCALE
    drive.biasprm[:3] = [strength * STIFFNESS * POSE[i], -strength * STIFFNESS, -strength * DAMPING]


def set_latency(drive: Any, latency: float) -> None:
    """Delay what a drive does by a whole number of physics steps, s."""
    drive.delay = (
        latency - 1e-9
    )  # just short of it: rounding would make it a step more now and then


def columns(spec: mujoco.MjSpec) -> slice | list[int]:
    """Return where a model holds the joints' velocities, in our order; their positions stand one
    further.
    """
    compiled = compile_spec(spec)
    found = [int(compiled.joint(spec.actuator(name).target).dofadr[0]) for name in JOINTS]
    return (
        slice(found[0], found[0] + len(found))
        if found == list(range(found[0], found[0] + len(found)))
        else found
    )


def model(robot: str = "") -> mujoco.MjSpec:
    """Build our robot, or read another."""
    return load(robot) if robot else go2()


def builder(robot: str) -> Any:
    """Return a function that builds the robot."""
    return partial(model, robot)


def legs(compiled: mujoco.MjModel) -> dict[str, dict[str, list[float]]]:
    """Return what a robot needs to know where its feet are: each joint's place in the link before
    it, m.

    The foot's is in the calf. Axes are x, y and y, as the pose of all zeros has all links' axes
    parallel.
    """
    places = {}
    for leg in LEGS:
        bodies = [compiled.body(compiled.joint(j).bodyid[0]) for j in _joints(compiled, leg)]
        places[leg] = {part: body.pos.tolist() for part, body in zip(PARTS, bodies, strict=True)}
        places[leg]["foot"] = compiled.site(f"{leg}_foot").pos.tolist()
    return places


def drives(compiled: mujoco.MjModel) -> dict[str, Any]:
    """Return what the drives of a model are told, one value a joint in our order, under the names
    of ``Hardware``.
    """
    ranges = [compiled.joint(j).range.tolist() for leg in LEGS for j in _joints(compiled, leg)]
    return {
        "joints": JOINTS,
        "stiffness": (STIFFNESS,) * len(JOINTS),
        "damping": (DAMPING,) * len(JOINTS),
        "pose": tuple(POSE.tolist()),
        "scale": (ACTION_SCALE,) * len(JOINTS),
        "position": tuple((low, high) for low, high in ranges),
        "velocity": tuple(SPEED.tolist()),
        "torque": tuple(TORQUE.tolist()),
    }


def _joints(compiled: mujoco.MjModel, leg: str) -> list[int]:
    return [int(compiled.actuator(f"{leg}_{part}").trnid[0]) for part in PARTS]
