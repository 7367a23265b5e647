"""Environment steps a second while each kind of agent collects its trials."""

from __future__ import annotations

from typing import Any

from metarobot.bench.harness import (
    Round,
    check_sizes,
    measure_rounds,
    median,
    median_ratio,
    timed,
    usable_threads,
)
from metarobot.env.base import Env
from metarobot.learning.agent_interface import agents, comparable_agents
from metarobot.tasks.family import Family
from metarobot.threads_and_memory import keep_freed_memory, single_torch_thread
from metarobot.training.collect import collect
from metarobot.training.config import rollouts_of
from metarobot.training.run_folder import build_learner

YARDSTICK = "rl2"
"""The agent whose rate all others are compared with."""


def bench_agents(
    family: Family, *, worlds: int, seconds: float, threads: int = 0, show: bool = True
) -> dict[str, Any]:
    """Measure environment steps a second while each kind of agent, untrained, collects trials.

    The ratio is to RL²'s rate in the same round, with as many threads as training collects with.

    Args:
        family: What is simulated.
        worlds: Number of worlds at least: agents with several rollouts a task round up.
        seconds: How long to measure, at least.
        threads: Physics threads; 0 takes all there are.
        show: Whether to show a progress bar.

    Raises:
        MetarobotError: No worlds, or no time.
    """
    check_sizes(worlds, seconds)
    keep_freed_memory()  # as training does
    threads = usable_threads(threads)

    with single_torch_thread():
        collectors = {}
        for name in comparable_agents():
            collectors[name] = TrialCollector(name, family, worlds, threads)

        def measure() -> Round:
            return {name: collector.rate() for name, collector in collectors.items()}

        rounds = measure_rounds(measure, seconds, show=show)

    rates = {}
    for name, collector in collectors.items():
        rates[name] = {
            "worlds": collector.env.worlds,
            "steps_per_s": median(rounds, name),
            "ratio": median_ratio(rounds, name, YARDSTICK),
        }
    return {"family": family.name, "threads": threads, "rounds": len(rounds), "agents": rates}


class TrialCollector:
    """An untrained agent of one kind, with an environment of at least so many worlds."""

    def __init__(self, name: str, family: Family, worlds: int, threads: int) -> None:
        config = agents.get(name).config()
        self.episodes = config.episodes
        self.rollouts = rollouts_of(config)
        self.agent = build_learner(name, config, family, 0).agent

        tasks = -(-worlds // self.rollouts)  # rounded up
        self.tasks = family.space.sample("train", tasks, 0)
        self.env = Env(
            family,
            [task for task in self.tasks for _ in range(self.rollouts)],
            threads=threads,
        )

    def rate(self) -> float:
        """Collect a trial in every task; return environment steps a second."""
        trials, seconds = timed(
            lambda: collect(
                self.agent,
                self.env,
                self.tasks,
                episodes=self.episodes,
                seed=0,
                rollouts=self.rollouts,
            )
        )
        return float(trials.steps() / seconds)
