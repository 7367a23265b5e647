"""What is played: the same tasks, starts and episodes for every agent that is compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from metarobot.env.base import Env
from metarobot.errors import MetarobotError
from metarobot.learning.agent_interface import Agent, Context
from metarobot.tasks.family import Family
from metarobot.training.collect import collect
from metarobot.training.run_folder import Run
from metarobot.types import Floats

ContextChange = Callable[[Context], Context]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is played: the same for every agent that is compared."""

    split: str = "test"
    tasks: int = 40
    """Number of tasks drawn from the split."""
    episodes: int = 2
    """Episodes K a task."""
    seed: int = 0
    """Draws tasks and starts; every agent meets the same."""
    quiet: bool = False
    """Play the last episode, which nothing adapts to, without exploration noise."""
    threads: int = 0

    def __post_init__(self) -> None:
        for name in ("tasks", "episodes"):
            if getattr(self, name) < 1:
                raise MetarobotError(f"{name} must be at least 1, not {getattr(self, name)}")


class PlayedReturns(NamedTuple):
    """What was earned, means over rollouts."""

    returns: Floats
    """Of each episode in each task, ``(episode, task)``."""
    success: Floats | None
    """The share of episodes that succeeded, of the same shape; None where a family does not say
    what success is."""


class Evaluator:
    """The tasks of a protocol, and worlds to play them in; ``tick`` is called after each trial
    played.
    """

    def __init__(
        self, family: Family, protocol: Protocol, tick: Callable[[], None] = lambda: None
    ) -> None:
        self.family, self.protocol, self.tick = family, protocol, tick
        self.tasks = family.space.sample(protocol.split, protocol.tasks, protocol.seed)
        self._envs: dict[int, Env] = {}

    def env(self, rollouts: int = 1) -> Env:
        """Return worlds to play in, so many for each task."""
        if rollouts not in self._envs:
            worlds = [task for task in self.tasks for _ in range(rollouts)]
            self._envs[rollouts] = Env(self.family, worlds, threads=self.protocol.threads)
        return self._envs[rollouts]

    def play(
        self, agent: Agent, rollouts: int = 1, between: ContextChange = lambda context: context
    ) -> PlayedReturns:
        """Live the protocol's episodes in every task.

        Only an agent that cannot adapt without exploration noise acts with it.
        """
        adapted = self.protocol.episodes - 1
        trials = collect(
            agent,
            self.env(rollouts),
            self.tasks,
            episodes=self.protocol.episodes,
            seed=self.protocol.seed,
            rollouts=rollouts,
            explore=[agent.explores] * adapted + [agent.explores and not self.protocol.quiet],
            between=between,
        )
        self.tick()
        shape = (self.protocol.episodes, len(self.tasks), rollouts)
        won = (
            trials.totals("success").view(shape).mean(2)
            if "success" in self.family.weights
            else None
        )
        return PlayedReturns(
            trials.returns().double().view(shape).mean(2).numpy(),
            None if won is None else won.double().numpy(),
        )

    def play_all(
        self,
        runs: Sequence[Run],
        watch: Callable[[Agent], ContextChange] = lambda agent: lambda x: x,
    ) -> PlayedReturns:
        """Play with every run: arrays ``(run, episode, task)``; ``watch`` returns what is shown an
        agent's contexts.
        """

        def played(run: Run) -> PlayedReturns:
            agent = run.load_agent()
            return self.play(agent, run.rollouts, watch(agent))

        return stack_played(played(r) for r in runs)


def stack_played(played: Iterable[PlayedReturns]) -> PlayedReturns:
    """Stack what several agents played."""
    returns, success = zip(*played, strict=True)
    return PlayedReturns(np.stack(returns), None if success[0] is None else np.stack(success))
