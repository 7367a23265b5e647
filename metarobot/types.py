"""The tensors that the packages exchange: percepts, rollouts and trials.

The first axis is the world, ``(world, ...)``. Only a rollout puts time before it, ``(time, world,
...)``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from metarobot.errors import MetarobotError as MetarobotError
from metarobot.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

Floats = NDArray[np.float64]
"""An array of float64."""

_COPIES: dict[tuple[int, torch.dtype, torch.device], tuple[object, Tensor]] = {}


def constant_like(constant: Tensor | NDArray[Any], x: Tensor) -> Tensor:
    """Return a module's constant with the dtype and on the device of ``x``.

    ``constant`` is a tensor or an array that lives as long as the program. It is converted once for
    each dtype and device; later calls return the same tensor, which must not be written to.
    """
    key = (id(constant), x.dtype, x.device)
    if key not in _COPIES:
        # the constant itself is kept beside its copy, so that no other object can get its id
        _COPIES[key] = (constant, torch.as_tensor(constant).to(x))
    return _COPIES[key][1]


class Percept(NamedTuple):
    """What an agent receives at one step, all of it known to a real robot too.

    Shapes: obs ``(world, obs)``; action ``(world, act)``, the last one sent; reward ``(world,)``,
    the one that action earned; done ``(world,)``, 1.0 on the first step of every episode but the
    trial's first; first ``(world,)``, 1.0 on the first step of a trial.
    """

    obs: Tensor
    action: Tensor
    reward: Tensor
    done: Tensor
    first: Tensor

    @classmethod
    def at_trial_start(cls, obs: Tensor, act_dim: int) -> Percept:
        """Return the percept of a trial's first step, before any action or reward."""
        zeros = obs.new_zeros(obs.shape[:-1])
        no_action = obs.new_zeros(*obs.shape[:-1], act_dim)
        return cls(obs, no_action, reward=zeros, done=zeros, first=zeros + 1)

    @staticmethod
    def size(obs_dim: int, act_dim: int) -> int:
        """Return the length of ``flat``: obs, action, reward, done and first."""
        return obs_dim + act_dim + 3

    def flat(self) -> Tensor:
        """Join everything into one vector ``(..., size)``: obs, reward, action, done, first."""
        reward = self.reward[..., None]
        done = self.done[..., None]
        first = self.first[..., None]
        return torch.cat([self.obs, reward, self.action, done, first], -1)


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One episode in every world, padded to the longest one.

    Attributes:
        obs: Observations, ``(time, world, obs)``.
        action: Actions as chosen, before the clip to their bounds, ``(time, world, act)``.
        reward: ``(time, world)``.
        terminated: Whether the step ended the episode by failure, ``(time, world)``.
        truncated: Whether the step ended it by the time limit, ``(time, world)``.
        valid: Which steps were collected; the others are padding, ``(time, world)``.
        final_obs: Observation after each world's last valid step, before any reset,
            ``(world, obs)``.
        critic_obs: What only a critic sees in training beside the observation, ``(time, world,
            critic)``.
        final_critic_obs: The same after the last valid step, ``(world, critic)``.
        faulted: Where the physics broke down, ``(world,)``.
        teacher_action: Actions of the family's teacher, NaN where it knows none, ``(time, world,
            act)``; ``(time, world, 0)`` if they were not recorded.
        terms: Each reward term's sum over the episode, name -> ``(world,)``.
    """

    obs: Tensor
    action: Tensor
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    valid: Tensor
    final_obs: Tensor
    critic_obs: Tensor
    final_critic_obs: Tensor
    faulted: Tensor
    teacher_action: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)

    def to(self, device: str) -> Rollout:
        """Return the same rollout on a device."""
        moved: dict[str, Any] = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        terms = {name: value.to(device) for name, value in self.terms.items()}
        return Rollout(**moved, terms=terms)

    def returns(self) -> Tensor:
        """Return the undiscounted return of the episode, ``(world,)``."""
        return (self.reward * self.valid).sum(0)


@dataclass(frozen=True, kw_only=True)
class Trials:
    """One trial in every world: its K episodes in order, and the task it was collected in."""

    episodes: tuple[Rollout, ...]
    task: Tensor
    """The task space's encoding, ``(world, parameter)``: labels for training, shown only to
    privileged agents."""

    def to(self, device: str) -> Trials:
        """Return the same trials on a device."""
        if self.task.device.type == device:
            return self
        episodes = tuple(episode.to(device) for episode in self.episodes)
        return Trials(episodes=episodes, task=self.task.to(device))

    def returns(self) -> Tensor:
        """Return the undiscounted return of each episode, ``(episode, world)``."""
        return torch.stack([episode.returns() for episode in self.episodes])

    def totals(self, term: str) -> Tensor:
        """Return the unweighted sum of a reward term over each episode, ``(episode, world)``."""
        return torch.stack([episode.terms[term] for episode in self.episodes])

    def steps(self) -> int:
        """Return the number of collected environment steps, over all worlds and episodes."""
        return int(sum(int(episode.valid.sum()) for episode in self.episodes))

    def faults(self) -> int:
        """Return the number of episodes that ended because the physics broke down."""
        return int(sum(int(episode.faulted.sum()) for episode in self.episodes))


class TrialSequence(NamedTuple):
    """A trial as one sequence a world, its padding moved to the end, for recurrent learners.

    Shapes: percept ``(time, world, ...)`` each; action ``(time, world, act)``; reward, terminated,
    truncated, valid ``(time, world)``; next_obs ``(time, world, obs)``, the observation that the
    step led to, before any reset; critic_obs and next_critic_obs ``(time, world, critic)``;
    teacher_action ``(time, world, act)`` or ``(time, world, 0)``.
    """

    percept: Percept
    action: Tensor
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    valid: Tensor
    next_obs: Tensor
    critic_obs: Tensor
    next_critic_obs: Tensor
    teacher_action: Tensor


_JOINED_FIELDS = (
    "obs",
    "action",
    "reward",
    "terminated",
    "truncated",
    "valid",
    "critic_obs",
    "teacher_action",
)
"""Fields of a rollout that have a time axis."""


def join_episodes(episodes: tuple[Rollout, ...]) -> TrialSequence:
    """Join the episodes of a trial, in order, into one sequence a world."""
    joined = {name: torch.cat([getattr(e, name) for e in episodes]) for name in _JOINED_FIELDS}
    joined["next_obs"] = torch.cat([next_values(e, e.obs, e.final_obs) for e in episodes])
    joined["next_critic_obs"] = torch.cat(
        [next_values(e, e.critic_obs, e.final_critic_obs) for e in episodes]
    )

    # Episodes that ended early leave padding in the middle: move each world's valid steps to the
    # front. The sort is stable, so they keep their order.
    if not bool(joined["valid"].all()):
        order = torch.argsort((~joined["valid"]).int(), dim=0, stable=True)
        rows = torch.arange(order.shape[1], device=order.device)
        joined = {name: x[order, rows] for name, x in joined.items()}

    reward = joined["reward"]
    done = (joined["terminated"] | joined["truncated"]).to(reward.dtype)
    first = torch.zeros_like(reward)
    first[0] = 1.0
    percept = Percept(
        obs=joined.pop("obs"),
        action=delay(joined["action"]),
        reward=delay(reward),
        done=delay(done),
        first=first,
    )
    return TrialSequence(percept=percept, **joined)


def delay(x: Tensor) -> Tensor:
    """Delay by one step along time, zeros first: what the agent knew of ``x`` when it acted."""
    return torch.cat([torch.zeros_like(x[:1]), x[:-1]])


def next_values(episode: Rollout, values: Tensor, final: Tensor) -> Tensor:
    """Return the value after each step, before any reset, ``(time, world, ...)``.

    ``values`` ``(time, world, ...)`` belong to the steps themselves, ``final`` ``(world, ...)`` to
    the time after each world's last valid step.
    """
    ended = (episode.terminated | episode.truncated)[..., None]
    return torch.where(ended, final, torch.cat([values[1:], final[None]]))
