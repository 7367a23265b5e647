"""Evaluation: return after 0 … K−1 episodes on tasks of a split, with intervals, beside oracle and blind.

Statistics follow Agarwal et al. (2021): means and interquartile means with stratified bootstrap intervals, the
training seeds being the strata. Nothing reaches an agent but its own episodes of the task it is tested on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from metarobot.agent import Agent, Context
from metarobot.beliefs import Book
from metarobot.checkpoint import Run
from metarobot.collect import Expert, collect
from metarobot.env import Env, Family
from metarobot.stats import RESAMPLES, interval, summary
from metarobot.tasks import Task
from metarobot.types import Floats, MetarobotError

CONTROLS = ("cleared", "swapped")
RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Step sizes tried for fine-tuning."""
Tamper = Callable[[Context], Context]


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


class Played(NamedTuple):
    """What was earned, means over rollouts."""

    returns: Floats
    """Of each episode in each task, ``(episode, task)``."""
    success: Floats | None
    """The share of episodes that succeeded, of the same shape; None where a family does not say what success is."""


class Arena:
    """The tasks of a protocol, and worlds to play them in; ``tick`` is called after each trial played."""

    def __init__(self, family: Family, protocol: Protocol, tick: Callable[[], None] = lambda: None) -> None:
        self.family, self.protocol, self.tick = family, protocol, tick
        self.tasks = family.space.sample(protocol.split, protocol.tasks, protocol.seed)
        self._envs: dict[int, Env] = {}

    def env(self, rollouts: int = 1) -> Env:
        """Return worlds to play in, so many for each task."""
        if rollouts not in self._envs:
            worlds = [task for task in self.tasks for _ in range(rollouts)]
            self._envs[rollouts] = Env(self.family, worlds, threads=self.protocol.threads)
        return self._envs[rollouts]

    def play(self, agent: Agent, rollouts: int = 1, between: Tamper = lambda context: context) -> Played:
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
        won = trials.totals("success").view(shape).mean(2) if "success" in self.family.weights else None
        return Played(
            trials.returns().double().view(shape).mean(2).numpy(), None if won is None else won.double().numpy()
        )

    def play_all(self, runs: Sequence[Run], watch: Callable[[Agent], Tamper] = lambda agent: lambda x: x) -> Played:
        """Play with every run: arrays ``(run, episode, task)``; ``watch`` returns what is shown an agent's contexts."""

        def played(run: Run) -> Played:
            agent = run.load_agent()
            return self.play(agent, run.rollouts, watch(agent))

        return stacked(played(r) for r in runs)


def stacked(played: Iterable[Played]) -> Played:
    """Stack what several agents played."""
    returns, success = zip(*played, strict=True)
    return Played(np.stack(returns), None if success[0] is None else np.stack(success))


