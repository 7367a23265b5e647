"""Other models of Franka's arms, with Franka's own hand or a Robotiq 2F-85, driven and sensed as
our Panda is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import mujoco
import numpy as np

from metarobot.envs.robots import model_files as models
from metarobot.envs.robots import panda
from metarobot.tasks.mujoco_models import ModelError, compile_spec, strip
from metarobot.types import Floats

START = np.array([0.5, 0.0, 0.15])
"""Where the tip is at an episode's start, before it is disturbed, m."""
_PREFIXES = ("", "panda_", "fr3_")
_STOPS, _SETTLE = 10, 400
"""At how many angles of its drives, from stop to stop, a hand is measured; after how many physics
steps."""
_PADS = ("right_pad", "left_pad")
_JOINT = mujoco.mjtObj.mjOBJ_JOINT
_CLEAN = {
    "geom": ("condim", "density", "friction", "gap", "margin", "solimp", "solmix", "solref"),
    "actuator": (
        "biasprm",
        "biastype",
        "ctrllimited",
        "dynprm",
        "forcelimited",
        "gainprm",
        "gaintype",
        "gear",
    ),
}
"""Defaults of a model that would reach into what is added to it."""


@dataclass(frozen=True, kw_only=True)
class _Hand:
    """A hand that we know: on each side the joint that is driven and the body with the pad, by one
    of their names.
    """

    name: str
    joints: tuple[tuple[str, ...], ...]
    pads: tuple[tuple[str, ...], ...] = ()
    """The driven joints' own bodies if empty."""
    palm: tuple[tuple[float, float, float], float]
    """A box that touches things: half-sizes across, along the closing direction and outwards, and
    how far out from the driven joints its middle is, m."""


_HANDS = (
    _Hand(
        name="Franka's own",
        joints=tuple(tuple(f"{p}finger_joint{i}" for p in _PREFIXES) for i in (1, 2)),
        palm=((0.02, 0.1, 0.03), -0.0304),
    ),
    _Hand(
        name="a Robotiq 2F-85",
        joints=(("left_driver_joint",), ("right_driver_joint",)),
        pads=(("left_pad",), ("right_pad",)),
        palm=((0.0375, 0.0424, 0.0465), -0.0117),
    ),
)


class _Pads(NamedTuple):
    """Where a hand's pads are, the right one's first: m, in the axes of the tip."""

    middles: Floats
    """Of each pad's face, ``(2, 3)``."""
    sizes: Floats
    """Half-sizes of each pad, ``(2, 3)``."""

    @property
    def opening(self) -> float:
        return float(self.middles[1, 1] - self.middles[0, 1])


def load(robot: str) -> mujoco.MjSpec:
    """Read another model of the arm, a path to an MJCF or ``menagerie:name``, and drive it as ours.

    It needs the arm's seven joints, the joints of a hand that we know, and boxes for pads; the
    error lists what is missing and what there is. Its surroundings, drives, sensors, options,
    keyframes and limits give way to ours; masses, shapes, a hand's linkage and friction in its
    joints stay.
    """
    return _load(robot)[0]


def ready(robot: str) -> Floats:
    """Return the angles of the arm's joints and then the hand's with it open, pointing down, its
    tip at ``START``.
    """
    spec, fingers, lever = _load(robot)
    strip(spec)
    model = compile_spec(spec)
    data, site = (
        _settle(model, fingers, model.joint(fingers[0]).range[int(lever < 0)]),
        model.site("tip").id,
    )
    jacobian, down = np.zeros((6, model.nv)), np.diag([1.0, -1.0, -1.0])
    for _ in range(100):
        mujoco.mj_kinematics(model, data)
        mujoco.mj_comPos(model, data)
        mujoco.mj_jacSite(model, data, jacobian[:3], jacobian[3:], site)
        upset = 0.5 * np.cross(data.site_xmat[site].reshape(3, 3), down, axis=0).sum(1)
        error = np.concatenate([START - data.site_xpos[site], upset])
        if np.abs(error).max() < 1e-7:
            return np.array(data.qpos)
        arm = jacobian[:, :7]
        data.qpos[:7] += arm.T @ np.linalg.solve(arm @ arm.T + 1e-4 * np.eye(6), error)
        data.qpos[:7] = data.qpos[:7].clip(panda.LOW, panda.HIGH)
    x, y, z = START
    raise ModelError(
        f"{robot} cannot point down at ({x:g}, {y:g}, {z:g}) m; its base should stand at (0, 0, 0)"
    )


