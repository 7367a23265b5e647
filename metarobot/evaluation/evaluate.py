"""Evaluation: return after 0 … K−1 episodes on tasks of a split, with intervals, beside oracle and
blind.

Statistics follow Agarwal et al. (2021): means and interquartile means with stratified bootstrap
intervals, the training seeds being the strata. Nothing reaches an agent but its own episodes of the
task it is tested on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from metarobot.errors import MetarobotError
from metarobot.evaluation.belief_calibration import BeliefRecorder
from metarobot.evaluation.fine_tuning import STEP_SIZES, fine_tune
from metarobot.evaluation.protocol import Evaluator, Protocol, stack_played
from metarobot.evaluation.statistics import adaptation_score, bootstrap_interval, episode_rows
from metarobot.learning.agent_interface import Agent, Context
from metarobot.tasks.space import Task
from metarobot.training.collect import ExpertAgent
from metarobot.training.run_folder import Run
from metarobot.types import Floats

CONTROLS = ("cleared", "swapped")


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
    """Play the protocol with each run (one a training seed) and the baselines; return the report as
    JSON data.

    ``finetune`` names policies to fine-tune as the first run's agent adapts: see ``finetuning``.
    ``tick`` is called after each of the ``trials`` that are played.
    """
    family = _one_family([*runs, *oracle, *blind, *finetune])
    if any(not r.load_agent().privileged for r in oracle):
        raise MetarobotError(
            f"{oracle[0].folder} is not an oracle: its agent is not shown the task"
        )
    arena = Evaluator(family, protocol, tick)
    book = BeliefRecorder(family.space, arena.tasks)
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
        "episodes": episode_rows(returns),
        "kinds": _kinds(arena.tasks, returns),
        "returns": returns.round(3).tolist(),
    }
    if beliefs := book.report():
        report["beliefs"] = beliefs
    references = {k: arena.play_all(v) for k, v in (("oracle", oracle), ("blind", blind)) if v}
    if family.teaching.expert is not None:
        references["expert"] = stack_played([arena.play(ExpertAgent(arena.env()))])
    if success is not None:
        report["success"] = {
            "agent": _rates(success),
            **{k: _rates(v.success) for k, v in references.items()},
        }
    _beside(report["episodes"], returns, {k: v.returns for k, v in references.items()})
    if finetune:
        report["finetuning"] = fine_tune(runs, finetune, arena)
    if controls:
        report["controls"] = {c: _control(c, runs, arena) for c in CONTROLS}
    return report


def count_trials(
    runs: int, oracle: int, blind: int, finetune: int, controls: bool, expert: bool
) -> int:
    """Count the trials that an evaluation of so many runs of each sort plays."""
    tuned = (len(STEP_SIZES) + 1) * (finetune + runs) if finetune else 0
    return runs + oracle + blind + expert + tuned + controls * len(CONTROLS) * runs


def _beside(rows: list[dict[str, Any]], returns: Floats, references: Mapping[str, Floats]) -> None:
    """Add to each episode's row what the references earned, and with oracle and blind the score."""
    for k, row in enumerate(rows):
        for name, values in references.items():
            row[name] = float(values[:, k].mean())
            row[f"{name}_ci95"] = bootstrap_interval(values[:, k], np.mean)
        if {"oracle", "blind"} <= references.keys():
            upper, lower = (references[x][:, k] for x in ("oracle", "blind"))
            worth = upper.mean(0, keepdims=True) - lower.mean(0, keepdims=True)
            row |= adaptation_score(returns[:, k], upper, lower)
            row |= {"worth": float(worth.mean()), "worth_ci95": bootstrap_interval(worth, np.mean)}


def _rates(success: Floats | None) -> list[dict[str, Any]]:
    """Return the success rate of each episode, with its interval."""
    rates = [] if success is None else [success[:, k] for k in range(success.shape[1])]
    return [{"mean": float(x.mean()), "ci95": bootstrap_interval(x, np.mean)} for x in rates]


def _kinds(tasks: Sequence[Task], returns: Floats, most: int = 4) -> dict[str, list[float]]:
    """Average returns over the tasks that are alike, episode by episode, where there are few kinds
    of task.
    """
    names = [", ".join(f"{k} {v:g}" for k, v in t.as_dict().items()) for t in tasks]
    kinds = sorted(set(names))
    rows = {k: np.array([name == k for name in names]) for k in kinds}
    return (
        {k: returns[:, :, row].mean((0, 2)).tolist() for k, row in rows.items()}
        if len(kinds) <= most
        else {}
    )


def _control(control: str, runs: Sequence[Run], arena: Evaluator) -> list[dict[str, Any]]:
    """Play with the context tampered with between episodes: ``cleared``, or ``swapped`` for another
    task's.

    An agent that lives on its context falls back to its first episode when cleared, and below when
    swapped.
    """
    returns = []
    for run in runs:
        agent = run.load_agent()
        tamper = (
            partial(_cleared, agent) if control == "cleared" else partial(_swapped, arena.tasks)
        )
        returns.append(arena.play(agent, run.rollouts, tamper).returns)
    return episode_rows(np.stack(returns))


def _cleared(agent: Agent, context: Context) -> Context:
    if agent.privileged or not context:
        return context
    return agent.begin(len(context[0]))


def _swapped(tasks: Sequence[Task], context: Context) -> Context:
    """Hand each task the context of the next task that is another."""
    n = len(tasks)
    other = [
        next((j % n for j in range(i + 1, i + n) if tasks[j % n] != tasks[i]), i) for i in range(n)
    ]
    return tuple(x[torch.tensor(other)] for x in context)


def card_results(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return of a report what an agent's card says: split, tasks, and the means of each episode, or
    number of shots.
    """
    if "shots" in report:
        means = {k: round(report[k]["mean"], 4) for k in ("reference", "expert") if k in report}
        shots = {str(r["shots"]): round(r["mean"], 4) for r in report["shots"]}
        return {
            "split": report["split"],
            "tasks": report["tasks"],
            "success_after_shots": shots,
            **means,
        }
    kept = ("mean", "ci95", "oracle", "blind", "score")
    rows = [{k: np.round(r[k], 2).tolist() for k in kept if k in r} for r in report["episodes"]]
    won = {k: [round(r["mean"], 4) for r in v] for k, v in report.get("success", {}).items()}
    return {
        "split": report["split"],
        "tasks": report["tasks"],
        "episodes": rows,
        **({"success": won} if won else {}),
    }


def _one_family(runs: Sequence[Run]) -> Any:
    if not runs:
        raise MetarobotError("evaluation needs at least one run")
    names = {r.family.name for r in runs}
    if len(names) > 1:
        raise MetarobotError(
            f"runs of different families cannot be compared: {', '.join(sorted(names))}"
        )
    return runs[0].family
