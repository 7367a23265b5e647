"""Task families: a robot, what varies, and what is observed and rewarded, as one frozen value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import mujoco
import numpy as np

from metarobot.errors import MetarobotError
from metarobot.registry import Registry
from metarobot.tasks.space import TaskSpace
from metarobot.types import Floats

if TYPE_CHECKING:
    from torch import Tensor  # listing families does without torch


class WorldState(NamedTuple):
    """State of all worlds, ``(world, ...)``, in SI units: float64, on a GPU float32."""

    qpos: Tensor
    """Joint positions in generalised coordinates."""
    qvel: Tensor
    """Joint velocities in generalised coordinates."""
    sensors: Tensor
    """The model's sensors, one substep old; at an episode's start those of forces are zero."""
    action: Tensor
    """The clipped action that led here; zero at an episode's start."""
    task: Mapping[str, Tensor]
    """Task parameters by name, ``(world,)`` each."""
    statistics: Tensor = cast("Tensor", None)
    """The family's statistics of the episode so far, ``(world, statistic)``. Environments always
    give them; a state made by hand may leave them out."""
    variant: Tensor = cast("Tensor", None)
    """Which of the family's variants the episode is, ``(world,)``; as ``statistics``."""
    derived: Any = None
    """What the family's ``derive`` computed from the state."""


@dataclass(frozen=True, kw_only=True)
class ActionController:
    """A controller between actions and actuators, run once a control step."""

    actions: tuple[str, ...]
    """One name for each element of the action, which is in [−1, 1]."""
    targets: Callable[[WorldState, Tensor, Tensor], Tensor]
    """(state, action ``(world, act)``, the actuators' last targets ``(world, actuator)``) -> their
    targets now."""
    rest: Callable[[Tensor], Tensor]
    """Joint positions at an episode's start -> the targets that hold them. Actuators follow their
    targets with a lag, and begin there too."""


@dataclass(frozen=True, kw_only=True)
class EpisodeStatistics:
    """Numbers kept through an episode, as how long an object has been held.

    They are for what a single state does not show.
    """

    size: int
    """Number of statistics."""
    begin: Callable[[WorldState], Tensor]
    """State at an episode's start -> the statistics, ``(world, size)``."""
    update: Callable[[WorldState, WorldState], Tensor]
    """(state before, state after) -> the statistics after, ``(world, size)``."""


@dataclass(frozen=True, kw_only=True)
class LeggedSensors:
    """What a legged robot measures itself, as names of the family's observations and MJCF sensors.

    The simulated robot of ``metarobot.deploy`` publishes these, so it needs no knowledge of any
    particular robot. Joints are in the order of ``Hardware.joints``.
    """

    gravity: tuple[str, ...]
    """Observations: direction of gravity in the trunk's frame, x, y, z."""
    gyro: tuple[str, ...]
    """Observations: angular velocity in the trunk's frame, x, y, z, rad/s."""
    joint_position: tuple[str, ...]
    """Observations: one a joint, rad, from the default pose."""
    joint_velocity: tuple[str, ...]
    """Observations: one a joint, rad/s."""
    joint_torque: tuple[str, ...]
    """Sensors of the model: one a joint, N·m."""
    foot_force: Mapping[str, str]
    """Leg -> the model's sensor of the force on its foot, N."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Settings of the real robot's actuators: one value a joint, in the order of the action."""

    joints: tuple[str, ...]
    stiffness: tuple[float, ...]
    """Gains of the actuators' position loops, N·m/rad."""
    damping: tuple[float, ...]
    """Gains of their velocity loops, N·m·s/rad."""
    pose: tuple[float, ...]
    """Joint angles that an action of 0 commands, rad."""
    scale: tuple[float, ...]
    """How far from there an action of 1 moves the target, rad."""
    position: tuple[tuple[float, float], ...]
    """Lowest and highest angle, rad."""
    velocity: tuple[float, ...]
    """Highest speed, rad/s."""
    torque: tuple[float, ...]
    """Highest torque, N·m."""
    commands: tuple[str, ...] = ()
    """Names of the observations that an operator sets."""
    sensors: LeggedSensors | None = None
    """What a legged robot measures; the simulated robot needs it."""
    reward: Mapping[str, Any] = field(default_factory=dict)
    """What a robot needs to compute its reward from its own signals, as JSON data with a ``kind``;
    nothing if it cannot."""


