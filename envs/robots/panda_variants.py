"""Other models of Franka's arms, with Franka's own hand or a Robotiq 2F-85.

They get the actuators and sensors of our Panda, so that the same families and agents run on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import mujoco
import numpy as np

from metarobot.envs.robots import model_files, panda
from metarobot.tasks.model_edits import ModelError, compile_spec, strip
from metarobot.types import Floats

TIP_START = np.array([0.5, 0.0, 0.15])
"""Position of the tip at an episode's start, before it is disturbed, m."""
PAD_NAMES = ("right_pad", "left_pad")

_JOINT_PREFIXES = ("", "panda_", "fr3_")
"""How models begin the names of their joints."""
_MEASURED_ANGLES = 10
"""At how many angles of its motors, from stop to stop, a hand is measured."""
_SETTLING_STEPS = 400
"""Physics steps until a hand's linkage has followed its motors."""
_CLASHING_NAMES = ("palm", *PAD_NAMES, "object", "ballast", "table")
"""Names of geoms that are added to the model."""
_JOINT = mujoco.mjtObj.mjOBJ_JOINT
_HINGE = mujoco.mjtJoint.mjJNT_HINGE
_FREE = mujoco.mjtJoint.mjJNT_FREE
_BOX = mujoco.mjtGeom.mjGEOM_BOX
_RESET_DEFAULTS = {
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
"""A model's defaults that would affect what is added to it: element -> fields."""


@dataclass(frozen=True, kw_only=True)
class KnownHand:
    """A hand that is supported, and the names by which it is recognised."""

    name: str
    joints: tuple[tuple[str, ...], ...]
    """For each side the joint that is driven, by one of these names."""
    pads: tuple[tuple[str, ...], ...] = ()
    """For each side the body with the pad, by one of these names; the driven joints' own bodies if
    empty."""
    palm_half_size: tuple[float, float, float]
    """Half-sizes of a box that collides, m: across, along the closing direction, and outwards."""
    palm_offset: float
    """How far out from the driven joints the middle of that box is, m."""


_KNOWN_HANDS = (
    KnownHand(
        name="Franka's own",
        joints=tuple(tuple(f"{p}finger_joint{i}" for p in _JOINT_PREFIXES) for i in (1, 2)),
        palm_half_size=(0.02, 0.1, 0.03),
        palm_offset=-0.0304,
    ),
    KnownHand(
        name="a Robotiq 2F-85",
        joints=(("left_driver_joint",), ("right_driver_joint",)),
        pads=(("left_pad",), ("right_pad",)),
        palm_half_size=(0.0375, 0.0424, 0.0465),
        palm_offset=-0.0117,
    ),
)


class PadGeometry(NamedTuple):
    """Where a hand's pads are, the right one's first: m, along the axes of the tip."""

    centres: Floats
    """Centre of each pad's face, ``(2, 3)``."""
    half_sizes: Floats
    """Half-sizes of each pad, ``(2, 3)``."""

    @property
    def opening(self) -> float:
        """Return the distance between the pads' faces, m."""
        return float(self.centres[1, 1] - self.centres[0, 1])


class HandMeasures(NamedTuple):
    """What a hand does for an angle of its driven joints."""

    lever: float
    """How far a pad closes when the hand is half open, m per unit of a driven joint."""
    spring_line: Floats
    """Offset and slope of the force that cancels the hand's springs, ``(2,)``.

    It is a line over the sum of the driven joints' angles: with it, a motor presses with the force
    that it is told to."""


class LoadedArm(NamedTuple):
    """A model with our actuators and sensors, and what was found out about its hand."""

    spec: mujoco.MjSpec
    finger_joints: list[str]
    """The joints that drive the hand."""
    lever: float
    """How far a pad closes for a finger's joint, m per its unit."""


def load(robot: str) -> mujoco.MjSpec:
    """Read another model of the arm and drive it as ours.

    It needs the arm's seven joints, the joints of a known hand, and boxes as pads. Its
    surroundings, actuators, sensors, options, keyframes and limits are replaced by ours; its
    masses, shapes, the hand's linkage and the friction in its joints remain.

    Args:
        robot: A path to an MJCF file, or ``menagerie:name``.

    Raises:
        ModelError: Something is missing; the message lists what is there.
    """
    return _load(robot).spec


def ready_pose(robot: str) -> Floats:
    """Return the joint angles with the hand open, pointing down, and its tip at ``TIP_START``.

    First the arm's seven, then the hand's. Found by damped least squares from ``panda.READY_POSE``.

    Raises:
        ModelError: The arm cannot get there.
    """
    spec, finger_joints, lever = _load(robot)
    strip(spec)
    model = compile_spec(spec)
    stops = model.joint(finger_joints[0]).range
    open_angle = stops[1] if lever < 0 else stops[0]
    data = _settle(model, finger_joints, open_angle)

    tip = model.site("tip").id
    pointing_down = np.diag([1.0, -1.0, -1.0])
    jacobian = np.zeros((6, model.nv))
    for _ in range(100):
        mujoco.mj_kinematics(model, data)
        mujoco.mj_comPos(model, data)
        mujoco.mj_jacSite(model, data, jacobian[:3], jacobian[3:], tip)

        # e: the error of the tip's position, and of its orientation as a rotation vector
        orientation = data.site_xmat[tip].reshape(3, 3)
        rotation_error = 0.5 * np.cross(orientation, pointing_down, axis=0).sum(1)
        error = np.concatenate([TIP_START - data.site_xpos[tip], rotation_error])
        if np.abs(error).max() < 1e-7:
            return np.array(data.qpos)

        # Δq = Jᵀ (J Jᵀ + λ² I)⁻¹ e: Buss (2004), "Introduction to inverse kinematics", eq. 11
        arm = jacobian[:, :7]
        data.qpos[:7] += arm.T @ np.linalg.solve(arm @ arm.T + 1e-4 * np.eye(6), error)
        data.qpos[:7] = data.qpos[:7].clip(panda.JOINT_LOW, panda.JOINT_HIGH)
    x, y, z = TIP_START
    raise ModelError(
        f"{robot} cannot point down at ({x:g}, {y:g}, {z:g}) m; its base should stand at (0, 0, 0)"
    )


def _load(robot: str) -> LoadedArm:
    """Read a model, measure its hand, and add our actuators and sensors."""
    spec = model_files.read_model(robot, "arm", "franka_emika_panda")
    arm_names = [tuple(prefix + joint for prefix in _JOINT_PREFIXES) for joint in panda.ARM_JOINTS]
    arm_joints = model_files.find_elements(robot, "joint", spec.joints, arm_names)
    links = _arm_links(robot, spec, arm_joints)
    hand, finger_joints = _recognise_hand(robot, links[-1])

    pad_bodies = [spec.joint(joint).parent for joint in finger_joints]
    if hand.pads:
        names = model_files.find_elements(robot, "pad", spec.bodies, hand.pads)
        pad_bodies = [spec.body(name) for name in names]

    # a hand with pads of its own has a linkage, which consists of equalities and tendons
    _clear(spec, links[0], keep_linkage=bool(hand.pads))
    _set_joint_limits(spec, arm_joints)
    pad_boxes = [_pad_boxes(robot, body) for body in pad_bodies]
    lever, spring_line = _measure_hand(robot, spec, hand, finger_joints, pad_boxes)

    tied = any(
        equality.type == mujoco.mjtEq.mjEQ_JOINT
        and {equality.name1, equality.name2} == set(finger_joints)
        for equality in spec.equalities
    )
    panda.add_actuators_and_sensors(spec, arm_joints, finger_joints, lever, tied=tied)
    grip = spec.actuator("grip")
    grip.biastype = mujoco.mjtBias.mjBIAS_AFFINE
    grip.biasprm[:2] = spring_line
    return LoadedArm(spec, finger_joints, lever)


def _arm_links(robot: str, spec: mujoco.MjSpec, arm_joints: list[str]) -> list[Any]:
    """Return the bodies from the base to the arm's last link.

    Raises:
        ModelError: The arm is not seven hinges on a fixed base, or it is not alone.
    """
    links = [spec.joint(arm_joints[-1]).parent]
    while links[0].parent != spec.worldbody:
        links.insert(0, links[0].parent)

    chain = [joint for body in links for joint in body.joints]
    if [j.name for j in chain] != arm_joints or any(j.type != _HINGE for j in chain):
        present = ", ".join(f"{j.name or 'unnamed'} ({j.type.name[6:].lower()})" for j in chain)
        raise ModelError(
            f"{robot} needs seven hinges in a row on a base that stands still; "
            f"on the way are: {present}"
        )

    hand_joints = [joint.name for joint in links[-1].find_all(_JOINT)]
    own = {*arm_joints, *hand_joints}
    others = [
        joint.name or "unnamed"
        for joint in spec.joints
        if joint.name not in own and joint.type != _FREE
    ]
    if others:
        raise ModelError(
            f"{robot} needs one arm with one hand alone; it also has the joints {', '.join(others)}"
        )
    return links


def _recognise_hand(robot: str, last_link: Any) -> tuple[KnownHand, list[str]]:
    """Return the hand and the joints that drive it, found beyond the arm's last link.

    Raises:
        ModelError: There is no known hand, or there are two.
    """
    present = [joint.name for joint in last_link.find_all(_JOINT) if joint.parent != last_link]
    found = [
        hand for hand in _KNOWN_HANDS if all(set(names) & set(present) for names in hand.joints)
    ]
    if len(found) != 1:
        known = "; ".join(
            f"{hand.name} has {', '.join(names[0] for names in hand.joints)}"
            for hand in _KNOWN_HANDS
        )
        raise ModelError(
            f"{robot} has {'two hands' if found else 'no hand that we know'}: {known}; "
            f"the joints beyond its arm are: {', '.join(present) or 'none'}"
        )
    hand = found[0]
    return hand, [next(name for name in names if name in present) for names in hand.joints]


def _pad_boxes(robot: str, body: Any) -> list[str]:
    """Return the names of a pad's boxes; boxes without a name get one.

    Raises:
        ModelError: There are no boxes.
    """
    boxes = [geom for geom in body.geoms if geom.type == _BOX]
    if not boxes:
        present = ", ".join(geom.type.name[7:].lower() for geom in body.geoms)
        raise ModelError(
            f"{robot} needs a box as the pad of {body.name!r}; its geoms are: {present or 'none'}"
        )
    for i, box in enumerate(boxes):
        box.name = box.name or f"{body.name}_box{i}"
    return [box.name for box in boxes]


def _clear(spec: mujoco.MjSpec, base: Any, *, keep_linkage: bool) -> None:
    """Leave the arm alone in the world, without collisions, gravity and options of its own."""
    world = spec.worldbody
    own_names = {"tip", *PAD_NAMES, *panda.ARM_JOINTS}
    linkage = () if keep_linkage else (*spec.equalities, *spec.tendons)
    removed = [
        *spec.actuators,
        *spec.sensors,
        *spec.keys,
        *spec.pairs,
        *linkage,
        *world.geoms,
        *world.sites,
        *world.cameras,
        *world.lights,
        *(body for body in world.bodies if body != base),
        *(site for site in base.find_all(mujoco.mjtObj.mjOBJ_SITE) if site.name in own_names),
    ]
    for element in removed:
        spec.delete(element)

    for i, body in enumerate(spec.bodies[1:]):
        body.name = body.name or f"body{i}"
        body.gravcomp = 1
    for geom in spec.geoms:
        geom.contype = 0
        geom.conaffinity = 0
        if geom.name in _CLASHING_NAMES:
            geom.name = ""

    fresh = mujoco.MjSpec()
    for name in dir(fresh.option):
        if not name.startswith("_"):
            setattr(spec.option, name, getattr(fresh.option, name))
    for element, names in _RESET_DEFAULTS.items():
        target = getattr(spec.default, element)
        source = getattr(fresh.default, element)
        for name in names:
            setattr(target, name, getattr(source, name))
    spec.compiler.autolimits = True
    spec.compiler.fusestatic = False


def _set_joint_limits(spec: mujoco.MjSpec, arm_joints: list[str]) -> None:
    """Set the published limits of the arm's joints."""
    for name, low, high in zip(arm_joints, panda.JOINT_LOW, panda.JOINT_HIGH, strict=True):
        joint = spec.joint(name)
        joint.range = np.array([low, high]) / _angle_unit(spec)
        joint.limited = mujoco.mjtLimited.mjLIMITED_TRUE
        joint.actfrclimited = mujoco.mjtLimited.mjLIMITED_FALSE
        joint.actgravcomp = False


def _angle_unit(spec: mujoco.MjSpec) -> float:
    """Return the model's unit of angles, rad."""
    return float(np.pi / 180 if spec.compiler.degree else 1.0)


def _measure_hand(
    robot: str,
    spec: mujoco.MjSpec,
    hand: KnownHand,
    finger_joints: list[str],
    pad_boxes: list[list[str]],
) -> HandMeasures:
    """Measure the hand from stop to stop, and give it our sites, collisions and resistance.

    Raises:
        ModelError: The hand does not open.
    """
    bare = spec.copy()
    strip(bare)
    model = compile_spec(bare)
    _freeze_inertias(spec, model)

    # the hand at angles from stop to stop
    low, high = model.joint(finger_joints[0]).range
    angles = np.linspace(low, high, _MEASURED_ANGLES)
    settled = [_settle(model, finger_joints, angle) for angle in angles]
    distances = [
        np.linalg.norm(np.subtract(*(data.geom(boxes[0]).xpos for boxes in pad_boxes)))
        for data in settled
    ]
    axes = _tip_axes(settled[int(np.argmax(distances))], pad_boxes)
    opening = np.array([_pad_geometry(data, axes, pad_boxes).opening for data in settled])
    if np.ptp(opening) < 0.02:
        raise ModelError(
            f"{robot}: its hand opens by {np.ptp(opening):.3g} m "
            f"over the range of joint {finger_joints[0]!r}"
        )

    # the angles at which it is shut and half open
    by_opening = np.argsort(opening)
    shut, half_open = np.interp([0, opening.max() / 2], opening[by_opening], angles[by_opening])
    widest = angles[by_opening[-1]]
    closing = -np.gradient(opening, angles) / 2
    lever = round(float(np.interp(half_open, angles, closing)), 5)

    # its springs, as a force on the driven joints: by virtual work, Jᵀ f
    jacobian = np.gradient(np.array([data.qpos for data in settled]), angles, axis=0)
    springs = (jacobian * np.array([data.qfrc_spring for data in settled])).sum(1) / 2
    slope, offset = np.polyfit(2 * angles, springs, 1)
    spring_line = -np.array([offset, slope])

    for name in finger_joints:
        joint = spec.joint(name)
        unit = _angle_unit(spec) if joint.type == _HINGE else 1.0
        joint.range = np.sort([shut, widest]) / unit
        panda.set_finger_resistance(joint, lever)
    data = _settle(model, finger_joints, half_open)
    _add_sites_and_collisions(spec, hand, finger_joints, pad_boxes, data, axes)
    return HandMeasures(lever, spring_line)


def _freeze_inertias(spec: mujoco.MjSpec, model: mujoco.MjModel) -> None:
    """Write down inertias that follow from geoms, so that geoms for show can be left out."""
    for body in spec.bodies[1:]:
        if not body.explicitinertial:
            compiled = model.body(body.name)
            body.explicitinertial = True
            body.mass = compiled.mass[0]
            body.inertia = compiled.inertia
            body.ipos = compiled.ipos
            body.iquat = compiled.iquat


def _settle(model: mujoco.MjModel, finger_joints: list[str], angle: float) -> mujoco.MjData:
    """Hold the arm at ``panda.READY_POSE`` and turn the hand's joints to an angle.

    The linkage follows, as the physics runs without gravity.
    """
    model.opt.gravity = 0
    model.opt.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    data = mujoco.MjData(model)
    driven = [int(model.joint(joint).qposadr[0]) for joint in finger_joints]
    held = [*range(7), *driven]
    first = data.qpos[driven]
    for i in range(_SETTLING_STEPS):
        share = min(2 * i / _SETTLING_STEPS, 1.0)
        data.qpos[:7] = panda.READY_POSE
        data.qpos[driven] = first + (angle - first) * share
        data.qvel[held] = 0
        mujoco.mj_step(model, data)
    data.qpos[:7] = panda.READY_POSE
    data.qpos[driven] = angle
    mujoco.mj_forward(model, data)
    return data


def _tip_axes(data: mujoco.MjData, pad_boxes: list[list[str]]) -> Floats:
    """Return the tip's axes as columns: across, from the right pad to the left, and outwards.

    ``pad_boxes`` is put into this order, the right pad's boxes first.
    """
    right, left = (data.geom(boxes[0]).xpos for boxes in pad_boxes)
    last_link = data.body(data.model.jnt_bodyid[6])
    to_pads = np.mean([right, left], 0) - last_link.xpos
    outwards = data.xaxis[6] * np.sign(to_pads @ data.xaxis[6])
    to_left = left - right
    to_left -= outwards * (outwards @ to_left)

    # a hand turned by half is the same hand: its left is where the wrist can turn as far as ours
    wrist_y = last_link.xmat.reshape(3, 3)[:, 1]
    if to_left @ wrist_y < -1e-6:
        to_left *= -1
        pad_boxes.reverse()
    to_left /= np.linalg.norm(to_left)
    return np.stack([np.cross(to_left, outwards), to_left, outwards], 1)


def _pad_geometry(data: mujoco.MjData, axes: Floats, pad_boxes: list[list[str]]) -> PadGeometry:
    """Measure the pads along the tip's axes.

    A pad is those of its boxes that reach furthest inwards, within 2 mm, as one box.
    """
    face_centres = []
    half_sizes = []
    for sign, boxes in zip((-1, 1), pad_boxes, strict=True):
        centres = np.array([axes.T @ data.geom(name).xpos for name in boxes])
        extents = np.array([_half_extent(data, axes, name) for name in boxes])
        inner = sign * centres[:, 1] - extents[:, 1]
        chosen = inner < inner.min() + 0.002
        low = (centres - extents)[chosen].min(0)
        high = (centres + extents)[chosen].max(0)
        face_centres.append([(low[0] + high[0]) / 2, sign * inner.min(), (low[2] + high[2]) / 2])
        half_sizes.append((high - low) / 2)
    return PadGeometry(np.array(face_centres), np.array(half_sizes))


def _half_extent(data: mujoco.MjData, axes: Floats, name: str) -> Floats:
    """Return how far a box extends from its centre along the axes, m, ``(3,)``."""
    rotation = np.abs(axes.T @ data.geom(name).xmat.reshape(3, 3))
    extent: Floats = rotation @ data.model.geom(name).size
    return extent


def _add_sites_and_collisions(
    spec: mujoco.MjSpec,
    hand: KnownHand,
    finger_joints: list[str],
    pad_boxes: list[list[str]],
    data: mujoco.MjData,
    axes: Floats,
) -> None:
    """Add sites at the tip and at the pads' faces, and geoms that collide.

    These are a palm, and for each pad one box instead of its boxes.
    """
    pads = _pad_geometry(data, axes, pad_boxes)
    base = spec.joint(finger_joints[0]).parent.parent

    # the tip is between the pads, as near to their ends as ours
    tip = pads.centres.mean(0)
    pads_end = (pads.centres + pads.half_sizes)[:, 2].max()
    tip[2] = max(tip[2], pads_end - panda.PAD_HALF_SIZE[2])
    _place(base.add_site(name="tip", size=[0.005, 0, 0]), data, axes, axes @ tip)

    root = np.mean([data.joint(joint).xanchor for joint in finger_joints], 0)
    palm = base.add_geom(name="palm", type=_BOX, size=hand.palm_half_size)
    _place(palm, data, axes, root + hand.palm_offset * axes[:, 2])

    colliding = [palm]
    for i, sign in enumerate((-1, 1)):
        finger = spec.geom(pad_boxes[i][0]).parent
        centre = pads.centres[i]
        half = pads.half_sizes[i]
        # the site encloses the pad's face: a touch sensor counts the contacts within
        size = [half[0] + 0.003, panda.PAD_HALF_SIZE[1], half[2] + 0.003]
        site = finger.add_site(name=PAD_NAMES[i], type=_BOX, size=size, rgba=[0, 0, 0, 0])
        _place(site, data, axes, axes @ centre)
        pad = finger.add_geom(name=PAD_NAMES[i], type=_BOX, size=half)
        _place(pad, data, axes, axes @ (centre + np.array([0, sign * half[1], 0])))
        colliding.append(pad)

    for geom in colliding:
        geom.mass = 0
        geom.contype = 2
        geom.conaffinity = 1
        geom.priority = 0
        geom.margin = 0
        geom.gap = 0
        geom.group = 3  # not shown


def _place(element: Any, data: mujoco.MjData, axes: Floats, position: Floats) -> None:
    """Place an element in its body, given its axes and its position in the world."""
    body = data.body(element.parent.name)
    to_body = body.xmat.reshape(3, 3).T
    quat = np.zeros(4)
    mujoco.mju_mat2Quat(quat, (to_body @ axes).ravel())
    element.pos = to_body @ (position - body.xpos)
    element.quat = quat
