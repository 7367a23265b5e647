"""The evaluation protocol: the same tasks, starts and episodes for every agent compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metarobot.config_bounds import Count, CountOrZero, check_bounds
from metarobot.env.base import Env
from metarobot.env.factory import make_env
from metarobot.errors import MetarobotError
from metarobot.learning.agent_interface import Agent, Context
from metarobot.tasks.family import Family
from metarobot.training.collect import collect
from metarobot.training.run_folder import Run
from metarobot.types import Floats, Trials, delay

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


LARGEST_FAULT_SHARE = 0.05
"""Share of faulted episodes above which the returns of an agent tell nothing."""


class EvaluationError(MetarobotError):
    """An agent that cannot be measured: its actions are not finite, or too many episodes fault."""


class PlayedReturns(NamedTuple):
    """Results of playing a protocol, averaged over the rollouts of a task.

    A faulted episode, in which the physics broke down or whose return is not finite, counts as a
    failure with the return ``worst``.
    """

    returns: Floats
    """Return of each episode in each task, ``(episode, task)``."""
    success: Floats | None
    """Share of episodes that succeeded, of the same shape; None if the family defines none."""
    faults: Floats
    """Number of rollouts that faulted, of the same shape."""
    fault_share: Floats
    """Share of the rollouts that faulted, of the same shape."""
    worst: float
    """Return of a faulted episode: the worst of all others that were played."""

    def with_worst(self, worst: float) -> PlayedReturns:
        """Return the same with another return of faulted episodes, if others played too."""
        if worst == self.worst or not self.faults.any():
            return self._replace(worst=worst)
        change = self.fault_share * (worst - self.worst)
        return self._replace(returns=self.returns + change, worst=worst)


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
        self.worst_return = math.inf
        """Worst return of all episodes played so far, without the faulted ones."""

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
        self,
        agent: Agent,
        rollouts: int = 1,
        between: ContextHook = lambda context: context,
        name: str = "",
    ) -> PlayedReturns:
        """Play the protocol's episodes in every task.

        Only an agent that needs its exploration noise to adapt acts with it.

        Args:
            agent: Who plays; a module is moved to the environment's device.
            rollouts: Worlds of each task whose episodes the agent adapts to together.
            between: What happens to the contexts after each episode.
            name: What the agent is called in messages; its class if empty.

        Raises:
            EvaluationError: An action is not finite, or all episodes fault.
        """
        name = name or type(agent).__name__
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
        check_actions(trials, name)

        def task_means(values: Tensor) -> Tensor:
            """Average ``(episode, world)`` over the rollouts of each task."""
            return values.view(episodes, len(self.tasks), rollouts).mean(2).double().cpu()

        # Returns are summed in float64 before they are averaged, success rates after.
        episode_returns = trials.returns().double()
        faulted = faulted_episodes(trials)
        if bool(faulted.all()):
            raise EvaluationError(f"{name}: all {faulted.numel()} episodes {FAULTED}")
        worst = float(episode_returns[~faulted].min())
        self.worst_return = min(self.worst_return, worst)
        returns = task_means(torch.where(faulted, worst, episode_returns)).numpy()
        success = None
        if "success" in self.family.weights:
            success = task_means(torch.where(faulted, 0.0, trials.totals("success"))).numpy()

        fault_share = task_means(faulted.double()).numpy()
        faults = (fault_share * rollouts).round()
        return PlayedReturns(returns, success, faults, fault_share, worst)

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
            played.append(self.play(agent, run.rollouts, watch(agent), run.name))
        stacked = stack_played(played)
        check_faults(stacked, ", ".join(run.name for run in runs))
        return stacked


def stack_played(played: Iterable[PlayedReturns]) -> PlayedReturns:
    """Stack the results of several runs along a new first axis, under one worst return."""
    results = list(played)
    worst = min(result.worst for result in results)
    results = [result.with_worst(worst) for result in results]
    returns = np.stack([result.returns for result in results])
    rates = [result.success for result in results if result.success is not None]
    return PlayedReturns(
        returns=returns,
        success=np.stack(rates) if rates else None,
        faults=np.stack([result.faults for result in results]),
        fault_share=np.stack([result.fault_share for result in results]),
        worst=worst,
    )


# ---------------------------------------------------------------------------------------------
# What is no result
# ---------------------------------------------------------------------------------------------

FAULTED = "faulted (the physics broke down, or the return is not finite)"


def check_actions(trials: Trials, name: str) -> None:
    """Check that all actions of an agent are finite, as long as what it observes is.

    What the simulator makes of other actions is nothing that the agent did.

    Raises:
        EvaluationError: One is not.
    """
    # Whether an observation or a reward of this trial was broken before, (world,).
    misled = torch.zeros_like(trials.episodes[0].faulted)
    for k, episode in enumerate(trials.episodes, start=1):
        broken_obs = (~episode.obs.isfinite().all(-1) & episode.valid).cummax(0).values
        broken_reward = (~episode.reward.isfinite() & episode.valid).cummax(0).values
        excused = misled | broken_obs | delay(broken_reward)
        misled = misled | broken_obs[-1] | broken_reward[-1]

        broken = ~episode.action.isfinite().all(-1) & episode.valid & ~excused
        if bool(broken.any()):
            step, world = broken.nonzero()[0].tolist()
            raise EvaluationError(
                f"{name}: actions are not finite, first in episode {k} at step {step} of world "
                f"{world}: it cannot be measured"
            )


def faulted_episodes(trials: Trials) -> Tensor:
    """Return where the physics broke down or the return is not finite, ``(episode, world)``."""
    faulted = torch.stack([episode.faulted for episode in trials.episodes])
    return faulted | ~trials.returns().isfinite()


def check_faults(played: PlayedReturns, name: str) -> None:
    """Check that few episodes faulted.

    Raises:
        EvaluationError: More than ``LARGEST_FAULT_SHARE`` of an agent's episodes did.
    """
    check_fault_count(int(played.faults.sum()), float(played.fault_share.mean()), name)


def check_fault_count(faults: int, share: float, name: str) -> None:
    """Check the number of faulted episodes and their share of all; see ``check_faults``."""
    if share > LARGEST_FAULT_SHARE:
        raise EvaluationError(
            f"{name}: {faults} episodes {FAULTED}, {100 * share:.1f} % of them; "
            f"with more than {100 * LARGEST_FAULT_SHARE:g} % nothing is measured"
        )


def fault_counts(played: PlayedReturns) -> list[int]:
    """Return the number of faulted episodes for each place in the trial, from ``(run, ...)``."""
    return [int(count) for count in played.faults.sum(axis=(0, 2))]