@dataclass(frozen=True, kw_only=True)
class Interaction:
    """How actions act on the robot, how episodes end, and what is kept during one."""

    controller: ActionController | None = None
    """How actions become actuator targets; None if they are these targets."""
    statistics: EpisodeStatistics | None = None
    """Numbers kept through an episode; None if the state shows everything."""
    variants: int = 1
    """Number of variants of an episode, as when one of several objects is presented. Each
    episode's variant is drawn at its start."""
    terminate: Callable[[WorldState], Tensor] | None = None
    """State -> ``(world,)``, true where the episode has failed; None if it never does."""
    noise: tuple[float, ...] = ()
    """Amplitude of each observation's uniform noise; empty if there is none."""
    derive: Callable[[WorldState], Any] | None = None
    """State -> what several of the family's functions need, computed once for all of them and
    kept as ``WorldState.derived``."""
    edit_spec: Callable[[mujoco.MjSpec, Mapping[str, float]], None] | None = None
    """(spec, task values by name): writes the parameters marked ``edits_spec`` into the spec. It is
    called for one task after another, so it must set everything that it ever changes."""


@dataclass(frozen=True, kw_only=True)
class Teaching:
    """Privileged information of the simulator, for training alone."""

    expert: Callable[[WorldState], Tensor] | None = None
    """State -> action ``(world, act)`` of a scripted policy that reads the task; None if there is
    none."""
    teacher_action: Callable[[WorldState], Tensor] | None = None
    """State -> action to distil from, ``(world, act)``, NaN where none is known; None if it is the
    expert's."""
    critic_observe: Callable[[WorldState], Tensor] | None = None
    """State -> what the critic sees in addition to the observation, ``(world, critic)``."""


@dataclass(frozen=True, kw_only=True)
class Display:
    """What pictures and films show."""

    readout: Callable[[WorldState, WorldState, float], dict[str, Tensor]] = field(
        default=lambda *_: {}
    )
    """(state before, state after, control period in s) -> quantities that a film shows, "name
    unit" -> ``(world,)``."""
    highlight: Callable[[Mapping[str, float]], Iterable[str]] = field(default=lambda _: ())
    """Task values by name -> names of the bodies to draw in red, as those that are broken."""
    view: tuple[tuple[float, float, float], float] | None = None
    """Centre and radius of the scene, m; None follows the whole robot."""


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """The real robot behind the family."""

    hardware: Callable[[], Hardware] | None = None
    """Settings of the real robot's actuators; None if there is no such robot."""
    on_robot: Callable[[str], Family] | None = None
    """The same family with another model of its robot: a path to an MJCF, or ``menagerie:name``."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A task family: a robot, what varies, and what is observed and rewarded.

    Eleven required fields describe a first family; ``docs/families.md`` walks through one. All
    functions take and return batches, with the world axis first. The groups are optional.
    """

    name: str
    doc: str
    """One sentence: what the agent must find out."""
    space: TaskSpace
    """What varies from task to task."""
    horizon: int
    """Control steps an episode lasts at most."""
    substeps: int
    """Physics steps in a control step."""
    spec: Callable[[], mujoco.MjSpec]
    """Builds the nominal robot and its surroundings."""
    observations: tuple[str, ...]
    """One name for each element of the observation, with its unit."""
    observe: Callable[[WorldState], Tensor]
    """State -> observation ``(world, obs)``, without noise."""
    reward: Callable[[WorldState, WorldState, float], dict[str, Tensor]]
    """(state before, state after, control period in s) -> reward terms, name -> ``(world,)``."""
    weights: Mapping[str, float]
    """Reward term -> its weight in the sum; the same names as ``reward`` returns."""
    start: Callable[[np.random.Generator, mujoco.MjModel], tuple[Floats, Floats]]
    """Draws the initial ``qpos`` and ``qvel`` of one world."""
    interaction: Interaction = Interaction()
    teaching: Teaching = Teaching()
    display: Display = Display()
    deployment: Deployment = Deployment()

    def replace(self, **changes: Any) -> Family:
        """Return a copy with other values; fields of the groups may be named directly.

        ``family.replace(horizon=100, terminate=None)`` changes the horizon and
        ``interaction.terminate``.

        Raises:
            TypeError: A field that neither the family nor a group has.
        """
        # Fields of a group are taken out of the changes; what remains is the family's own.
        groups = {}
        for name in ("interaction", "teaching", "display", "deployment"):
            group = changes.pop(name, getattr(self, name))
            own = {f.name: changes.pop(f.name) for f in fields(group) if f.name in changes}
            groups[name] = replace(group, **own)
        return replace(self, **changes, **groups)


families: Registry[Family] = Registry("family", "metarobot.families")
"""Name -> ``Family``."""


def family_on(name: str, robot: str = "") -> Family:
    """Return the family of that name, on its own robot or on another.

    Args:
        name: Registered name of the family.
        robot: Path to an MJCF, or ``menagerie:name``; empty for the family's own robot.

    Raises:
        MetarobotError: No such family, or one that runs on no other robot.
    """
    family: Family = families.get(name)
    if not robot:
        return family
    if family.deployment.on_robot is None:
        raise MetarobotError(f"{name} has no other robot than its own; leave --robot out")
    return family.deployment.on_robot(robot)
