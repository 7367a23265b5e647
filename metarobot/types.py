"""The shapes that travel between rooms: percepts, rollouts and trials.

Axes: the world axis comes first, ``(world, ...)``; only a rollout puts time before it, ``(time,
world, ...)``.
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
    """What an agent is given at one step, all of it known to a real robot too.

    Shapes: obs ``(world, obs)``; action ``(world, act)``, the one sent last; reward ``(world,)``,
    the one it earned; done ``(world,)``, 1.0 on the first step of every episode but the trial's
    first; first ``(world,)``, 1.0 on the first step of a trial.
    """

    obs: Tensor
    action: Tensor
    reward: Tensor
    done: Tensor
    first: Tensor

    @classmethod
    def at_trial_start(cls, obs: Tensor, act_dim: int) -> Percept:
        """Return the percept of a trial's first step: nothing was done or earned yet."""
        zeros = obs.new_zeros(obs.shape[:-1])
        return cls(obs, obs.new_zeros(*obs.shape[:-1], act_dim), zeros, zeros, zeros + 1)

    @staticmethod
    def size(obs_dim: int, act_dim: int) -> int:
        """Return the length of ``flat``."""
        return obs_dim + 1 + act_dim + 2

    def flat(self) -> Tensor:
        """Join everything into one vector ``(..., size)``: obs, reward, action, done, first."""
        reward, done, first = (x[..., None] for x in (self.reward, self.done, self.first))
        return torch.cat([self.obs, reward, self.action, done, first], -1)


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One episode in every world, padded to the longest; ``valid`` marks the steps that were really
    lived.

    Shapes: obs ``(time, world, obs)``; action ``(time, world, act)``, as chosen, before the clip to
    its bounds; reward, terminated, truncated, valid ``(time, world)``; final_obs ``(world, obs)``,
    the observation after each world's last valid step, before any reset; critic_obs ``(time, world,
    critic)`` and final_critic_obs ``(world, critic)``, what only a critic in training is shown
    beside these; terms, name -> ``(world,)``, each reward term's sum over the episode; faulted
    ``(world,)``, true where the physics broke down; teacher_action ``(time, world, act)``, what the
    family record_teacher, NaN where it knew nothing, or ``(time, world, 0)`` if it was not asked.
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
        """Move to a device."""
        moved: dict[str, Any] = {
            k: v.to(device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)
        }
        return Rollout(**moved, terms={k: v.to(device) for k, v in self.terms.items()})

    def returns(self) -> Tensor:
        """Undiscounted return of the episode, ``(world,)``."""
        return (self.reward * self.valid).sum(0)


@dataclass(frozen=True, kw_only=True)
class Trials:
    """One trial in every world: its K episodes in order, and the task it was lived in.

    ``task`` ``(world, parameter)`` is the task space's encoding: labels for training, shown only to
    privileged agents.
    """

    episodes: tuple[Rollout, ...]
    task: Tensor

    def to(self, device: str) -> Trials:
        """Move to a device."""
        if self.task.device.type == device:
            return self
        return Trials(
            episodes=tuple(e.to(device) for e in self.episodes), task=self.task.to(device)
        )

    def returns(self) -> Tensor:
        """Return of each episode of the trial, ``(episode, world)``."""
        return torch.stack([e.returns() for e in self.episodes])

    def totals(self, term: str) -> Tensor:
        """Sum of a reward term, not weighted, over each episode of the trial, ``(episode,
        world)``.
        """
        return torch.stack([e.terms[term] for e in self.episodes])

    def steps(self) -> int:
        """Environment steps really lived, over all worlds and episodes."""
        return int(sum(int(e.valid.sum()) for e in self.episodes))

    def faults(self) -> int:
        """Episodes ended by broken physics."""
        return int(sum(int(e.faulted.sum()) for e in self.episodes))


class TrialSequence(NamedTuple):
    """A trial as one sequence a world, padding moved to the end: what a recurrent learner trains
    on.

    Shapes: percepts ``(time, world, ...)`` each; action ``(time, world, act)``; reward, terminated,
    truncated, valid ``(time, world)``; next_obs ``(time, world, obs)``, the observation the step
    led to, before any reset; critic_obs and next_critic_obs ``(time, world, critic)``;
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


def join_episodes(episodes: tuple[Rollout, ...]) -> TrialSequence:
    """Join the episodes of a trial into one sequence a world, in the order they were lived."""
    names = (
        "obs",
        "action",
        "reward",
        "terminated",
        "truncated",
        "valid",
        "critic_obs",
        "teacher_action",
    )
    parts = {k: torch.cat([getattr(e, k) for e in episodes]) for k in names}
    parts["next_obs"] = torch.cat([next_values(e, e.obs, e.final_obs) for e in episodes])
    parts["next_critic_obs"] = torch.cat(
        [next_values(e, e.critic_obs, e.final_critic_obs) for e in episodes]
    )
    if not bool(parts["valid"].all()):
        order = torch.argsort((~parts["valid"]).int(), dim=0, stable=True)
        rows = torch.arange(order.shape[1], device=order.device)
        parts = {k: x[order, rows] for k, x in parts.items()}
    obs, action, reward, terminated, truncated, valid = (parts[k] for k in names[:6])
    done = (terminated | truncated).to(reward.dtype)
    first = torch.zeros_like(reward)
    first[0] = 1.0
    percept = Percept(obs, delay(action), delay(reward), delay(done), first)
    told = (parts[k] for k in ("next_obs", "critic_obs", "next_critic_obs", "teacher_action"))
    return TrialSequence(percept, action, reward, terminated, truncated, valid, *told)


def delay(x: Tensor) -> Tensor:
    """Delay by one step along time, zeros first: what the agent knew of ``x`` when it acted."""
    return torch.cat([torch.zeros_like(x[:1]), x[:-1]])


def next_values(episode: Rollout, seen: Tensor, final: Tensor) -> Tensor:
    """Return what each step led to, ``(time, world, ...)``, of what was ``seen`` at the steps,
    before any reset.
    """
    ended = (episode.terminated | episode.truncated)[..., None]
    return torch.where(ended, final, torch.cat([seen[1:], final[None]]))
