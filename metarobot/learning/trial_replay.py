"""What off-policy learners remember: whole trials, one a row, the oldest written over first."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from metarobot.errors import MetarobotError
from metarobot.learning.agent_interface import Dimensions
from metarobot.resources import check_replay_memory
from metarobot.types import Rollout, Trials


class Transitions(NamedTuple):
    """Transitions of several tasks, ``(task, step, ...)``; ``terminated`` is 1.0 where the episode
    failed.

    A time limit is no failure: ``next_obs`` is then the observation before the reset, and its value
    counts.
    """

    obs: Tensor
    action: Tensor
    reward: Tensor
    terminated: Tensor
    next_obs: Tensor


class TrialReplay:
    """Transitions of the last so many trials, in one tensor taken up at once.

    Each episode of a row has a slot for every step, and one more for the observation the last step
    led to. A step and what follows it stand side by side: observations are held once, and one
    gather brings both.
    """

    def __init__(self, shapes: Dimensions, transitions: int, at_once: int = 1) -> None:
        self._sizes = [shapes.obs, shapes.act, 1, 1]
        self._slots = shapes.horizon + 1
        self.rows = transitions // (shapes.horizon * shapes.episodes)
        if self.rows < at_once:
            raise MetarobotError(
                f"replay = {transitions:,} does not hold the {at_once} trials of an iteration, "
                f"{shapes.episodes} x {shapes.horizon} transitions each"
            )
        shape = (self.rows, shapes.episodes * self._slots, sum(self._sizes))
        check_replay_memory(transitions, 4 * shape[0] * shape[1] * shape[2])
        self._data = torch.zeros(shape)
        self._length = torch.zeros(self.rows, shapes.episodes, dtype=torch.int64)
        self._task = torch.zeros(self.rows, shapes.task)
        self.count = 0
        """Trials ever added."""

    def __len__(self) -> int:
        """Return the number of trials that are held."""
        return min(self.count, self.rows)

    @property
    def transitions(self) -> int:
        """Transitions held."""
        return int(self._length.sum())

    def add(self, trials: Trials) -> None:
        """Write trials down, one a world, over the oldest."""
        worlds = len(trials.task)
        rows = (self.count + torch.arange(worlds)) % self.rows
        self._task[rows] = trials.task.cpu()
        for k, episode in enumerate(trials.episodes):
            self._length[rows, k] = episode.valid.sum(0).cpu()
            self._data[rows, k * self._slots : (k + 1) * self._slots] = self._written(episode)
        self.count += worlds

    def _written(self, episode: Rollout) -> Tensor:
        """Return an episode as slots ``(world, slot, number)``."""
        time, worlds = episode.valid.shape
        slots = torch.zeros(worlds, self._slots, sum(self._sizes))
        parts = (
            episode.obs,
            episode.action,
            episode.reward[..., None],
            episode.terminated[..., None].float(),
        )
        slots[:, :time] = (torch.cat(parts, -1) * episode.valid[..., None]).transpose(0, 1).cpu()
        slots[torch.arange(worlds), episode.valid.sum(0).cpu(), : self._sizes[0]] = (
            episode.final_obs.cpu()
        )
        return slots

    def draw(self, tasks: int, recent: int, generator: torch.Generator) -> Tensor:
        """Draw trials ``(task,)``: every second one among the ``recent`` youngest, the others among
        all.
        """
        held = len(self)
        span = torch.full((tasks,), held)
        span[::2] = min(recent, held)
        age = (torch.rand(tasks, generator=generator) * span).long().clamp_max(held - 1)
        return (self.count - 1 - age) % self.rows

    def pick(self, rows: Tensor, steps: int, episodes: int, generator: torch.Generator) -> Tensor:
        """Draw transitions of the first ``episodes`` episodes of each trial, with replacement:
        ``(task, step)``.
        """
        ends = self._length[rows, :episodes].cumsum(1)
        n = (
            (torch.rand(len(rows), steps, generator=generator) * ends[:, -1:])
            .long()
            .minimum(ends[:, -1:] - 1)
        )
        episode = (n[..., None] >= ends[:, None]).sum(-1)
        before = (ends - self._length[rows, :episodes]).gather(1, episode)
        return rows[:, None] * self._data.shape[1] + episode * self._slots + n - before

    def steps(self, picked: Tensor) -> Transitions:
        """Return the transitions that were picked."""
        rows, slots, width = self._data.shape
        pairs = self._data.view(-1).as_strided((rows * slots - 1, 2 * width), (width, 1))[picked]
        step, after = pairs.chunk(2, -1)
        obs, action, reward, terminated = torch.split(step, self._sizes, -1)
        return Transitions(
            obs, action, reward[..., 0], terminated[..., 0], after[..., : self._sizes[0]]
        )

    def task(self, rows: Tensor) -> Tensor:
        """Return the tasks' encodings ``(task, parameter)``: labels."""
        return self._task[rows]

    def state(self) -> dict[str, Tensor]:
        """Return what is held, a copy of it, as named tensors."""
        held = {"data": self._data, "length": self._length, "task": self._task}
        return {
            "count": torch.tensor(self.count),
            **{k: v[: len(self)].clone() for k, v in held.items()},
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what ``state`` returned, exactly."""
        self.count = int(state["count"])
        for k, v in (("data", self._data), ("length", self._length), ("task", self._task)):
            v[: len(self)] = state[k]