def _load(robot: str) -> tuple[mujoco.MjSpec, list[str], float]:
    """Read a model; also return the joints that drive its hand, and their lever as ``panda.equip``
    has it.
    """
    spec = models.read(robot, "arm", "franka_emika_panda")
    arm = models.named(
        robot, "joint", spec.joints, [tuple(p + name for p in _PREFIXES) for name in panda.ARM]
    )
    links = _links(robot, spec, arm)
    hand, fingers = _hand(robot, links[-1])
    bodies = [spec.joint(f).parent for f in fingers]
    if hand.pads:
        bodies = [spec.body(name) for name in models.named(robot, "pad", spec.bodies, hand.pads)]
    _clear(spec, links[0], linked=bool(hand.pads))
    _limit(spec, arm)
    boxes = [_boxes(robot, body) for body in bodies]
    lever, offset = _measure(robot, spec, hand, fingers, boxes)
    tied = any(
        e.type == mujoco.mjtEq.mjEQ_JOINT and {e.name1, e.name2} == set(fingers)
        for e in spec.equalities
    )
    panda.equip(spec, arm, fingers, lever, tied=tied)
    drive = spec.actuator("grip")
    drive.biastype, drive.biasprm[:2] = mujoco.mjtBias.mjBIAS_AFFINE, offset
    return spec, fingers, lever


def _links(robot: str, spec: mujoco.MjSpec, arm: list[str]) -> list[Any]:
    """Return the bodies from the base to the arm's last link; refuse what moves otherwise."""
    links = [spec.joint(arm[-1]).parent]
    while links[0].parent != spec.worldbody:
        links.insert(0, links[0].parent)
    way = [j for body in links for j in body.joints]
    if [j.name for j in way] != arm or any(j.type != mujoco.mjtJoint.mjJNT_HINGE for j in way):
        there = ", ".join(f"{j.name or 'unnamed'} ({j.type.name[6:].lower()})" for j in way)
        raise ModelError(
            f"{robot} needs seven hinges in a row on a base that stands still; on the way are: {there}"
        )
    own, free = {*arm, *(j.name for j in links[-1].find_all(_JOINT))}, mujoco.mjtJoint.mjJNT_FREE
    others = [j.name or "unnamed" for j in spec.joints if j.name not in own and j.type != free]
    if others:
        raise ModelError(
            f"{robot} needs one arm with one hand alone; it also has the joints {', '.join(others)}"
        )
    return links


def _hand(robot: str, link: Any) -> tuple[_Hand, list[str]]:
    """Recognise the hand by the joints beyond the arm's last link, and return those that drive
    it.
    """
    there = [j.name for j in link.find_all(_JOINT) if j.parent != link]
    found = [h for h in _HANDS if all(set(names) & set(there) for names in h.joints)]
    if len(found) != 1:
        known = "; ".join(
            f"{h.name} has {', '.join(names[0] for names in h.joints)}" for h in _HANDS
        )
        raise ModelError(
            f"{robot} has {'two hands' if found else 'no hand that we know'}: {known}; "
            f"the joints beyond its arm are: {', '.join(there) or 'none'}"
        )
    return found[0], [next(n for n in names if n in there) for names in found[0].joints]


def _boxes(robot: str, body: Any) -> list[str]:
    """Return the names of a pad's boxes; those without one are given one."""
    boxes = [g for g in body.geoms if g.type == mujoco.mjtGeom.mjGEOM_BOX]
    if not boxes:
        there = ", ".join(g.type.name[7:].lower() for g in body.geoms)
        raise ModelError(
            f"{robot} needs a box as the pad of {body.name!r}; its geoms are: {there or 'none'}"
        )
    for i, box in enumerate(boxes):
        box.name = box.name or f"{body.name}_box{i}"
    return [box.name for box in boxes]


