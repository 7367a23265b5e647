"""Environments in which Stable-Baselines3 trains: single episodes, or whole trials."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box

from metarobot.env.gymnasium_envs import Array
from metarobot.env.sb3_vec_env import SB3VecEnv
from metarobot.learning.finite_check import CHECK_FAMILY, DivergedError
from metarobot.tasks.family import Family
from metarobot.tasks.space import Task
from metarobot.types import Percept


class EpisodeVecEnv(SB3VecEnv):
    """An ``SB3VecEnv`` with actions within ±1 that records what normalisers and metrics need."""

    def __init__(self, family: Family, worlds: int, episodes: int, threads: int) -> None:
        # the base class asks for the first tasks, so this must be known before
        self.episodes_per_task = episodes
        super().__init__(family, worlds, threads=threads)
        low = self.env.action_low.float()
        high = self.env.action_high.float()
        # the robot's action is middle + reach * action, with action within ±1
        self.middle = (low + high) / 2
        self.reach = (high - low) / 2
        self.action_space = Box(-1.0, 1.0, low.shape)
        self.reward_scale = 1.0
        """Factor of the rewards that SB3 gets; ``rewards`` are recorded without it."""

    def _next_task(self, world: int, episode: int) -> Task:
        return super()._next_task(world, episode // self.episodes_per_task)

    def reset(self) -> Array:
        """Start an episode in every world, and clear the records."""
        obs = super().reset()
        self.observations: list[Array] = [obs]
        """What SB3 observed at each step, ``(world, obs)``."""
        self.rewards: list[Array] = []
        """Rewards of each step, ``(world,)``."""
        self.finished_episodes: list[tuple[int, dict[str, Any]]] = []
        """Place of each finished episode in its trial, and SB3's record of it, without faulted
        ones."""
        self.faults = 0
        """Episodes that ended because the physics broke down."""
        self.episode_counts = np.zeros(self.num_envs, int)
        """Finished episodes of each world."""
        return obs

    def step_async(self, actions: Array) -> None:
        """Take actions ``(world, act)`` within ±1."""
        robot_actions = self.middle.numpy() + self.reach.numpy() * actions
        self.robot_actions = torch.from_numpy(np.asarray(robot_actions, np.float32))
        """The last actions in the robot's units, ``(world, act)``."""
        super().step_async(robot_actions)

    def step_wait(self) -> tuple[Array, Array, Array, list[dict[str, Any]]]:
        """Step every world, and record the step.

        Raises:
            DivergedError: A reward is not finite.
        """
        obs, reward, done, infos = super().step_wait()
        for world in np.flatnonzero(~np.isfinite(reward)).tolist():
            raise DivergedError(f"reward is {reward[world]} in world {world}: {CHECK_FAMILY}")
        for world in np.flatnonzero(done).tolist():
            episode = infos[world]["episode"]
            if infos[world]["faulted"]:
                self.faults += 1
                reward[world] -= self._charge(self._returns, episode)
                continue
            place = int(self.episode_counts[world]) % self.episodes_per_task
            self.finished_episodes.append((place, episode))
        self.episode_counts += done
        self.rewards.append(reward)
        self.observations.append(obs)
        return obs, reward * self.reward_scale, done, infos

    def _charge(self, running_returns: Array, episode: Mapping[str, Any]) -> float:
        """Return what to take off a step at which the physics broke down; see ``charge_faults``.

        The worst return is that of the episodes finished so far. Before the first one it is that of
        the worlds under way, if they go on as they began.
        """
        if self.finished_episodes:
            worst = min(float(finished["r"]) for _, finished in self.finished_episodes)
        else:
            worst = float(running_returns.min()) * self.env.family.horizon / episode["l"]
        return max(float(episode["r"]) - worst, 0.0)

    def metrics(self) -> dict[str, float]:
        """Return metrics of the episodes since the reset, with returns by place in the trial.

        Raises:
            DivergedError: None ended without a fault.
        """
        if not self.finished_episodes:
            raise DivergedError(
                f"the physics broke down in all {self.faults} episodes: {CHECK_FAMILY}"
            )
        returns_by_place: dict[int, list[float]] = {}
        for place, episode in self.finished_episodes:
            returns_by_place.setdefault(place, []).append(episode["r"])
        places = sorted(returns_by_place)
        returns = [float(np.mean(returns_by_place[k])) for k in places]

        episodes = [episode for _, episode in self.finished_episodes]
        metrics = {
            "rollout/ep_rew_mean": float(np.mean([e["r"] for e in episodes])),
            "rollout/ep_len_mean": float(np.mean([e["l"] for e in episodes])),
            "meta/pre_adapt_return": returns[0],
            "meta/post_adapt_return": returns[-1],
            "meta/adaptation_gain": returns[-1] - returns[0],
            "sim/faults": float(self.faults),
        }
        for k, mean_return in zip(places, returns, strict=True):
            metrics[f"meta/return_episode_{k + 1}"] = mean_return
        return metrics


class TrialVecEnv(EpisodeVecEnv):
    """An environment whose episode is a whole trial, and whose observation is the percept.

    The observation is ``Percept.flat()``, as the agent gets it when it is evaluated.
    """

    def __init__(self, family: Family, worlds: int, episodes: int, threads: int) -> None:
        super().__init__(family, worlds, episodes, threads)
        percept_dim = Percept.size(self.env.obs_dim, self.env.act_dim)
        self.observation_space = Box(-np.inf, np.inf, (percept_dim,))

    def reset(self) -> Array:
        """Start a trial in every world."""
        percept = self._trial_start(super().reset())
        self.observations = [percept]
        return percept

    def step_wait(self) -> tuple[Array, Array, Array, list[dict[str, Any]]]:
        """Step every world; only the end of a trial's last episode ends it for SB3."""
        obs, reward, done, infos = super().step_wait()
        trial_over = done & (self.episode_counts % self.episodes_per_task == 0)
        percept = self._percept(obs, done)

        # SB3 bootstraps from the terminal observation: the percept as if the episode went on
        final_obs = obs.copy()
        for world in np.flatnonzero(done).tolist():
            final_obs[world] = infos[world].pop("terminal_observation")
        final_percept = self._percept(final_obs, np.zeros_like(done))
        for world in np.flatnonzero(trial_over).tolist():
            infos[world]["terminal_observation"] = final_percept[world]

        percept[trial_over] = self._trial_start(obs[trial_over])
        self.observations[-1] = percept
        return percept, reward, trial_over, infos

    def _percept(self, obs: Array, done: Array) -> Array:
        """Return the encoded percept after the last step, ``(world, percept)``."""
        done_float = torch.from_numpy(done).float()
        percept = Percept(
            obs=torch.from_numpy(obs),
            action=self.robot_actions,
            reward=torch.from_numpy(self.rewards[-1]),
            done=done_float,
            first=torch.zeros_like(done_float),
        )
        encoded: Array = percept.flat().float().numpy()
        return encoded

    def _trial_start(self, obs: Array) -> Array:
        """Return the encoded percept of a trial's first step, ``(world, percept)``."""
        percept = Percept.at_trial_start(torch.from_numpy(obs), self.env.act_dim)
        encoded: Array = percept.flat().float().numpy()
        return encoded
