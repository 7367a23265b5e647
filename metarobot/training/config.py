"""The configuration of a training: what to train, on which machine, for how long."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Protocol, runtime_checkable

import torch
from tyro.conf import Positional
from tyro.constructors import PrimitiveConstructorSpec

from metarobot.config_bounds import Bounds, Count, CountOrZero, NonNegative, check_bounds
from metarobot.env.factory import SIMS
from metarobot.errors import MetarobotError
from metarobot.learning.agent_interface import agents
from metarobot.tasks.family import family_on

DEVICES = ("cpu", "cuda")

LARGEST_COUNT = 1e15
"""Larger floats do not hold every whole number."""


def whole_number(text: str) -> int:
    """Read a whole number that may be written as a float, such as ``2e6``.

    A number that is not finite or too large gives -1, which no count allows.
    """
    value = float(text)
    return int(value) if abs(value) < LARGEST_COUNT else -1


WHOLE_NUMBER_FLAG = PrimitiveConstructorSpec[int](
    nargs=1,
    metavar="FLOAT",
    instance_from_str=lambda words: whole_number(words[0]),
    is_instance=lambda value: isinstance(value, int),
    str_from_instance=lambda value: [str(value)],
)
"""Tells tyro to read a flag with ``whole_number``."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What to train, and where; an agent's own settings are in its own configuration class.

    The fields are the flags of ``metarobot train`` and the entries of a run's ``config.json``.
    """

    family: Positional[str]
    """Task family; ``metarobot families`` lists them."""
    agent: str = "rl2"
    """Kind of agent; ``metarobot agents`` lists them."""
    robot: str = ""
    """Another model of the family's robot: a path to an MJCF, or menagerie:name."""
    init: str = ""
    """Run folder or name of a policy without memory to start from: an agent trained as ppo or
    blind."""
    demos: str = ""
    """Minari dataset to imitate, for ``--agent imitation``; ``metarobot record`` makes them."""
    steps: Annotated[int, Bounds(1), WHOLE_NUMBER_FLAG] = 2_000_000
    """Environment steps to train for; with ``--resume``, what the run was started with if not
    given."""
    seed: CountOrZero = 0
    """The same seed, settings and thread count give the same weights."""
    device: str = "cpu"
    """Where learning happens, cpu or cuda; with ``--resume``, where it did if not given."""
    sim: str = ""
    """What simulates, cpu or warp (MuJoCo Warp, on the device); if not given, warp with
    ``--device cuda`` where it is installed and runs the family, else cpu."""
    pool: CountOrZero = 0
    """On Warp, how many training tasks there are, if each has a model of its own; 0 is 4,096."""
    threads: CountOrZero = 0
    """CPU threads; 0 takes all there are."""
    save_every: Count = 20
    """Iterations between checkpoints."""
    save_every_s: NonNegative = 60.0
    """Seconds after which a checkpoint is also written, so that a kill costs no more."""


CHANGEABLE_ON_RESUME = ("device", "sim")
"""Settings that may change when a run is continued: where it is simulated and learned."""
HARMLESS_SETTINGS = ("threads", "save_every", "save_every_s")
"""Settings that may also change then; of another count of threads a line warns."""
KEPT_ON_RESUME = ("steps", "device")
"""Settings that a continued run takes from its folder unless they are given."""


# What training reads of an agent's configuration. Every one has worlds and episodes; the rest is
# declared by small protocols and asked for with isinstance.


class AgentConfig(Protocol):
    """The settings that every agent's configuration class has."""

    @property
    def worlds(self) -> int:
        """Worlds simulated side by side."""

    @property
    def episodes(self) -> int:
        """Episodes of a trial."""


@runtime_checkable
class HasRollouts(Protocol):
    """The configuration of an agent that adapts to several worlds of a task at once."""

    @property
    def rollouts(self) -> int:
        """Worlds of one task."""


@runtime_checkable
class DistilsTeacher(Protocol):
    """The configuration of an agent that can imitate the family's teacher while it learns."""

    @property
    def teach(self) -> float:
        """Weight of the distillation loss; 0 asks for no teacher."""


def rollouts_of(agent_config: AgentConfig) -> int:
    """Return how many worlds of a task the agent adapts to at once."""
    return agent_config.rollouts if isinstance(agent_config, HasRollouts) else 1


def needs_teacher(agent_config: AgentConfig) -> bool:
    """Return whether the agent learns from the actions of the family's teacher."""
    return isinstance(agent_config, DistilsTeacher) and agent_config.teach > 0


def resolve_paths(config: TrainConfig) -> TrainConfig:
    """Make paths absolute, so that a run folder can be opened from another working directory."""
    if config.robot and Path(config.robot).exists():
        config = replace(config, robot=str(Path(config.robot).resolve()))
    if config.demos:
        config = replace(config, demos=str(Path(config.demos).resolve()))
    return config


def check_config(config: TrainConfig) -> None:
    """Check settings before anything is built.

    Raises:
        MetarobotError: A setting that cannot work, or does not fit the agent or this machine.
    """
    # Unknown names first: the other checks need what they name.
    family_on(config.family, config.robot)
    kind = agents.get(config.agent)
    check_bounds(config)

    # Demonstrations go with the agents that imitate, and with no other.
    if kind.imitates and not config.demos:
        raise MetarobotError(
            f"agent {config.agent!r} needs --demos, a dataset that metarobot record makes"
        )
    if config.demos and not kind.imitates:
        raise MetarobotError(
            f"agent {config.agent!r} learns from its own trials; leave --demos out"
        )

    # Agents with a loop of their own, such as Stable-Baselines3's, run on the CPU.
    has_own_loop = kind.fit is not None
    if config.device not in DEVICES:
        raise MetarobotError(f"no device called {config.device!r}; there are: {', '.join(DEVICES)}")
    if config.device != "cpu" and has_own_loop:
        raise MetarobotError(f"agent {config.agent!r} learns on the CPU; leave --device out")
    if config.sim == "warp" and (kind.imitates or has_own_loop):
        raise MetarobotError(
            f"agent {config.agent!r} does not collect trials on Warp; leave --sim out"
        )
    if config.sim not in ("", *SIMS):
        raise MetarobotError(f"no simulator called {config.sim!r}; there are: {', '.join(SIMS)}")
    if config.device == "cuda" and not torch.cuda.is_available():
        why = (
            "torch finds no CUDA device here"
            if torch.version.cuda
            else "this torch is built without CUDA"
        )
        raise MetarobotError(f"--device cuda was asked for, but {why}; use --device cpu")
