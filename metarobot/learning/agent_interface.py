"""What an agent is, for everything that uses one: three verbs over a context."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from metarobot.errors import MetarobotError
from metarobot.registry import Registry
from metarobot.types import Percept, Rollout, Trials

Context = tuple[Tensor, ...]
"""All that an agent carries from step to step and from episode to episode: tensors ``(task, ...)``.

Where a task has one world, as for agents with a memory, that is the world axis too."""


@dataclass(frozen=True, kw_only=True)
class Dimensions:
    """Sizes of what an agent sees and does."""

    obs: int
    act: int
    task: int
    """Length of the task's encoding; only privileged agents and training losses see it."""
    episodes: int
    """Episodes a trial."""
    critic: int = 0
    """Length of what only a critic in training is shown beside the observation."""
    horizon: int = 0
    """Steps an episode lasts at most, for agents that keep what was lived."""
    low: tuple[float, ...] = ()
    """Each action's lower bound; −1 if empty."""
    high: tuple[float, ...] = ()
    """Each action's upper bound; 1 if empty."""


TrainingStep = Callable[[int, float, int], tuple[int, dict[str, float]]]
"""What training does again and again: (iteration, progress in [0, 1), seed) -> steps lived and metrics."""


class Agent(Protocol):
    """A meta-learner at work. Kinds of meta-learner differ only in what their context is.

    An agent may also name its context's tensors, ``context_names``; robots know them by these. One that infers a
    Gaussian over tasks shows it: ``posterior(context)``, mean and variance over latent tasks ``(task, latent)``, and
    ``belief(context)``, what that says of the task's encoding, ``(task, parameter)``.
    """

    privileged: bool
    """Whether the agent is shown the task: an oracle, never a result."""
    explores: bool
    """Whether the agent needs its exploration noise to adapt, when it is tested too.

    An agent may also have ``noise_dim``: how many numbers of noise ``act`` takes, if not one an action."""

    def begin(self, worlds: int, task: Tensor | None = None) -> Context:
        """Return the context of a new trial in each task; ``task`` ``(task, parameter)`` goes to oracles alone."""

    def act(self, percept: Percept, context: Context, noise: Tensor | None = None) -> tuple[Tensor, Context]:
        """Choose actions ``(world, act)``; ``noise``, standard normal of that shape, explores, None is the mean."""

    def adapt(self, context: Context, episode: Rollout) -> Context:
        """Learn from the episode just lived; pure: a new context comes out, the old one is left as it was."""


class Learner(Protocol):
    """Owns an agent's weights and turns collected trials into updates of them.

    A learner may also have ``warm_start(policy)``: begin as an agent without memory acts; and ``reserve_memory()``: take the memory
    that training needs, or refuse.
    """

    agent: Any
    """The agent, an ``nn.Module``."""

    def update(self, trials: Trials, progress: float, seed: int) -> dict[str, float]:
        """Learn from trials; ``progress`` in [0, 1) drives schedules. Return metrics under SB3's names."""

    def state(self) -> dict[str, Tensor]:
        """Return everything that the next update depends on, as flat named tensors."""

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what ``state`` returned, exactly."""


@dataclass(frozen=True, kw_only=True)
class AgentKind:
    """A registered algorithm: its configuration, and how a learner is built from it."""

    name: str
    doc: str
    config: type[Any]
    """Frozen dataclass; its defaults work. Holds at least ``worlds`` and ``episodes``, and ``rollouts``, the worlds of
    one task, if a task has more than one."""
    imitates: bool = False
    """Whether it learns from demonstrations, not from its own trials."""
    build: Callable[[Any, Dimensions], Learner]
    """(configuration, shapes) -> learner; initial weights come from torch's seeded generator."""
    fit: Callable[[Any, Any, int], TrainingStep] | None = None
    """(learner, family, threads) -> how it lives and learns by a loop of its own, on the CPU; None if trials are
    collected for it."""


agents: Registry[AgentKind] = Registry("agent", "metarobot.agents")
"""Name -> ``AgentKind``."""


def comparable_agents() -> tuple[str, ...]:
    """Name one agent of each sort that learns from its own trials and whose package is there."""
    chosen: dict[Any, str] = {}
    for name in agents.names():
        try:
            kind = agents.get(name)
        except MetarobotError:
            continue
        if not kind.imitates:  # ppo is blind by another name
            chosen.setdefault((kind.build, kind.config), name)
    return tuple(chosen.values())