def _clear(spec: mujoco.MjSpec, base: Any, *, linked: bool) -> None:
    """Leave the arm alone in the world, touching nothing, held against gravity, and without options
    of its own.
    """
    world, names = spec.worldbody, {"tip", *_PADS, *panda.ARM}
    ties = () if linked else (*spec.equalities, *spec.tendons)
    around = (
        *world.geoms,
        *world.sites,
        *world.cameras,
        *world.lights,
        *(b for b in world.bodies if b != base),
    )
    ours = [s for s in base.find_all(mujoco.mjtObj.mjOBJ_SITE) if s.name in names]
    for thing in (*spec.actuators, *spec.sensors, *spec.keys, *spec.pairs, *ties, *around, *ours):
        spec.delete(thing)
    for i, body in enumerate(spec.bodies[1:]):
        body.name, body.gravcomp = body.name or f"body{i}", 1
    for geom in spec.geoms:
        geom.contype = geom.conaffinity = 0
        geom.name = "" if geom.name in ("palm", *_PADS, "object", "ballast", "table") else geom.name
    fresh = mujoco.MjSpec()
    for name in dir(fresh.option):
        if not name.startswith("_"):
            setattr(spec.option, name, getattr(fresh.option, name))
    for kind, fields in _CLEAN.items():
        for name in fields:
            setattr(getattr(spec.default, kind), name, getattr(getattr(fresh.default, kind), name))
    spec.compiler.autolimits, spec.compiler.fusestatic = True, False


def _limit(spec: mujoco.MjSpec, arm: list[str]) -> None:
    """Set the published limits."""
    for name, low, high in zip(arm, panda.LOW, panda.HIGH, strict=True):
        joint = spec.joint(name)
        joint.range = np.array([low, high]) / _unit(spec)
        joint.limited, joint.actfrclimited = (
            mujoco.mjtLimited.mjLIMITED_TRUE,
            mujoco.mjtLimited.mjLIMITED_FALSE,
        )
        joint.actgravcomp = False


def _unit(spec: mujoco.MjSpec) -> float:
    """Return the model's unit of angles, rad."""
    return float(np.pi / 180 if spec.compiler.degree else 1.0)


def _measure(
    robot: str, spec: mujoco.MjSpec, hand: _Hand, fingers: list[str], boxes: list[list[str]]
) -> tuple[float, Floats]:
    """Measure the hand from stop to stop, and fit it with what is sensed of it and with our
    resistance.

    Return its lever half open, m a pad for a unit of a driven joint, and the line ``(offset,
    slope)`` over the sum of the driven joints' angles that cancels its springs: a drive presses
    with what it is told to.
    """
    bare = spec.copy()
    strip(bare)
    model = compile_spec(bare)
    for body in spec.bodies[1:]:
        if not body.explicitinertial:  # so that shapes that only show can be left out
            known = model.body(body.name)
            body.explicitinertial, body.mass, body.inertia = True, known.mass[0], known.inertia
            body.ipos, body.iquat = known.ipos, known.iquat
    low, high = model.joint(fingers[0]).range
    angles = np.linspace(low, high, _STOPS)
    stops = [_settle(model, fingers, angle) for angle in angles]
    apart = [
        np.linalg.norm(np.subtract(*(data.geom(side[0]).xpos for side in boxes))) for data in stops
    ]
    axes = _axes(stops[int(np.argmax(apart))], boxes)
    opening = np.array([_pads(data, axes, boxes).opening for data in stops])
    if np.ptp(opening) < 0.02:
        raise ModelError(
            f"{robot}: its hand opens by {np.ptp(opening):.3g} m over the range of joint {fingers[0]!r}"
        )
    wider = np.argsort(opening)
    shut, half = np.interp([0, opening.max() / 2], opening[wider], angles[wider])
    lever = round(float(np.interp(half, angles, -np.gradient(opening, angles) / 2)), 5)
    moved = np.gradient(np.array([data.qpos for data in stops]), angles, axis=0)
    springs = (moved * np.array([data.qfrc_spring for data in stops])).sum(1) / 2
    for joint in map(spec.joint, fingers):
        hinge = joint.type == mujoco.mjtJoint.mjJNT_HINGE
        joint.range = np.sort([shut, angles[wider[-1]]]) / (_unit(spec) if hinge else 1.0)
        panda.resist(joint, lever)
    data = _settle(model, fingers, half)
    _fit(spec, hand, fingers, boxes, data, axes)
    return lever, -np.polyfit(2 * angles, springs, 1)[::-1]


def _settle(model: mujoco.MjModel, fingers: list[str], angle: float) -> mujoco.MjData:
    """Hold the arm at ``panda.READY`` and turn the hand's drives to an angle, until its linkage has
    followed.
    """
    model.opt.gravity, model.opt.integrator = 0, mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    data, driven = mujoco.MjData(model), [int(model.joint(f).qposadr[0]) for f in fingers]
    held, start = [*range(7), *driven], data.qpos[driven]
    for i in range(_SETTLE):
        data.qpos[:7], data.qpos[driven] = (
            panda.READY,
            start + (angle - start) * min(2 * i / _SETTLE, 1.0),
        )
        data.qvel[held] = 0
        mujoco.mj_step(model, data)
    data.qpos[:7], data.qpos[driven] = panda.READY, angle
    mujoco.mj_forward(model, data)
    return data


