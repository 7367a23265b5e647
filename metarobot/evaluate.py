"""Evaluation: return after 0 … K−1 episodes on tasks of a split, with intervals, beside oracle and blind.

Statistics follow Agarwal et al. (2021): means and interquartile means with stratified bootstrap intervals, the
training seeds being the strata. Nothing reaches an agent but its own episodes of the task it is tested on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from metarobot.agent import Agent, Context
from metarobot.checkpoint import Run
from metarobot.collect import collect
from metarobot.env import Env
from metarobot.tasks import Task
from metarobot.types import MetarobotError

Floats = NDArray[np.float64]
RESAMPLES = 2000
CONTROLS = ("cleared", "swapped")


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
    threads: int = 0

    def __post_init__(self) -> None:
        for name in ("tasks", "episodes"):
            if getattr(self, name) < 1:
                raise MetarobotError(f"{name} must be at least 1, not {getattr(self, name)}")


def evaluate(
    runs: Sequence[Run],
    protocol: Protocol,
    *,
    oracle: Sequence[Run] = (),
    blind: Sequence[Run] = (),
    controls: bool = False,
) -> dict[str, Any]:
    """Play the protocol with each run (one a training seed) and the baselines; return the report as JSON data."""
    family = _one_family([*runs, *oracle, *blind])
    if any(not r.load_agent().privileged for r in oracle):
        raise MetarobotError(f"{oracle[0].folder} is not an oracle: its agent is not shown the task")
    tasks = family.space.sample(protocol.split, protocol.tasks, protocol.seed)
    env = Env(family, tasks, threads=protocol.threads)
    returns = play_all(runs, env, tasks, protocol)
    report: dict[str, Any] = {
        "family": family.name,
        "split": protocol.split,
        "agent": runs[0].agent,
        "runs": [r.name for r in runs],
        "seeds": [int(r.config["seed"]) for r in runs],
        "steps": [int(r.config["steps"]) for r in runs],
        "tasks": len(tasks),
        "task_values": [t.as_dict() for t in tasks],
        "space": family.space.hash,
        "episodes": [{"episode": k, **summary(returns[:, k])} for k in range(protocol.episodes)],
        "returns": returns.round(3).tolist(),
    }
    references = {k: play_all(v, env, tasks, protocol) for k, v in (("oracle", oracle), ("blind", blind)) if v}
    for name, values in references.items():
        for k, row in enumerate(report["episodes"]):
            row[name] = float(values[:, k].mean())
            row[f"{name}_ci95"] = interval(values[:, k], np.mean)
    if len(references) == 2:
        for k, row in enumerate(report["episodes"]):
            row |= score(returns[:, k], references["oracle"][:, k], references["blind"][:, k])
    if controls:
        report["controls"] = {c: _control(c, runs, env, tasks, protocol) for c in CONTROLS}
    return report


def play_all(runs: Sequence[Run], env: Env, tasks: Sequence[Task], protocol: Protocol) -> Floats:
    """Return of every run, episode and task, ``(run, episode, task)``, acting without exploration noise."""
    return np.stack([play(r.load_agent(), env, tasks, protocol.episodes, protocol.seed) for r in runs])


def play(
    agent: Agent,
    env: Env,
    tasks: Sequence[Task],
    episodes: int,
    seed: int,
    between: Callable[[Context], Context] = lambda c: c,
) -> Floats:
    """Return of every episode and task, ``(episode, task)``."""
    trials = collect(agent, env, tasks, episodes=episodes, seed=seed, explore=False, between=between)
    return trials.returns().double().numpy()


def _control(
    control: str, runs: Sequence[Run], env: Env, tasks: Sequence[Task], protocol: Protocol
) -> list[dict[str, Any]]:
    """Play with the context tampered with between episodes: ``cleared``, or ``swapped`` for another task's.

    An agent that lives on its context falls back to its first episode when cleared, and below when swapped.
    """
    returns = []
    for run in runs:
        agent = run.load_agent()
        tamper = partial(_cleared, agent) if control == "cleared" else partial(_swapped, tasks)
        returns.append(play(agent, env, tasks, protocol.episodes, protocol.seed, tamper))
    stacked = np.stack(returns)
    return [{"episode": k, **summary(stacked[:, k])} for k in range(protocol.episodes)]


def _cleared(agent: Agent, context: Context) -> Context:
    if agent.privileged or not context:
        return context
    return agent.begin(len(context[0]))


def _swapped(tasks: Sequence[Task], context: Context) -> Context:
    """Hand each world the context of the next world that is in another task."""
    n = len(tasks)
    other = [next((j % n for j in range(i + 1, i + n) if tasks[j % n] != tasks[i]), i) for i in range(n)]
    return tuple(x[torch.tensor(other)] for x in context)


def iqm(x: Floats) -> float:
    """Interquartile mean: the mean of the middle half of all values (Agarwal et al. 2021)."""
    flat = np.sort(x, axis=None)
    cut = len(flat) // 4
    return float(flat[cut : len(flat) - cut].mean())


def worst_tenth(x: Floats) -> float:
    """Mean over the worst tenth of tasks, at least one, after averaging the seeds."""
    tasks = np.sort(x.mean(0))
    return float(tasks[: max(1, len(tasks) // 10)].mean())


def interval(x: Floats, statistic: Callable[[Floats], Any], level: float = 0.95) -> list[float]:
    """Bootstrap interval of a statistic of ``(run, task)``: tasks are resampled within each run."""
    rng = np.random.Generator(np.random.PCG64(0))
    draws = [float(statistic(_resample(x, rng))) for _ in range(RESAMPLES)]
    tail = (1 - level) / 2
    return [float(q) for q in np.quantile(draws, [tail, 1 - tail])]


def _resample(x: Floats, rng: np.random.Generator) -> Floats:
    columns = rng.integers(x.shape[1], size=x.shape)
    return np.take_along_axis(x, columns, axis=1)


def summary(x: Floats) -> dict[str, Any]:
    """Summarise the returns ``(run, task)`` of one episode."""
    return {
        "mean": float(x.mean()),
        "iqm": iqm(x),
        "ci95": interval(x, np.mean),
        "iqm_ci95": interval(x, iqm),
        "worst10": worst_tenth(x),
    }


def score(agent: Floats, oracle: Floats, blind: Floats) -> dict[str, Any]:
    """Adaptation score (agent − blind) / (oracle − blind) of the means, its interval over resampled tasks."""
    rows = np.stack([x.mean(0) for x in (agent, oracle, blind)])
    rng = np.random.Generator(np.random.PCG64(0))

    def ratio(r: Floats) -> float:
        a, o, b = r.mean(1)
        return float((a - b) / (o - b)) if abs(o - b) > 1e-9 else float("nan")

    draws = [ratio(rows[:, rng.integers(rows.shape[1], size=rows.shape[1])]) for _ in range(RESAMPLES)]
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return {"score": ratio(rows), "score_ci95": [float(low), float(high)]}


def _one_family(runs: Sequence[Run]) -> Any:
    if not runs:
        raise MetarobotError("evaluation needs at least one run")
    names = {r.family.name for r in runs}
    if len(names) > 1:
        raise MetarobotError(f"runs of different families cannot be compared: {', '.join(sorted(names))}")
    return runs[0].family
