"""The evaluation protocol: the same tasks, starts and episodes for every agent compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metarobot.config_bounds import Count, CountOrZero, check_bounds
from metarobot.env.base import Env
from metarobot.env.factory import make_env
from metarobot.learning.agent_interface import Agent, Context
from metarobot.tasks.family import Family
from metarobot.training.collect import collect
from metarobot.training.run_folder import Run
from metarobot.types import Floats

ContextHook = Callable[[Context], Context]
"""Called with the contexts after every episode; returns those to go on with."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is played, the same for every agent that is compared."""

    split: str = "test"
    """Split that tasks are drawn from."""
    tasks: Count = 40
    """Number of tasks."""
    episodes: Count = 2
    """Episodes K of each task."""
    seed: CountOrZero = 0
    """Seed of tasks and starts; every agent meets the same."""
    quiet: bool = False
    """Play the last episode, which nothing adapts to, without exploration noise."""
    threads: CountOrZero = 0
    """Physics threads on the CPU; 0 takes all there are."""
    sim: str = "cpu"
    """Simulator, ``cpu`` (MuJoCo) or ``warp`` (MuJoCo Warp)."""
    device: str = "cpu"
    """Where Warp simulates, ``cpu`` or ``cuda``."""

    def __post_init__(self) -> None:
        check_bounds(self)


class PlayedReturns(NamedTuple):
    """Results of playing a protocol, averaged over the rollouts of a task."""

    returns: Floats
    """Return of each episode in each task, ``(episode, task)``."""
    success: Floats | None
    """Share of episodes that succeeded, of the same shape; None if the family defines none."""


class Evaluator:
    """The tasks of a protocol, and environments to play them in."""

    def __init__(
        self, family: Family, protocol: Protocol, tick: Callable[[], None] = lambda: None
    ) -> None:
        """Draw the tasks; ``tick`` is called after each trial that is played."""
        self.family = family
        self.protocol = protocol
        self.tick = tick
        self.tasks = family.space.sample(protocol.split, protocol.tasks, protocol.seed)
        self._envs: dict[int, Env] = {}

    def env(self, rollouts: int = 1) -> Env:
        """Return an environment with ``rollouts`` worlds of each task, which stand together."""
        if rollouts not in self._envs:
            self._envs[rollouts] = make_env(
                self.family,
                [task for task in self.tasks for _ in range(rollouts)],
                sim=self.protocol.sim,
                device=self.protocol.device,
                threads=self.protocol.threads,
            )
        return self._envs[rollouts]

    def play(
        self, agent: Agent, rollouts: int = 1, between: ContextHook = lambda context: context
    ) -> PlayedReturns:
        """Play the protocol's episodes in every task.

        Only an agent that needs its exploration noise to adapt acts with it.

        Args:
            agent: Who plays; a module is moved to the environment's device.
            rollouts: Worlds of each task whose episodes the agent adapts to together.
            between: What happens to the contexts after each episode.
        """
        env = self.env(rollouts)
        if isinstance(agent, torch.nn.Module):
            agent.to(env.device)

        episodes = self.protocol.episodes
        explore = [agent.explores] * episodes
        if self.protocol.quiet:
            explore[-1] = False

        trials = collect(
            agent,
            env,
            self.tasks,
            episodes=episodes,
            seed=self.protocol.seed,
            rollouts=rollouts,
            explore=explore,
            between=between,
        )
        self.tick()

        def task_means(values: Tensor) -> Tensor:
            """Average ``(episode, world)`` over the rollouts of each task."""
            return values.view(episodes, len(self.tasks), rollouts).mean(2).double().cpu()

        # Returns are summed in float64 before they are averaged, success rates after.
        returns = task_means(trials.returns().double()).numpy()
        success = None
        if "success" in self.family.weights:
            success = task_means(trials.totals("success")).numpy()
        return PlayedReturns(returns, success)

    def play_all(
        self,
        runs: Sequence[Run],
        watch: Callable[[Agent], ContextHook] = lambda agent: lambda context: context,
    ) -> PlayedReturns:
        """Play with every run and return arrays ``(run, episode, task)``.

        ``watch`` takes an agent and returns what is to be called with its contexts.
        """
        played = []
        for run in runs:
            agent = run.load_agent()
            played.append(self.play(agent, run.rollouts, watch(agent)))
        return stack_played(played)


def stack_played(played: Iterable[PlayedReturns]) -> PlayedReturns:
    """Stack the results of several runs along a new first axis."""
    results = list(played)
    returns = np.stack([result.returns for result in results])
    rates = [result.success for result in results if result.success is not None]
    return PlayedReturns(returns, np.stack(rates) if rates else None)
