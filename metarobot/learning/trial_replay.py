"""Replay buffer of off-policy learners: whole trials, the oldest overwritten first."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from metarobot.errors import MetarobotError
from metarobot.learning.agent_interface import Dimensions
from metarobot.threads_and_memory import check_replay_memory
from metarobot.types import Rollout, Trials


class Transitions(NamedTuple):
    """Transitions of several tasks, ``(task, step, ...)``."""

    obs: Tensor
    """Observations, ``(task, step, obs)``."""
    action: Tensor
    """Actions, ``(task, step, act)``."""
    reward: Tensor
    """Rewards, ``(task, step)``."""
    terminated: Tensor
    """1.0 where the episode failed, ``(task, step)``. A time limit is no failure: the value of
    ``next_obs`` then counts."""
    next_obs: Tensor
    """Observations that the steps led to, before any reset, ``(task, step, obs)``."""


class TrialReplay:
    """The transitions of the most recent trials, in one tensor that is allocated at once.

    A row holds a trial. Each episode has a slot for every step up to the horizon, and one more for
    the observation that the last step led to. As a step and its successor are in adjacent slots,
    observations are stored once and one gather returns both.
    """

    def __init__(self, dims: Dimensions, transitions: int, min_trials: int = 1) -> None:
        """Allocate the memory.

        Args:
            dims: Sizes of what is stored; ``horizon`` and ``episodes`` bound a trial.
            transitions: Capacity in transitions; whole trials are stored.
            min_trials: Trials that the replay must hold at least.

        Raises:
            MetarobotError: The capacity is less than ``min_trials``, or more than free memory.
        """
        self._obs_dim = dims.obs
        self._field_sizes = [dims.obs, dims.act, 1, 1]  # obs, action, reward, terminated
        self._episode_slots = dims.horizon + 1
        self.capacity = transitions // (dims.horizon * dims.episodes)
        """Trials that the replay can hold."""
        if self.capacity < min_trials:
            raise MetarobotError(
                f"replay = {transitions:,} does not hold the {min_trials} trials of an iteration, "
                f"{dims.episodes} x {dims.horizon} transitions each"
            )

        trial_slots = dims.episodes * self._episode_slots
        slot_size = sum(self._field_sizes)
        check_replay_memory(transitions, 4 * self.capacity * trial_slots * slot_size)
        self._data = torch.zeros(self.capacity, trial_slots, slot_size)
        self._length = torch.zeros(self.capacity, dims.episodes, dtype=torch.int64)
        self._task = torch.zeros(self.capacity, dims.task)
        self.count = 0
        """Trials ever added."""

    def __len__(self) -> int:
        """Return the number of trials stored."""
        return min(self.count, self.capacity)

    @property
    def transition_count(self) -> int:
        """Number of transitions stored."""
        return int(self._length.sum())

    def add(self, trials: Trials) -> None:
        """Store trials, one for each world, in place of the oldest."""
        # the trial with number n is in row n modulo the capacity
        worlds = len(trials.task)
        rows = (self.count + torch.arange(worlds)) % self.capacity
        self._task[rows] = trials.task.cpu()
        for k, episode in enumerate(trials.episodes):
            first_slot = k * self._episode_slots
            slots = slice(first_slot, first_slot + self._episode_slots)
            self._length[rows, k] = episode.valid.sum(0).cpu()
            self._data[rows, slots] = self._pack_episode(episode)
        self.count += worlds

    def _pack_episode(self, episode: Rollout) -> Tensor:
        """Return an episode as slots ``(world, slot, field)``; padding is zero."""
        time, worlds = episode.valid.shape
        fields = torch.cat(
            [
                episode.obs,
                episode.action,
                episode.reward[..., None],
                episode.terminated[..., None].float(),
            ],
            -1,
        )
        # NaN in the padding times zero is NaN, but no index ever leads there
        fields = fields * episode.valid[..., None]
        length = episode.valid.sum(0).cpu()

        slots = torch.zeros(worlds, self._episode_slots, sum(self._field_sizes))
        slots[:, :time] = fields.transpose(0, 1).cpu()
        slots[torch.arange(worlds), length, : self._obs_dim] = episode.final_obs.cpu()
        return slots

    def sample_trials(self, count: int, recent: int, generator: torch.Generator) -> Tensor:
        """Sample rows ``(task,)`` with replacement.

        Every second one is among the ``recent`` newest trials, the others are among all.
        """
        stored = len(self)
        span = torch.full((count,), stored)
        span[::2] = min(recent, stored)
        age = (torch.rand(count, generator=generator) * span).long().clamp_max(stored - 1)
        return (self.count - 1 - age) % self.capacity

    def sample_transitions(
        self, rows: Tensor, steps: int, episodes: int, generator: torch.Generator
    ) -> Tensor:
        """Sample transitions of each trial's first ``episodes`` episodes, with replacement.

        Returns:
            Indices ``(task, step)`` for ``transitions_at``.
        """
        length = self._length[rows, :episodes]
        episode_end = length.cumsum(1)
        total = episode_end[:, -1:]

        # number a trial's transitions through, sample one, and find its episode and step
        uniform = torch.rand(len(rows), steps, generator=generator)
        number = (uniform * total).long().minimum(total - 1)
        episode = (number[..., None] >= episode_end[:, None]).sum(-1)
        episode_start = (episode_end - length).gather(1, episode)
        slot = episode * self._episode_slots + number - episode_start
        return rows[:, None] * self._data.shape[1] + slot

    def transitions_at(self, indices: Tensor) -> Transitions:
        """Return the transitions at indices ``(task, step)``."""
        rows, slots, slot_size = self._data.shape
        # overlapping view: element i is slot i followed by slot i + 1
        pairs = self._data.view(-1).as_strided((rows * slots - 1, 2 * slot_size), (slot_size, 1))
        step, next_step = pairs[indices].chunk(2, -1)
        obs, action, reward, terminated = torch.split(step, self._field_sizes, -1)
        return Transitions(
            obs=obs,
            action=action,
            reward=reward[..., 0],
            terminated=terminated[..., 0],
            next_obs=next_step[..., : self._obs_dim],
        )

    def task(self, rows: Tensor) -> Tensor:
        """Return the encodings ``(task, parameter)`` of the trials' tasks."""
        return self._task[rows]

    def state(self) -> dict[str, Tensor]:
        """Return a copy of what is stored as named tensors."""
        state = {"count": torch.tensor(self.count)}
        for name, tensor in self._tensors().items():
            state[name] = tensor[: len(self)].clone()
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what ``state`` returned, exactly."""
        self.count = int(state["count"])
        for name, tensor in self._tensors().items():
            tensor[: len(self)] = state[name]

    def _tensors(self) -> dict[str, Tensor]:
        return {"data": self._data, "length": self._length, "task": self._task}
