"""K-shot imitation: success of every variant of a task after K demonstrations of each variant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metarobot.env.factory import make_env
from metarobot.evaluation.protocol import check_actions, check_fault_count, faulted_episodes
from metarobot.evaluation.statistics import bootstrap_interval
from metarobot.learning.agent_interface import Agent, Context, agents
from metarobot.training.collect import ExpertAgent, collect
from metarobot.training.demonstrations import Demonstrations, DemosError
from metarobot.training.run_folder import Run
from metarobot.types import Floats, Percept, Rollout


class AdaptedAgent:
    """An agent whose trials begin with a context that it has adapted already."""

    privileged = False

    def __init__(self, agent: Agent, context: Context) -> None:
        self.explores = agent.explores
        self._agent = agent
        self._context = context

    def begin(self, worlds: int, task: Tensor | None = None) -> Context:
        """Return the adapted context."""
        return self._context

    def act(
        self, percept: Percept, context: Context, noise: Tensor | None = None
    ) -> tuple[Tensor, Context]:
        """Act as the agent does."""
        return self._agent.act(percept, context, noise)

    def adapt(self, context: Context, episode: Rollout) -> Context:
        """Adapt as the agent does."""
        return self._agent.adapt(context, episode)


def few_shot(
    run: Run,
    demos: Demonstrations,
    *,
    shots: Sequence[int] = (1, 5),
    reference: Run | None = None,
    seed: int = 0,
    threads: int = 0,
    sim: str = "cpu",
    device: str = "cpu",
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measure the success rate after each number of demonstrations, with intervals over tasks.

    The family's expert plays too. ``chance`` in the report is the rate of an agent that guesses:
    one in as many as there are variants.

    Args:
        run: A run of an agent that imitates.
        demos: Demonstrations of the tasks to be tested in.
        shots: Numbers of demonstrations of every variant to adapt to.
        reference: A run of a family with the same tasks whose policy is shown the answer and adapts
            to nothing.
        seed: Seed of the starts.
        threads: Physics threads on the CPU; 0 takes all there are.
        sim: Simulator, ``cpu`` or ``warp``.
        device: Where Warp simulates, ``cpu`` or ``cuda``.
        tick: Called after each number of demonstrations; none at all is the first.

    Returns:
        The report as JSON data.

    Raises:
        DemosError: A run that does not imitate, or demonstrations that do not fit it.
    """
    _check_run(run, demos, shots)
    agent = run.load_agent()
    stage = _VariantStage(run, demos, seed=seed, threads=threads, sim=sim, device=device)
    stage.move_agent(agent)
    tasks = range(len(demos.tasks))

    rows = []
    for count in (0, *shots):
        context = agent.begin(len(tasks))
        if count > 0:
            # The first ``count`` demonstrations of every variant of each task.
            chosen = torch.arange(count).expand(len(tasks), count)
            demonstrations = demos.rollout(tasks, chosen).to(str(stage.env.device))
            context = agent.adapt(context, demonstrations)
        success = stage.success(AdaptedAgent(agent, context), run.name)
        rows.append({"shots": count, **success})
        tick()

    report: dict[str, Any] = {
        "family": run.family.name,
        "agent": run.agent,
        "run": run.name,
        "steps": run.train_config.steps,
        "split": demos.split,
        "tasks": len(tasks),
        "chance": 1 / run.family.interaction.variants,
        "shots": rows,
        "expert": stage.success(ExpertAgent(stage.env), "expert"),
    }
    if reference is None:
        return report

    reference_stage = _VariantStage(
        reference, demos, seed=seed, threads=threads, sim=sim, device=device
    )
    policy = reference.load_agent()
    reference_stage.move_agent(policy)
    # An agent that imitates has a context, its weights, but does not change it while it acts.
    remembers = bool(policy.begin(1)) and not agents.get(reference.agent).imitates
    if policy.privileged or remembers:
        raise DemosError(
            f"{reference.folder} is no reference: {reference.agent} is told the task, or remembers"
        )
    adapted = AdaptedAgent(policy, policy.begin(len(tasks)))
    success = reference_stage.success(adapted, reference.name)
    report["reference"] = {"run": reference.name, **success}
    for row in rows:
        row["of_reference"] = row["mean"] / max(success["mean"], 1e-9)
    return report


def _check_run(run: Run, demos: Demonstrations, shots: Sequence[int]) -> None:
    """Raise ``DemosError`` for a run and demonstrations that do not fit together."""
    if not agents.get(run.agent).imitates:
        raise DemosError(
            f"{run.folder} does not imitate: its agent is {run.agent!r}; train one as imitation"
        )
    if demos.family.name != run.family.name:
        raise DemosError(
            f"demonstrations of {demos.family.name} are no use to an agent of {run.family.name}"
        )
    for count in shots:
        if not 1 <= count <= demos.shots:
            raise DemosError(
                f"{count} shots were asked for; the dataset holds 1 to {demos.shots} "
                "of every variant"
            )


class _VariantStage:
    """An environment with one world for every variant of every demonstrated task."""

    def __init__(
        self, run: Run, demos: Demonstrations, *, seed: int, threads: int, sim: str, device: str
    ) -> None:
        self.seed = seed
        self.variants = run.family.interaction.variants
        self.tasks = [run.family.space.coerce(task.as_dict()) for task in demos.tasks]
        self.env = make_env(
            run.family,
            [task for task in self.tasks for _ in range(self.variants)],
            sim=sim,
            device=device,
            threads=threads,
        )

    def move_agent(self, agent: Agent) -> None:
        """Move an agent's weights to the environment's device."""
        if isinstance(agent, torch.nn.Module):
            agent.to(self.env.device)

    def success(self, agent: Agent, name: str) -> dict[str, Any]:
        """Return the success rate over variants and tasks, with its interval over tasks.

        ``name`` is what the agent is called in messages.

        Raises:
            EvaluationError: Actions that are not finite, or too many faulted episodes.
        """
        trials = collect(
            agent,
            self.env,
            self.tasks,
            episodes=1,
            seed=self.seed,
            rollouts=self.variants,
            explore=False,
            variant=torch.arange(self.variants).repeat(len(self.tasks)),
        )
        check_actions(trials, name)
        faulted = faulted_episodes(trials)
        faults = int(faulted.sum())
        check_fault_count(faults, faults / faulted.numel(), name)

        # A faulted episode is a failure, whatever was reached before.
        successes = torch.where(faulted, 0.0, trials.totals("success"))
        by_variant = successes.view(1, len(self.tasks), self.variants)
        rates: Floats = by_variant.mean(2).double().cpu().numpy()
        return {
            "mean": float(rates.mean()),
            "ci95": bootstrap_interval(rates, np.mean),
            "faults": faults,
        }
