"""Evaluation: return after 0 … K−1 episodes on tasks of a split, beside references and controls.

Statistics follow Agarwal et al. (2021): means and interquartile means with stratified bootstrap
intervals, the training seeds being the strata. An agent learns of the task it is tested on from
nothing but its own episodes there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from metarobot.errors import MetarobotError
from metarobot.evaluation.belief_calibration import BeliefRecorder
from metarobot.evaluation.context_ablations import CONTROLS, play_control
from metarobot.evaluation.fine_tuning import count_fine_tuning_trials, fine_tune
from metarobot.evaluation.protocol import (
    Evaluator,
    PlayedReturns,
    Protocol,
    check_faults,
    fault_counts,
    stack_played,
)
from metarobot.evaluation.statistics import (
    LOWER_REFERENCE,
    UPPER_REFERENCE,
    adaptation_score,
    bootstrap_interval,
    episode_rows,
    success_rows,
)
from metarobot.tasks.family import Family
from metarobot.tasks.space import Task
from metarobot.training.collect import ExpertAgent
from metarobot.training.run_folder import Run
from metarobot.types import Floats

EXPERT_REFERENCE = "expert"
"""Name, in reports, of the family's scripted expert."""
MOST_TASK_KINDS = 4
"""Returns are also averaged over equal tasks where there are at most so many different ones."""


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
    """Play the protocol with runs and references, and return the report as JSON data.

    Args:
        runs: The agent, one run a training seed.
        protocol: What is played.
        oracle: Runs of the upper reference, which is shown the task.
        blind: Runs of the lower reference, which cannot adapt.
        finetune: Policies to fine-tune as the first run's agent adapts: see ``fine_tune``.
        controls: Whether to play with cleared and with swapped contexts too.
        tick: Called after each trial that is played; ``count_trials`` says how many these are.

    Raises:
        MetarobotError: Runs of different families, or an oracle that is not shown the task.
        EvaluationError: Actions that are not finite, or more than 5 % of an agent's episodes fault.
    """
    family = _common_family([*runs, *oracle, *blind, *finetune])
    for run in oracle:
        if not run.load_agent().privileged:
            raise MetarobotError(
                f"{oracle[0].folder} is not an oracle: its agent is not shown the task"
            )

    evaluator = Evaluator(family, protocol, tick)
    beliefs = BeliefRecorder(family.space, evaluator.tasks)
    agent = evaluator.play_all(runs, beliefs.watch)
    references = _play_references(evaluator, oracle, blind)

    # A faulted episode is worth the worst return of the family that anybody got.
    worst = evaluator.worst_return
    agent = agent.with_worst(worst)
    references = {name: played.with_worst(worst) for name, played in references.items()}
    returns = agent.returns

    report: dict[str, Any] = {
        "family": family.name,
        "split": protocol.split,
        "agent": runs[0].agent,
        "runs": [run.name for run in runs],
        "seeds": [run.train_config.seed for run in runs],
        "steps": [run.steps for run in runs],
        "tasks": len(evaluator.tasks),
        "rollouts": runs[0].rollouts,
        "quiet": protocol.quiet,
        "task_values": [task.as_dict() for task in evaluator.tasks],
        "space": family.space.hash,
        "episodes": episode_rows(returns),
        "kinds": _returns_by_task_kind(evaluator.tasks, returns),
        "returns": returns.round(3).tolist(),
    }
    belief_report = beliefs.report()
    if belief_report:
        report["beliefs"] = belief_report

    report["faults"] = {"agent": fault_counts(agent)}
    for name, played in references.items():
        report["faults"][name] = fault_counts(played)

    if agent.success is not None:
        report["success"] = {"agent": success_rows(agent.success)}
        for name, played in references.items():
            rates = [] if played.success is None else success_rows(played.success)
            report["success"][name] = rates

    _add_references(report["episodes"], returns, references)
    if finetune:
        report["finetuning"] = fine_tune(runs, finetune, evaluator)
    if controls:
        report["controls"] = {name: play_control(name, runs, evaluator) for name in CONTROLS}
    return report