def evaluate(
    runs: Sequence[Run],
    protocol: Protocol,
    *,
    oracle: Sequence[Run] = (),
    blind: Sequence[Run] = (),
    finetune: Sequence[Run] = (),
    controls: bool = False,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Play the protocol with each run (one a training seed) and the baselines; return the report as JSON data.

    ``finetune`` names policies to fine-tune as the first run's agent adapts: see ``finetuning``. ``tick`` is called
    after each of the ``trials`` that are played.
    """
    family = _one_family([*runs, *oracle, *blind, *finetune])
    if any(not r.load_agent().privileged for r in oracle):
        raise MetarobotError(f"{oracle[0].folder} is not an oracle: its agent is not shown the task")
    arena = Arena(family, protocol, tick)
    book = Book(family.space, arena.tasks)
    returns, success = arena.play_all(runs, book.watch)
    report: dict[str, Any] = {
        "family": family.name,
        "split": protocol.split,
        "agent": runs[0].agent,
        "runs": [r.name for r in runs],
        "seeds": [int(r.config["seed"]) for r in runs],
        "steps": [r.steps for r in runs],
        "tasks": len(arena.tasks),
        "rollouts": runs[0].rollouts,
        "quiet": protocol.quiet,
        "task_values": [t.as_dict() for t in arena.tasks],
        "space": family.space.hash,
        "episodes": _rows(returns),
        "kinds": _kinds(arena.tasks, returns),
        "returns": returns.round(3).tolist(),
    }
    if beliefs := book.report():
        report["beliefs"] = beliefs
    references = {k: arena.play_all(v) for k, v in (("oracle", oracle), ("blind", blind)) if v}
    if family.expert is not None:
        references["expert"] = stacked([arena.play(Expert(arena.env()))])
    if success is not None:
        report["success"] = {"agent": _rates(success), **{k: _rates(v.success) for k, v in references.items()}}
    _beside(report["episodes"], returns, {k: v.returns for k, v in references.items()})
    if finetune:
        report["finetuning"] = finetuning(runs, finetune, arena)
    if controls:
        report["controls"] = {c: _control(c, runs, arena) for c in CONTROLS}
    return report


def trials(runs: int, oracle: int, blind: int, finetune: int, controls: bool, expert: bool) -> int:
    """Count the trials that an evaluation of so many runs of each sort plays."""
    tuned = (len(RATES) + 1) * (finetune + runs) if finetune else 0
    return runs + oracle + blind + expert + tuned + controls * len(CONTROLS) * runs


def finetuning(runs: Sequence[Run], pretrained: Sequence[Run], arena: Arena) -> dict[str, Any]:
    """Adapt from other initial weights as the runs do: those of pretrained policies, and untrained ones.

    The same episodes, the same gradient steps; the step size of each is the best of ``RATES`` on training tasks.
    """
    if arena.protocol.episodes < 2:
        raise MetarobotError("fine-tuning needs at least 2 episodes: one to adapt to, one to show it")
    method = runs[0].load_agent()
    if not hasattr(method, "transferred"):
        raise MetarobotError(f"agent {runs[0].agent!r} has no gradient steps to fine-tune with; maml, for one, has")
    fresh = [r.learner().agent.policy for r in runs]
    policies = {"pretrained": [r.load_agent() for r in pretrained], "from scratch": fresh}
    if any(p.privileged or not hasattr(p, "actor") or p.begin(1) for p in policies["pretrained"]):
        raise MetarobotError(f"{pretrained[0].folder} holds no policy to fine-tune: take one trained as ppo or blind")
    practice = Arena(arena.family, replace(arena.protocol, split="train", seed=arena.protocol.seed + 1), arena.tick)
    report = {}
    for name, group in policies.items():
        best = max(RATES, key=partial(_adapted, practice, method, group, runs[0].rollouts))
        returns = _tuned(arena, method, group, runs[0].rollouts, best)
        report[name] = {"inner_lr": best, "episodes": _rows(returns), "returns": returns.round(3).tolist()}
    return report


def _tuned(arena: Arena, method: Any, policies: Sequence[Any], rollouts: int, rate: float) -> Floats:
    return stacked(arena.play(method.transferred(p, rate), rollouts) for p in policies).returns


def _adapted(arena: Arena, method: Any, policies: Sequence[Any], rollouts: int, rate: float) -> float:
    """Return what is earned after the first episode, over all later ones."""
    return float(_tuned(arena, method, policies, rollouts, rate)[:, 1:].mean())


def _rows(returns: Floats) -> list[dict[str, Any]]:
    """Summarise returns ``(run, episode, task)`` episode by episode, with the gain over the first."""
    rows = []
    for k in range(returns.shape[1]):
        gain = returns[:, k] - returns[:, 0]
        gained = {"gain": float(gain.mean()), "gain_ci95": interval(gain, np.mean)} if k else {}
        rows.append({"episode": k, **summary(returns[:, k]), **gained})
    return rows


def _beside(rows: list[dict[str, Any]], returns: Floats, references: Mapping[str, Floats]) -> None:
    """Add to each episode's row what the references earned, and with oracle and blind the score."""
    for k, row in enumerate(rows):
        for name, values in references.items():
            row[name] = float(values[:, k].mean())
            row[f"{name}_ci95"] = interval(values[:, k], np.mean)
        if {"oracle", "blind"} <= references.keys():
            upper, lower = (references[x][:, k] for x in ("oracle", "blind"))
            worth = upper.mean(0, keepdims=True) - lower.mean(0, keepdims=True)
            row |= score(returns[:, k], upper, lower)
            row |= {"worth": float(worth.mean()), "worth_ci95": interval(worth, np.mean)}


def _rates(success: Floats | None) -> list[dict[str, Any]]:
    """Return the success rate of each episode, with its interval."""
    rates = [] if success is None else [success[:, k] for k in range(success.shape[1])]
    return [{"mean": float(x.mean()), "ci95": interval(x, np.mean)} for x in rates]


def _kinds(tasks: Sequence[Task], returns: Floats, most: int = 4) -> dict[str, list[float]]:
    """Average returns over the tasks that are alike, episode by episode, where there are few kinds of task."""
    names = [", ".join(f"{k} {v:g}" for k, v in t.as_dict().items()) for t in tasks]
    kinds = sorted(set(names))
    rows = {k: np.array([name == k for name in names]) for k in kinds}
    return {k: returns[:, :, row].mean((0, 2)).tolist() for k, row in rows.items()} if len(kinds) <= most else {}


def _control(control: str, runs: Sequence[Run], arena: Arena) -> list[dict[str, Any]]:
    """Play with the context tampered with between episodes: ``cleared``, or ``swapped`` for another task's.

    An agent that lives on its context falls back to its first episode when cleared, and below when swapped.
    """
    returns = []
    for run in runs:
        agent = run.load_agent()
        tamper = partial(_cleared, agent) if control == "cleared" else partial(_swapped, arena.tasks)
        returns.append(arena.play(agent, run.rollouts, tamper).returns)
    return _rows(np.stack(returns))


def _cleared(agent: Agent, context: Context) -> Context:
    if agent.privileged or not context:
        return context
    return agent.begin(len(context[0]))


def _swapped(tasks: Sequence[Task], context: Context) -> Context:
    """Hand each task the context of the next task that is another."""
    n = len(tasks)
    other = [next((j % n for j in range(i + 1, i + n) if tasks[j % n] != tasks[i]), i) for i in range(n)]
    return tuple(x[torch.tensor(other)] for x in context)


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


def headline(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return of a report what an agent's card says: split, tasks, and the means of each episode, or number of shots."""
    if "shots" in report:
        means = {k: round(report[k]["mean"], 4) for k in ("reference", "expert") if k in report}
        shots = {str(r["shots"]): round(r["mean"], 4) for r in report["shots"]}
        return {"split": report["split"], "tasks": report["tasks"], "success_after_shots": shots, **means}
    kept = ("mean", "ci95", "oracle", "blind", "score")
    rows = [{k: np.round(r[k], 2).tolist() for k in kept if k in r} for r in report["episodes"]]
    won = {k: [round(r["mean"], 4) for r in v] for k, v in report.get("success", {}).items()}
    return {"split": report["split"], "tasks": report["tasks"], "episodes": rows, **({"success": won} if won else {})}


def _one_family(runs: Sequence[Run]) -> Any:
    if not runs:
        raise MetarobotError("evaluation needs at least one run")
    names = {r.family.name for r in runs}
    if len(names) > 1:
        raise MetarobotError(f"runs of different families cannot be compared: {', '.join(sorted(names))}")
    return runs[0].family
