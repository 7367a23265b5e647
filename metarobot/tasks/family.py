"""What a task family is: a robot, what varies, and what is observed and rewarded, as one frozen
value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import mujoco
import numpy as np
import torch
from torch import Tensor

from metarobot.errors import MetarobotError
from metarobot.registry import Registry
from metarobot.tasks.space import TaskSpace
from metarobot.types import Floats


class WorldState(NamedTuple):
    """All worlds at one moment, ``(world, ...)``, float64, SI units."""

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
    statistics: Tensor = torch.zeros(0, 0).double()
    """What the family's ``Tally`` keeps of the episode so far, ``(world, tallies)``."""
    variant: Tensor = torch.zeros(0, dtype=torch.int64)
    """Which of the family's ``variants`` the episode is, ``(world,)``."""
    derived: Any = None
    """What the family's ``sense`` made of the moment."""


@dataclass(frozen=True, kw_only=True)
class ActionController:
    """A controller between actions and drives, run once a control step."""

    actions: tuple[str, ...]
    """One name an element of the action, each in [−1, 1]."""
    targets: Callable[[WorldState, Tensor, Tensor], Tensor]
    """(state, action ``(world, act)``, the drives' targets so far ``(world, drives)``) -> their
    targets now."""
    rest: Callable[[Tensor], Tensor]
    """Joint positions at an episode's start -> the targets that hold them; each drive lags and
    starts there too."""


@dataclass(frozen=True, kw_only=True)
class EpisodeStatistics:
    """Numbers kept through an episode, for what one moment does not show: how long something has
    been held.
    """

    size: int
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
    """What drives the real robot must be told; one value a joint, in the order of the action."""

    joints: tuple[str, ...]
    stiffness: tuple[float, ...]
    """Gains of the drives' position loops, N·m/rad."""
    damping: tuple[float, ...]
    """Gains of their velocity loops, N·m·s/rad."""
    pose: tuple[float, ...]
    """Joint angles that an action of zero asks for, rad."""
    scale: tuple[float, ...]
    """How far from there an action of 1 moves the target, rad."""
    position: tuple[tuple[float, float], ...]
    """Lowest and highest angle, rad."""
    velocity: tuple[float, ...]
    """Highest speed, rad/s."""
    torque: tuple[float, ...]
    """Highest torque, N·m."""
    commands: tuple[str, ...] = ()
    """Observations that an operator sets."""
    sensors: LeggedSensors | None = None
    """What a legged robot measures; the simulated robot needs it."""
    reward: Mapping[str, Any] = field(default_factory=dict)
    """What a robot needs to compute its reward from its own signals, as JSON data with a ``kind``;
    nothing if it cannot."""


@dataclass(frozen=True, kw_only=True)
class Interaction:
    """How the robot is acted on and what an episode keeps track of, where the plain defaults do not
    do.
    """

    controller: ActionController | None = None
    """How actions become actuator targets; None if they are these targets."""
    statistics: EpisodeStatistics | None = None
    """What is kept of the episode so far."""
    variants: int = 1
    """In how many variants the episodes of a task come, as when one of several objects is
    presented; each episode's variant is drawn at its start."""
    terminate: Callable[[WorldState], Tensor] | None = None
    """State -> ``(world,)``, true where the episode has failed; None if it never does."""
    noise: tuple[float, ...] = ()
    """Each observation's noise, uniform within ± this; none if empty."""
    derive: Callable[[WorldState], Any] | None = None
    """State -> what several of the family's functions need, computed once and kept as
    ``WorldState.derived``."""
    edit_spec: Callable[[mujoco.MjSpec, Mapping[str, float]], None] | None = None
    """Writes the parameters marked ``edits_spec`` into the model; sets all that it touches,
    whatever it holds."""


@dataclass(frozen=True, kw_only=True)
class Teaching:
    """What a simulator knows and a robot does not, for training only."""

    expert: Callable[[WorldState], Tensor] | None = None
    """State -> the action ``(world, act)`` of a program that is told the task; None if nobody wrote
    one."""
    teacher_action: Callable[[WorldState], Tensor] | None = None
    """State -> the action to distil from, ``(world, act)``, NaN where nothing is known; None if it
    is the expert's."""
    critic_observe: Callable[[WorldState], Tensor] | None = None
    """State -> what the critic sees in training beside the observation, ``(world, critic)``."""


@dataclass(frozen=True, kw_only=True)
class Display:
    """What pictures and films show."""

    readout: Callable[[WorldState, WorldState, float], dict[str, Tensor]] = field(
        default=lambda *_: {}
    )
    """(before, after, control period in s) -> quantities that a film shows, "name unit" ->
    ``(world,)``."""
    highlight: Callable[[Mapping[str, float]], Iterable[str]] = field(default=lambda _: ())
    """Task values by name -> names of the bodies to draw in red: what is broken."""
    view: tuple[tuple[float, float, float], float] | None = None
    """Centre and radius of the scene, m; None follows the whole robot."""


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """The real robot behind the family."""

    hardware: Callable[[], Hardware] | None = None
    """What the real robot's drives must be told; None if no real robot is like this one."""
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
        groups = {}
        for name in ("interaction", "teaching", "display", "deployment"):
            group = changes.pop(name, getattr(self, name))
            own = {f.name: changes.pop(f.name) for f in fields(group) if f.name in changes}
            groups[name] = replace(group, **own)
        return replace(self, **changes, **groups)


families: Registry[Family] = Registry("family", "metarobot.families")
"""Name -> ``Family``."""


def family_on(name: str, robot: str = "") -> Family:
    """Return the family of that name, on its own robot or on another: a path to an MJCF, or
    ``menagerie:name``.
    """
    family: Family = families.get(name)
    if not robot:
        return family
    if family.deployment.on_robot is None:
        raise MetarobotError(f"{name} has no other robot than its own; leave --robot out")
    return family.deployment.on_robot(robot)
