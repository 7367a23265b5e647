"""The interface of an agent: three verbs over a context, and what an agent may declare beyond them.

``docs/agents.md`` explains it for authors of agents outside this package, with an example.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from metarobot.errors import MetarobotError
from metarobot.learning.networks import RunningNorm
from metarobot.registry import Registry
from metarobot.types import Percept, Rollout, Trials

Context = tuple[Tensor, ...]
"""All that an agent carries from step to step and from episode to episode: tensors ``(task, ...)``.

For agents with a memory each task has one world, so the leading axis is the world axis too."""


@dataclass(frozen=True, kw_only=True)
class Dimensions:
    """Sizes of what an agent observes and does."""

    obs: int
    """Length of the observation."""
    act: int
    """Number of actuators."""
    task: int
    """Length of the encoded task; only privileged agents and training losses observe it."""
    episodes: int
    """Episodes per trial."""
    critic: int = 0
    """Length of what only the critic observes, in training, beside the observation."""
    horizon: int = 0
    """Control steps of an episode, at most; for agents that store episodes."""
    low: tuple[float, ...] = ()
    """Lower bound of each action; −1 if empty."""
    high: tuple[float, ...] = ()
    """Upper bound of each action; 1 if empty."""


# ---------------------------------------------------------------------------------------------
# What every agent and every learner has
# ---------------------------------------------------------------------------------------------


class Agent(Protocol):
    """A meta-learner at work. Kinds of meta-learner differ only in what their context is.

    What an agent can do beyond this is declared by the protocols further down.
    """

    privileged: bool
    """Whether the agent observes the task: an oracle, a reference and never a result."""
    explores: bool
    """Whether the agent needs its exploration noise to adapt, also when it is evaluated."""

    def begin(self, worlds: int, task: Tensor | None = None) -> Context:
        """Return the context at the start of a trial.

        Args:
            worlds: Number of tasks.
            task: Encoded tasks ``(task, parameter)``, given to privileged agents alone.
        """

    def act(
        self, percept: Percept, context: Context, noise: Tensor | None = None
    ) -> tuple[Tensor, Context]:
        """Choose an action in every world; return actions ``(world, act)`` and the new context.

        Args:
            percept: What the agent is shown at this step.
            context: The context so far.
            noise: Standard normal noise ``(world, act)`` for exploration; None acts on the mean.
        """

    def adapt(self, context: Context, episode: Rollout) -> Context:
        """Return the context after learning from an episode; the old context is not modified."""


@runtime_checkable
class Stateful(Protocol):
    """Something whose state can be saved and restored exactly."""

    def state(self) -> dict[str, Tensor]:
        """Return everything that the next update depends on, as flat named tensors."""

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore exactly what ``state`` returned."""


class Learner(Stateful, Protocol):
    """Owns an agent's weights and turns collected trials into updates of them."""

    agent: Any
    """The agent: an ``nn.Module`` that satisfies ``Agent``."""

    def update(self, trials: Trials, progress: float, seed: int) -> dict[str, float]:
        """Update the weights from collected trials.

        Args:
            trials: The trials of this iteration.
            progress: Fraction of training that is done, in [0, 1); schedules follow it.
            seed: Seed of everything random in this update.

        Returns:
            Metrics, under Stable-Baselines3's names where they exist there.
        """


# ---------------------------------------------------------------------------------------------
# What an agent or a learner may also do: one small protocol each, checked with isinstance
# ---------------------------------------------------------------------------------------------
# Members are methods or plain attributes: since Python 3.12 isinstance does not see the submodules
# and parameters of an nn.Module.


@runtime_checkable
class DrawsNoise(Protocol):
    """An agent whose ``act`` takes another number of noise values than one per actuator."""

    noise_dim: int
    """Noise values per world and step."""


@runtime_checkable
class NamesContext(Protocol):
    """An agent that names the tensors of its context, for exported policies and robots."""

    context_names: tuple[str, ...]


@runtime_checkable
class InfersPosterior(Protocol):
    """An agent that infers a Gaussian over tasks."""

    def posterior(self, context: Context) -> tuple[Tensor, Tensor]:
        """Return mean and variance of the latent task, ``(task, latent)`` each."""

    def belief(self, context: Context) -> tuple[Tensor, Tensor]:
        """Return mean and variance of the encoded task, ``(task, parameter)`` each."""


