"""Transfer learning as a baseline: policies that adapt by gradient steps from other weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from metarobot.errors import MetarobotError
from metarobot.evaluation.protocol import (
    EvaluationError,
    Evaluator,
    PlayedReturns,
    check_faults,
    fault_counts,
    stack_played,
)
from metarobot.evaluation.statistics import episode_rows
from metarobot.learning.agent_interface import FineTunes, is_memoryless
from metarobot.training.run_folder import Run

STEP_SIZES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Step sizes tried on training tasks."""


def count_fine_tuning_trials(policies: int) -> int:
    """Count the trials played to fine-tune so many policies: each step size, then the best."""
    return (len(STEP_SIZES) + 1) * policies


def fine_tune(
    runs: Sequence[Run], pretrained: Sequence[Run], evaluator: Evaluator
) -> dict[str, Any]:
    """Adapt as the runs do, but from the weights of pretrained and of untrained policies.

    They meet the same episodes and take the same gradient steps; see ``play_fine_tuned``.

    Returns:
        ``pretrained`` and ``from scratch`` -> its step size and its returns, as JSON data.
    """
    report = {}
    for name, tuned in play_fine_tuned(runs, pretrained, evaluator).items():
        played = tuned.played.with_worst(evaluator.worst_return)
        report[name] = {
            "inner_lr": tuned.step_size,
            "episodes": episode_rows(played.returns),
            "returns": played.returns.round(3).tolist(),
            "faults": fault_counts(played),
        }
    return report


class FineTuned(NamedTuple):
    """A fine-tuned policy, and what it earned."""

    step_size: float
    """The step size that it was fine-tuned with."""
    played: PlayedReturns
    """Its results ``(policy, episode, task)``."""


def play_fine_tuned(
    runs: Sequence[Run], pretrained: Sequence[Run], evaluator: Evaluator
) -> dict[str, FineTuned]:
    """Play with the pretrained and with untrained policies, fine-tuned as the runs adapt.

    The step size of each is that of ``STEP_SIZES`` which earns most on training tasks.

    Returns:
        ``pretrained`` and ``from scratch`` -> its results.

    Raises:
        MetarobotError: The runs do not adapt by gradient steps, or the policies have a memory.
    """
    if evaluator.protocol.episodes < 2:
        raise MetarobotError(
            "fine-tuning needs at least 2 episodes: one to adapt to, one to show it"
        )
    method = runs[0].load_agent()
    if not isinstance(method, FineTunes):
        raise MetarobotError(
            f"agent {runs[0].agent!r} has no gradient steps to fine-tune with; maml, for one, has"
        )

    trained_policies = [run.load_agent() for run in pretrained]
    if not all(is_memoryless(policy) for policy in trained_policies):
        raise MetarobotError(
            f"{pretrained[0].folder} holds no policy to fine-tune: take one trained as ppo or blind"
        )
    untrained_policies = [run.learner().agent.policy for run in runs]
    rollouts = runs[0].rollouts

    # Step sizes are chosen on training tasks, other ones than any that count.
    tuning_protocol = replace(evaluator.protocol, split="train", seed=evaluator.protocol.seed + 1)
    tuning_evaluator = Evaluator(evaluator.family, tuning_protocol, evaluator.tick)

    results = {}
    for name, policies in (
        ("pretrained", trained_policies),
        ("from scratch", untrained_policies),
    ):

        def return_after_adapting(step_size: float, policies: Sequence[Any] = policies) -> float:
            """Return the mean over all episodes after the first, on training tasks."""
            try:
                played = _play_tuned(tuning_evaluator, method, policies, rollouts, step_size)
            except EvaluationError:
                # A step size that breaks all episodes is not the best one.
                return -math.inf
            return float(played.returns[:, 1:].mean())

        best_step_size = max(STEP_SIZES, key=return_after_adapting)
        played = _play_tuned(evaluator, method, policies, rollouts, best_step_size)
        check_faults(played, f"fine-tuning, {name}")
        results[name] = FineTuned(best_step_size, played)
    return results


def _play_tuned(
    evaluator: Evaluator,
    method: FineTunes,
    policies: Sequence[Any],
    rollouts: int,
    step_size: float,
) -> PlayedReturns:
    """Play with each policy fine-tuned; return arrays ``(policy, episode, task)``."""
    played = []
    for policy in policies:
        agent = method.fine_tuned_from(policy, step_size)
        played.append(evaluator.play(agent, rollouts, name="fine-tuning"))
    return stack_played(played)
