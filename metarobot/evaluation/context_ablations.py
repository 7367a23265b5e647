"""Controls of an evaluation: contexts cleared, or swapped for another task's, between episodes.

An agent that relies on its context falls back to its first episode when the context is cleared, and
below that when it is swapped. One that does not was not adapting.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from metarobot.evaluation.protocol import Evaluator, check_faults, stack_played
from metarobot.evaluation.statistics import episode_rows
from metarobot.learning.agent_interface import Agent, Context
from metarobot.tasks.space import Task
from metarobot.training.run_folder import Run

CONTROLS = ("cleared", "swapped")
"""Ways to change a context between episodes."""


def play_control(control: str, runs: Sequence[Run], evaluator: Evaluator) -> list[dict[str, Any]]:
    """Play with the context changed after each episode, and summarise episode by episode."""
    played = []
    for run in runs:
        agent = run.load_agent()

        def change(context: Context, agent: Agent = agent) -> Context:
            if control == "cleared":
                return clear_context(agent, context)
            return swap_contexts(evaluator.tasks, context)

        name = f"{run.name}, contexts {control}"
        played.append(evaluator.play(agent, run.rollouts, change, name))
    stacked = stack_played(played)
    check_faults(stacked, f"contexts {control}")
    return episode_rows(stacked.with_worst(evaluator.worst_return).returns)


def clear_context(agent: Agent, context: Context) -> Context:
    """Return the context of a new trial; a privileged agent keeps the task it is shown."""
    if agent.privileged or not context:
        return context
    tasks = len(context[0])
    return agent.begin(tasks)


def swap_contexts(tasks: Sequence[Task], context: Context) -> Context:
    """Give each task the context of the next task in the list that is a different one."""
    count = len(tasks)
    donors = []
    for i in range(count):
        donor = i  # keep the own context where all tasks are the same
        for j in range(i + 1, i + count):
            if tasks[j % count] != tasks[i]:
                donor = j % count
                break
        donors.append(donor)
    rows = torch.tensor(donors)
    return tuple(values[rows] for values in context)
