"""What an agent is, for everything that uses one: three verbs over a context."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

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
"""What training does again and again: (iteration, progress in [0, 1), seed) -> steps lived and
metrics."""


class Agent(Protocol):
    """A meta-learner at work. Kinds of meta-learner differ only in what their context is.

    What an agent may do beside this is declared by the protocols further down.
    """

    privileged: bool
    """Whether the agent is shown the task: an oracle, never a result."""
    explores: bool
    """Whether the agent needs its exploration noise to adapt, when it is tested too."""

    def begin(self, worlds: int, task: Tensor | None = None) -> Context:
        """Return the context of a new trial in each task; ``task`` ``(task, parameter)`` goes to
        oracles alone.
        """

    def act(
        self, percept: Percept, context: Context, noise: Tensor | None = None
    ) -> tuple[Tensor, Context]:
        """Choose actions ``(world, act)``; ``noise``, standard normal of that shape, explores, None
        is the mean.
        """

    def adapt(self, context: Context, episode: Rollout) -> Context:
        """Learn from the episode just lived; pure: a new context comes out, the old one is left as
        it was.
        """


class Learner(Protocol):
    """Own an agent's weights and turn collected trials into updates of them."""

    agent: Any
    """The agent, an ``nn.Module``."""

    def update(self, trials: Trials, progress: float, seed: int) -> dict[str, float]:
        """Learn from trials; ``progress`` in [0, 1) drives schedules. Return metrics under SB3's
        names.
        """

    def state(self) -> dict[str, Tensor]:
        """Return everything that the next update depends on, as flat named tensors."""

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what ``state`` returned, exactly."""


# What an agent or a learner may do beside the above: one small protocol each, asked for with
# isinstance.


@runtime_checkable
class DrawsNoise(Protocol):
    """An agent whose ``act`` takes another number of noise values than one per action."""

    noise_dim: int


@runtime_checkable
class NamesContext(Protocol):
    """An agent that names the tensors of its context; exported policies and robots know them by
    these names.
    """

    context_names: tuple[str, ...]


@runtime_checkable
class InfersPosterior(Protocol):
    """An agent that infers a Gaussian over tasks."""

    def posterior(self, context: Context) -> tuple[Tensor, Tensor]:
        """Return mean and variance over the latent task, ``(task, latent)`` each."""

    def belief(self, context: Context) -> tuple[Tensor, Tensor]:
        """Return mean and variance of the task's encoding, ``(task, parameter)`` each."""


@runtime_checkable
class FineTunes(Protocol):
    """An agent that adapts by gradient steps, from its own weights or from another policy's."""

    def fine_tuned_from(self, policy: Any, rate: float) -> Agent:
        """Return an agent that adapts as this one does, with one step size, from the weights of
        ``policy``.
        """


@runtime_checkable
class MeasuresDivergence(Protocol):
    """An agent that can say how far one set of policy weights is from another."""

    def batch(self, weights: Tensor, episode: Rollout) -> Any:
        """Prepare an episode; ``weights`` ``(task, P)`` are those that acted."""

    def divergence(self, weights: Tensor, batch: Any) -> Tensor:
        """Return the mean KL divergence of the policy that acted from that of ``weights``
        ``(P,)``.
        """


@runtime_checkable
class EmbedsTasks(Protocol):
    """An agent that embeds transitions in a space in which similar tasks are close."""

    bank: Any
    """Embeddings of training tasks, and the tasks they belong to."""

    def embed(self, episode: Rollout, steps: int = -1) -> Tensor:
        """Embed the first ``steps`` transitions of an episode, or all, ``(task, embedding)``."""


@runtime_checkable
class WarmStarts(Protocol):
    """A learner that can begin as a policy without memory acts."""

    def warm_start(self, policy: Any) -> None:
        """Initialise from a ``PPOAgent``."""


@runtime_checkable
class ReservesMemory(Protocol):
    """A learner that needs much memory, as for a replay, and takes it before training begins."""

    def reserve_memory(self) -> None:
        """Take the memory, or raise if there is not enough."""


@dataclass(frozen=True, kw_only=True)
class AgentKind:
    """A registered algorithm: its configuration, and how a learner is built from it."""

    name: str
    doc: str
    config: type[Any]
    """Frozen dataclass; its defaults work. Holds at least ``worlds`` and ``episodes``, and
    ``rollouts``, the worlds of one task, if a task has more than one."""
    imitates: bool = False
    """Whether it learns from demonstrations, not from its own trials."""
    build: Callable[[Any, Dimensions], Learner]
    """(configuration, shapes) -> learner; initial weights come from torch's seeded generator."""
    fit: Callable[[Any, Any, int], TrainingStep] | None = None
    """(learner, family, threads) -> how it lives and learns by a loop of its own, on the CPU; None
    if trials are collected for it."""


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
