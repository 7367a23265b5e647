"""K-shot imitation measured: adapt to K demonstrations of every variant, then do each variant and
see what succeeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from metarobot.env.base import Env
from metarobot.evaluation.statistics import bootstrap_interval
from metarobot.learning.agent_interface import Agent, Context
from metarobot.training.collect import ExpertAgent, collect
from metarobot.training.demonstrations import Demonstrations, DemosError
from metarobot.training.run_folder import Run
from metarobot.types import Floats


class _Primed:
    """An agent whose trials begin with a context that it already has."""

    def __init__(self, agent: Any, context: Context) -> None:
        self.privileged, self.explores, self.act, self.adapt = (
            False,
            agent.explores,
            agent.act,
            agent.adapt,
        )
        self._context = context

    def begin(self, worlds: int, task: Any = None) -> Context:
        """Return what has been learned."""
        return self._context


def few_shot(
    run: Run,
    demos: Demonstrations,
    *,
    shots: Sequence[int] = (1, 5),
    reference: Run | None = None,
    seed: int = 0,
    threads: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Return the share of episodes that succeed after each number of shots, with intervals over
    tasks, as JSON data.

    ``reference`` is of a family with the same tasks whose agent is shown the answer; it adapts to
    nothing. The expert plays too. ``chance``: one variant's answer in so many.
    """
    agent = run.load_agent()
    if not getattr(agent, "imitates", False):
        raise DemosError(
            f"{run.folder} does not imitate: its agent is {run.agent!r}; train one as imitation"
        )
    if demos.family.name != run.family.name:
        raise DemosError(
            f"demonstrations of {demos.family.name} are no use to an agent of {run.family.name}"
        )
    for k in shots:
        if not 1 <= k <= demos.shots:
            raise DemosError(
                f"{k} shots were asked for; the dataset holds 1 to {demos.shots} of every variant"
            )
    tasks = range(len(demos.tasks))
    scene = _Stage(run, demos, seed, threads)
    rows = []
    for k in (0, *shots):
        context = agent.begin(len(tasks))
        if k:
            context = agent.adapt(
                context, demos.rollout(tasks, torch.arange(k).expand(len(tasks), k))
            )
        rows.append({"shots": k, **scene.success(_Primed(agent, context))})
        tick()
    report: dict[str, Any] = {
        "family": run.family.name,
        "agent": run.agent,
        "run": run.name,
        "steps": int(run.config["steps"]),
        "split": demos.split,
        "tasks": len(tasks),
        "chance": 1 / run.family.interaction.variants,
        "shots": rows,
        "expert": scene.success(ExpertAgent(scene.env)),
    }
    if reference is not None:
        shown = _Stage(reference, demos, seed, threads)
        policy = reference.load_agent()
        if policy.privileged or (policy.begin(1) and not getattr(policy, "imitates", False)):
            raise DemosError(
                f"{reference.folder} is no reference: {reference.agent} is told the task, or remembers"
            )
        report["reference"] = {
            "run": reference.name,
            **shown.success(_Primed(policy, policy.begin(len(tasks)))),
        }
        for row in rows:
            row["of_reference"] = row["mean"] / max(report["reference"]["mean"], 1e-9)
    return report


class _Stage:
    """Worlds of one family in the tasks of demonstrations, one for every variant."""

    def __init__(self, run: Run, demos: Demonstrations, seed: int, threads: int) -> None:
        self.tasks = [run.family.space.coerce(t.as_dict()) for t in demos.tasks]
        self.variants, self.seed = run.family.interaction.variants, seed
        self.env = Env(
            run.family, [t for t in self.tasks for _ in range(self.variants)], threads=threads
        )

    def success(self, agent: Agent) -> dict[str, Any]:
        """Return how often every variant of every task succeeds, with the interval over tasks."""
        variant = torch.arange(self.variants).repeat(len(self.tasks))
        trials = collect(
            agent,
            self.env,
            self.tasks,
            episodes=1,
            seed=self.seed,
            rollouts=self.variants,
            explore=False,
            variant=variant,
        )
        won: Floats = (
            trials.totals("success")
            .view(1, len(self.tasks), self.variants)
            .mean(2)
            .double()
            .numpy()
        )
        return {"mean": float(won.mean()), "ci95": bootstrap_interval(won, np.mean)}