class FeedforwardParts(NamedTuple):
    """The modules of a policy without memory."""

    actor: nn.Sequential
    """Perceptron from the normalised observation to the mean action."""
    norm: RunningNorm
    """Normaliser of the observation."""
    log_std: Tensor
    """Logarithm of the standard deviation of each action, ``(act,)``."""


@runtime_checkable
class FeedforwardPolicy(Protocol):
    """A policy without memory from which another can be initialised, such as ``PPOAgent``."""

    def feedforward_parts(self) -> FeedforwardParts:
        """Return the policy's own modules."""


def is_memoryless(agent: Agent) -> bool:
    """Return whether an agent is a policy of the observation alone, which others can start from."""
    return isinstance(agent, FeedforwardPolicy) and not agent.privileged


@runtime_checkable
class FineTunes(Protocol):
    """An agent that adapts by gradient steps, from its own weights or from another policy's."""

    def fine_tuned_from(self, policy: Any, rate: float) -> Agent:
        """Return an agent that adapts as this one does, starting from the weights of ``policy``.

        Args:
            policy: A ``FeedforwardPolicy``.
            rate: The one step size of all its parameters.
        """


@runtime_checkable
class MeasuresDivergence(Protocol):
    """An agent that measures how far one set of policy weights is from another."""

    def batch(self, weights: Tensor, episode: Rollout) -> Any:
        """Prepare an episode; ``weights`` ``(task, P)`` are those that acted in it."""

    def divergence(self, weights: Tensor, batch: Any) -> Tensor:
        """Return the mean KL divergence of policy ``weights`` ``(P,)`` from the one that acted."""


@runtime_checkable
class EmbedsTasks(Protocol):
    """An agent that embeds transitions in a space in which similar tasks are close."""

    def task_bank(self) -> Any:
        """Return the embeddings of training tasks (prototypes) and the tasks they belong to."""

    def embed(self, episode: Rollout, steps: int = -1) -> Tensor:
        """Embed the first ``steps`` transitions of an episode, or all, ``(task, embedding)``."""

    def embedded(self, steps: int | None = None) -> Tensor:
        """Embed the bank's windows, cut to ``steps`` transitions: ``(task, window, embedding)``."""


@runtime_checkable
class WarmStarts(Protocol):
    """A learner that can be initialised from a policy without memory (``--init``)."""

    def warm_start(self, policy: Any) -> None:
        """Initialise so that the agent acts as ``policy``, a ``FeedforwardPolicy``."""


@runtime_checkable
class ReservesMemory(Protocol):
    """A learner that needs much memory, as for a replay, and takes it before training begins."""

    def reserve_memory(self) -> None:
        """Take the memory; raise ``MetarobotError`` if there is not enough."""


# ---------------------------------------------------------------------------------------------
# Registered agents
# ---------------------------------------------------------------------------------------------

TrainingStep = Callable[[int, float, int], tuple[int, dict[str, float]]]
"""One iteration of training: (iteration, progress in [0, 1), seed) -> collected steps, metrics."""

TrainingLoop = Callable[[Any, Any, int], TrainingStep]
"""(learner, ``Family``, threads) -> what runs one iteration by the learner's own loop."""


@dataclass(frozen=True, kw_only=True)
class AgentKind:
    """A registered algorithm: its configuration, and how a learner is built from it."""

    name: str
    """The name it is registered under."""
    doc: str
    """One sentence, for lists and ``--help``."""
    config: type[Any]
    """Frozen dataclass whose defaults work. Has at least ``worlds`` and ``episodes``, and
    ``rollouts``, the worlds per task, if a task has more than one."""
    imitates: bool = False
    """Whether it learns from demonstrations instead of trials of its own."""
    build: Callable[[Any, Dimensions], Learner]
    """(configuration, sizes) -> learner; initial weights come from torch's seeded generator."""
    fit: TrainingLoop | None = None
    """How it collects and learns by a loop of its own, on the CPU; None if trials are collected
    for it and given to ``Learner.update``."""


agents: Registry[AgentKind] = Registry("agent", "metarobot.agents")
"""Name -> ``AgentKind``."""


def comparable_agents() -> tuple[str, ...]:
    """Return one name per distinct agent that learns from its own trials and can be imported."""
    chosen: dict[Any, str] = {}
    for name in agents.names():
        try:
            kind = agents.get(name)
        except MetarobotError:
            # an optional package that it needs is not installed
            continue
        if not kind.imitates:
            # ppo and blind are one algorithm under two names
            chosen.setdefault((kind.build, kind.config), name)
    return tuple(chosen.values())