def _play_references(
    evaluator: Evaluator, oracle: Sequence[Run], blind: Sequence[Run]
) -> dict[str, PlayedReturns]:
    """Play with the references, and with the family's expert if it has one."""
    references: dict[str, PlayedReturns] = {}
    if oracle:
        references[UPPER_REFERENCE] = evaluator.play_all(oracle)
    if blind:
        references[LOWER_REFERENCE] = evaluator.play_all(blind)
    if evaluator.family.teaching.expert is not None:
        expert = ExpertAgent(evaluator.env())
        played = stack_played([evaluator.play(expert, name=EXPERT_REFERENCE)])
        check_faults(played, EXPERT_REFERENCE)
        references[EXPERT_REFERENCE] = played
    return references


def count_trials(
    runs: int, oracle: int, blind: int, finetune: int, controls: bool, expert: bool
) -> int:
    """Count the trials that an evaluation of so many runs of each sort plays."""
    trials = runs + oracle + blind
    if expert:
        trials += 1
    if finetune:
        # As many untrained policies are fine-tuned as there are runs.
        trials += count_fine_tuning_trials(finetune + runs)
    if controls:
        trials += len(CONTROLS) * runs
    return trials


def _add_references(
    rows: list[dict[str, Any]], returns: Floats, references: Mapping[str, PlayedReturns]
) -> None:
    """Add the references' returns to each episode's row, and the score where it is defined."""
    scored = UPPER_REFERENCE in references and LOWER_REFERENCE in references
    for k, row in enumerate(rows):
        for name, played in references.items():
            values = played.returns[:, k]
            row[name] = float(values.mean())
            row[f"{name}_ci95"] = bootstrap_interval(values, np.mean)

        if scored:
            upper = references[UPPER_REFERENCE].returns[:, k]
            lower = references[LOWER_REFERENCE].returns[:, k]
            row.update(adaptation_score(returns[:, k], upper, lower))
            # What knowing the task is worth, task by task.
            worth = upper.mean(axis=0, keepdims=True) - lower.mean(axis=0, keepdims=True)
            row["worth"] = float(worth.mean())
            row["worth_ci95"] = bootstrap_interval(worth, np.mean)


def _returns_by_task_kind(tasks: Sequence[Task], returns: Floats) -> dict[str, list[float]]:
    """Average returns ``(run, episode, task)`` over equal tasks, if there are few different ones.

    Returns:
        Parameter values in words -> mean return of each episode; empty for many different tasks.
    """
    names = []
    for task in tasks:
        names.append(", ".join(f"{name} {value:g}" for name, value in task.as_dict().items()))
    kinds = sorted(set(names))
    if len(kinds) > MOST_TASK_KINDS:
        return {}

    means = {}
    for kind in kinds:
        of_this_kind = np.array([name == kind for name in names])
        means[kind] = returns[:, :, of_this_kind].mean(axis=(0, 2)).tolist()
    return means


def card_results(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a report that goes on an agent's card: its means.

    Takes a report of ``evaluate`` or of ``few_shot``.
    """
    results: dict[str, Any] = {"split": report["split"], "tasks": report["tasks"]}
    if "shots" in report:
        results["success_after_shots"] = {
            str(row["shots"]): round(row["mean"], 4) for row in report["shots"]
        }
        for name in ("reference", "expert"):
            if name in report:
                results[name] = round(report[name]["mean"], 4)
        return results

    kept = ("mean", "ci95", UPPER_REFERENCE, LOWER_REFERENCE, "score")
    results["episodes"] = []
    for row in report["episodes"]:
        rounded = {key: np.round(row[key], 2).tolist() for key in kept if key in row}
        results["episodes"].append(rounded)

    success = report.get("success", {})
    if success:
        results["success"] = {
            name: [round(row["mean"], 4) for row in rows] for name, rows in success.items()
        }
    return results


def _common_family(runs: Sequence[Run]) -> Family:
    """Return the family that all runs were trained on; raise if there are several."""
    if not runs:
        raise MetarobotError("evaluation needs at least one run")
    names = sorted({run.family.name for run in runs})
    if len(names) > 1:
        raise MetarobotError(f"runs of different families cannot be compared: {', '.join(names)}")
    return runs[0].family