def _axes(data: mujoco.MjData, boxes: list[list[str]]) -> Floats:
    """Return the tip's axes as columns: across, from the right pad to the left, and out; put the
    right boxes first.
    """
    places = np.array([data.geom(side[0]).xpos for side in boxes])
    link = data.body(data.model.jnt_bodyid[6])
    out = data.xaxis[6] * np.sign((places.mean(0) - link.xpos) @ data.xaxis[6])
    left = places[1] - places[0]
    left -= out * (out @ left)
    # a hand turned by half is the same hand: let its left be where the wrist has as much room as
    # ours
    if left @ link.xmat.reshape(3, 3)[:, 1] < -1e-6:
        left *= -1
        boxes.reverse()
    left /= np.linalg.norm(left)
    return np.stack([np.cross(left, out), left, out], 1)


def _pads(data: mujoco.MjData, axes: Floats, boxes: list[list[str]]) -> _Pads:
    """Find the pads: of each finger's boxes those that reach furthest inwards, within 2 mm, as
    one.
    """
    middles, sizes = [], []
    for sign, side in zip((-1, 1), boxes, strict=True):
        centres = np.array([axes.T @ data.geom(name).xpos for name in side])
        turned = [np.abs(axes.T @ data.geom(name).xmat.reshape(3, 3)) for name in side]
        reach = np.array(
            [r @ data.model.geom(name).size for r, name in zip(turned, side, strict=True)]
        )
        inner = sign * centres[:, 1] - reach[:, 1]
        chosen = inner < inner.min() + 0.002
        low, high = (centres - reach)[chosen].min(0), (centres + reach)[chosen].max(0)
        middles.append([(low[0] + high[0]) / 2, sign * inner.min(), (low[2] + high[2]) / 2])
        sizes.append((high - low) / 2)
    return _Pads(np.array(middles), np.array(sizes))


def _fit(
    spec: mujoco.MjSpec,
    hand: _Hand,
    fingers: list[str],
    boxes: list[list[str]],
    data: mujoco.MjData,
    axes: Floats,
) -> None:
    """Mark the tip and the pads' faces, and add what touches: a palm, and for each pad one box in
    its boxes' stead.
    """
    pads, base, kind = (
        _pads(data, axes, boxes),
        spec.joint(fingers[0]).parent.parent,
        mujoco.mjtGeom.mjGEOM_BOX,
    )
    tip, end = pads.middles.mean(0), (pads.middles + pads.sizes)[:, 2].max()
    tip[2] = max(tip[2], end - panda.PAD[2])  # as near to the table as ours
    _put(base.add_site(name="tip", size=[0.005, 0, 0]), data, axes, axes @ tip)
    root, (extent, out) = np.mean([data.joint(f).xanchor for f in fingers], 0), hand.palm
    palm = base.add_geom(name="palm", type=kind, size=extent)
    _put(palm, data, axes, root + out * axes[:, 2])
    touching = [palm]
    for sign, name, side, middle, half in zip((-1, 1), _PADS, boxes, *pads, strict=True):
        finger, size = spec.geom(side[0]).parent, [half[0] + 0.003, panda.PAD[1], half[2] + 0.003]
        site = finger.add_site(name=name, type=kind, size=size, rgba=[0, 0, 0, 0])
        _put(site, data, axes, axes @ middle)
        touching.append(finger.add_geom(name=name, type=kind, size=half))
        _put(touching[-1], data, axes, axes @ (middle + np.array([0, sign * half[1], 0])))
    for geom in touching:
        geom.mass, geom.contype, geom.conaffinity, geom.priority, geom.margin, geom.gap = (
            0,
            2,
            1,
            0,
            0,
            0,
        )
        geom.group = 3  # not shown


def _put(thing: Any, data: mujoco.MjData, axes: Floats, place: Floats) -> None:
    """Put a thing into its body, its axes and its place given in the world's."""
    body, quat = data.body(thing.parent.name), np.zeros(4)
    turned = body.xmat.reshape(3, 3).T
    mujoco.mju_mat2Quat(quat, (turned @ axes).ravel())
    thing.pos, thing.quat = turned @ (place - body.xpos), quat
