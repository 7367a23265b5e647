"""Transfer learning as a reference: policies adapted by gradient steps from other initial
weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from metarobot.errors import MetarobotError
from metarobot.evaluation.protocol import Evaluator, stack_played
from metarobot.evaluation.statistics import episode_rows
from metarobot.training.run_folder import Run
from metarobot.types import Floats

STEP_SIZES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Step sizes tried for fine-tuning."""


def fine_tune(runs: Sequence[Run], pretrained: Sequence[Run], arena: Evaluator) -> dict[str, Any]:
    """Adapt from other initial weights as the runs do: those of pretrained policies, and untrained
    ones.

    The same episodes, the same gradient steps; the step size of each is the best of ``RATES`` on
    training tasks.
    """
    if arena.protocol.episodes < 2:
        raise MetarobotError(
            "fine-tuning needs at least 2 episodes: one to adapt to, one to show it"
        )
    method = runs[0].load_agent()
    if not hasattr(method, "fine_tuned_from"):
        raise MetarobotError(
            f"agent {runs[0].agent!r} has no gradient steps to fine-tune with; maml, for one, has"
        )
    fresh = [r.learner().agent.policy for r in runs]
    policies = {"pretrained": [r.load_agent() for r in pretrained], "from scratch": fresh}
    if any(p.privileged or not hasattr(p, "actor") or p.begin(1) for p in policies["pretrained"]):
        raise MetarobotError(
            f"{pretrained[0].folder} holds no policy to fine-tune: take one trained as ppo or blind"
        )
    practice = Evaluator(
        arena.family,
        replace(arena.protocol, split="train", seed=arena.protocol.seed + 1),
        arena.tick,
    )
    report = {}
    for name, group in policies.items():
        best = max(STEP_SIZES, key=partial(_adapted, practice, method, group, runs[0].rollouts))
        returns = _tuned(arena, method, group, runs[0].rollouts, best)
        report[name] = {
            "inner_lr": best,
            "episodes": episode_rows(returns),
            "returns": returns.round(3).tolist(),
        }
    return report


def _tuned(
    arena: Evaluator, method: Any, policies: Sequence[Any], rollouts: int, rate: float
) -> Floats:
    return stack_played(
        arena.play(method.fine_tuned_from(p, rate), rollouts) for p in policies
    ).returns


def _adapted(
    arena: Evaluator, method: Any, policies: Sequence[Any], rollouts: int, rate: float
) -> float:
    """Return what is earned after the first episode, over all later ones."""
    return float(_tuned(arena, method, policies, rollouts, rate)[:, 1:].mean())
