"""What Stable-Baselines3's algorithms live in when they are trained as agents: single episodes, or
whole trials.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box
from torch import Tensor

from metarobot.env.gymnasium_envs import Array
from metarobot.env.sb3_vec_env import SB3VecEnv
from metarobot.tasks.family import Family
from metarobot.tasks.space import Task
from metarobot.types import Percept


class EpisodeVecEnv(SB3VecEnv):
    """What an algorithm lives in: actions within ±1, and notes of all that normalisers and metrics
    are made from.
    """

    def __init__(self, family: Family, worlds: int, episodes: int, threads: int) -> None:
        self.episodes = episodes
        """Episodes that have one task."""
        super().__init__(family, worlds, threads=threads)
        low, high = self.env.action_low.float(), self.env.action_high.float()
        self.middle, self.reach = (low + high) / 2, (high - low) / 2
        """Of the robot's actions, ``(act,)``."""
        self.action_space = Box(-1.0, 1.0, low.shape)
        self.scale = 1.0
        """What SB3 is told of a reward is this times as much."""

    def _next_task(self, world: int, episode: int) -> Task:
        return super()._next_task(world, episode // self.episodes)

    def reset(self) -> Array:
        """Start an episode in every world, and the notes."""
        obs = super().reset()
        self.rewards: list[Array] = []
        self.ended: list[tuple[int, dict[str, Any]]] = []
        self.count = np.zeros(self.num_envs, int)
        self.percepts = [obs]
        return obs

    def step_async(self, actions: Array) -> None:
        """Take actions ``(world, act)`` within ±1."""
        super().step_async(self.middle.numpy() + self.reach.numpy() * actions)

    def step_wait(self) -> tuple[Array, Array, Array, list[dict[str, Any]]]:
        """Step every world."""
        obs, reward, done, infos = super().step_wait()
        for i in np.flatnonzero(done).tolist():
            self.ended.append((int(self.count[i]) % self.episodes, infos[i]["episode"]))
        self.count += done
        self.rewards.append(reward)
        self.percepts.append(obs)
        return obs, reward * self.scale, done, infos

    def metrics(self) -> dict[str, float]:
        """Summarise what has been lived since the reset: returns by episode of a trial."""
        by_episode: dict[int, list[float]] = {}
        for k, episode in self.ended:
            by_episode.setdefault(k, []).append(episode["r"])
        returns = [float(np.mean(by_episode[k])) for k in sorted(by_episode)]
        metrics = {
            "rollout/ep_rew_mean": float(np.mean([e["r"] for _, e in self.ended])),
            "rollout/ep_len_mean": float(np.mean([e["l"] for _, e in self.ended])),
            "meta/pre_adapt_return": returns[0],
            "meta/post_adapt_return": returns[-1],
            "meta/adaptation_gain": returns[-1] - returns[0],
        }
        return metrics | {f"meta/return_episode_{k + 1}": r for k, r in enumerate(returns)}


class TrialVecEnv(EpisodeVecEnv):
    """Worlds whose episode, for SB3, is a whole trial, and whose observation is the percept: see
    ``told``.
    """

    def __init__(self, family: Family, worlds: int, episodes: int, threads: int) -> None:
        super().__init__(family, worlds, episodes, threads)
        self.width = self.env.obs_dim + 1 + self.env.act_dim + 2
        """Length of a percept."""
        self.observation_space = Box(-np.inf, np.inf, (self.width,))

    def reset(self) -> Array:
        """Start a trial in every world."""
        self.percepts = [_began(super().reset(), self.width)]
        return self.percepts[0]

    def step_wait(self) -> tuple[Array, Array, Array, list[dict[str, Any]]]:
        """Step every world; only the end of its last episode ends a trial."""
        obs, reward, done, infos = super().step_wait()
        over = done & (self.count % self.episodes == 0)
        parts = (
            obs,
            self.rewards[-1][:, None],
            self._actions.numpy(),
            done[:, None],
            np.zeros((len(obs), 1)),
        )
        percept = np.concatenate(parts, 1, dtype=np.float32)
        for i in np.flatnonzero(done).tolist():
            final = infos[i].pop("terminal_observation")
            if over[i]:  # as if the episode went on: what the critic bootstraps from
                infos[i]["terminal_observation"] = np.concatenate(
                    [final, percept[i, len(final) : -2], [0.0, 0.0]]
                )
        percept[over] = _began(obs[over], self.width)
        self.percepts[-1] = percept
        return percept, reward, over, infos


def _began(obs: Array, width: int) -> Array:
    """Return the percept of a trial's first step, ``(world, width)``."""
    percept = np.zeros((len(obs), width), np.float32)
    percept[:, : obs.shape[1]] = obs
    percept[:, -1] = 1.0
    return percept


def flat_percept(percept: Percept) -> Tensor:
    """Join a percept as ``TrialWorlds`` shows it: observation, reward, action, done, first;
    ``(world, width)``.
    """
    parts = (
        percept.obs,
        percept.reward[:, None],
        percept.action,
        percept.done[:, None],
        percept.first[:, None],
    )
    return torch.cat(parts, -1)
