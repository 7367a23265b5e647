"""Stable-Baselines3's algorithms as agents: trained by SB3's own loops, saved and tested as any.

PPO and SAC have no memory: one behaviour for all tasks. RecurrentPPO gets a whole trial as its
episode, and in every observation also the last action, the last reward and whether an episode
ended: this is RL² (Duan et al. 2016) by SB3. Its LSTM keeps its state over the episodes of a trial;
with plain episodes SB3 would clear it at the end of each, and nothing could be carried over.

Every iteration starts the worlds anew, with tasks, starts and noise keyed by (seed, iteration). So
a checkpoint holds everything, and a killed run continues bit for bit.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from gymnasium.spaces import Box
from torch import Tensor

from metarobot.agents.sb3.policies import (
    NormalisedFeatures,
    RecurrentPPO,
    SB3PPOAgent,
    SB3RecurrentAgent,
    SB3SACAgent,
    TrialPolicy,
)
from metarobot.agents.sb3.trial_envs import EpisodeVecEnv, TrialVecEnv
from metarobot.config_bounds import Bounds, Count, Fraction, LayerSize, NonNegative
from metarobot.env.sb3_vec_env import PPO, SAC, BaseCallback, Logger
from metarobot.errors import MetarobotError
from metarobot.learning.agent_interface import AgentKind, Dimensions, TrainingStep
from metarobot.learning.networks import RunningNorm
from metarobot.learning.optimiser_state import flatten_state, restore_state, with_prefix
from metarobot.learning.ppo_core import PPOSettings, decayed
from metarobot.learning.returns import discounted
from metarobot.tasks.family import Family
from metarobot.threads_and_memory import check_replay_memory
from metarobot.types import Percept, Trials


@dataclass(frozen=True, kw_only=True)
class SB3PPOConfig(PPOSettings):
    """Settings of SB3's PPO, with the names and defaults of our own PPO for a fair comparison."""

    worlds: Count = 64
    """Worlds that are stepped side by side."""
    episodes: Count = 2
    """Episodes an iteration in each world."""


@dataclass(frozen=True, kw_only=True)
class RecurrentPPOConfig(SB3PPOConfig):
    """Settings of sb3-contrib's RecurrentPPO; ``episodes`` are those of a trial."""

    width: LayerSize = 128
    """Width of the LSTMs of actor and critic, and of a hidden layer over each."""
    epochs: Count = 5
    """Passes over the trials of an iteration."""
    minibatches: Count = 8
    """Gradient steps per pass."""


@dataclass(frozen=True, kw_only=True)
class SACConfig:
    """Settings of SB3's SAC."""

    worlds: Count = 64
    """Worlds that are stepped side by side."""
    episodes: Count = 1
    """Episodes an iteration in each world."""
    width: LayerSize = 256
    """Width of the two hidden layers of actor and critics."""
    lr: NonNegative = 1e-3
    """Adam's learning rate at the start."""
    lr_end: NonNegative = 0.05
    """Fraction of the learning rate that is left at the end of training; linear between."""
    updates: Count = 4
    """Gradient steps for each step of all worlds."""
    batch: Count = 256
    """Transitions per gradient step."""
    gamma: Fraction = 0.97
    """Discount per control step."""
    tau: Fraction = 0.005
    """Share by which the target critics follow the critics at each gradient step."""
    start: Count = 10_000
    """Steps of random actions before learning begins."""
    replay: Annotated[int, Bounds(1)] = 1_000_000
    """Transitions in the replay."""


class SB3Learner:
    """Train an agent by one of SB3's algorithms, one iteration at a time."""

    AGENT_CLASS: type[SB3PPOAgent] = SB3PPOAgent

    def __init__(self, config: SB3PPOConfig | SACConfig, shapes: Dimensions) -> None:
        self.config: Any = config
        self.lr = config.lr
        self.steps_per_world = config.episodes * max(1, shapes.horizon)
        """Control steps of an iteration in each world."""
        self.norm = RunningNorm(self.normalised_inputs(shapes))

        # the algorithm has no environment yet: set it up as SB3's own ``load`` does
        self.model = self.make_algorithm(shapes)
        self.model.observation_space = Box(-np.inf, np.inf, (self.inputs(shapes),))
        self.model.action_space = Box(-1.0, 1.0, (shapes.act,))
        self.model.n_envs = config.worlds
        self.model._setup_model()
        self.model.set_logger(Logger(None, []))
        self.agent = self.AGENT_CLASS(self.model.policy, shapes)

    def make_algorithm(self, shapes: Dimensions) -> Any:
        """Make SB3's algorithm, not set up yet."""
        raise NotImplementedError

    def inputs(self, shapes: Dimensions) -> int:
        """Return the length of what the policy observes."""
        return shapes.obs

    def normalised_inputs(self, shapes: Dimensions) -> int:
        """Return how many of the inputs, the first ones, are normalised."""
        return shapes.obs

    def make_worlds(self, family: Family, threads: int) -> EpisodeVecEnv:
        """Make the environment to train in, with a new task in every episode."""
        return EpisodeVecEnv(family, self.config.worlds, 1, threads)

    def common_settings(self, **policy: Any) -> dict[str, Any]:
        """Return the arguments that all of SB3's algorithms get; ``policy`` are of its policy."""
        return {
            "policy": "MlpPolicy",
            "env": None,
            "device": "cpu",
            "_init_setup_model": False,
            "learning_rate": lambda _: self.lr,
            "policy_kwargs": {
                "features_extractor_class": NormalisedFeatures,
                "features_extractor_kwargs": {"norm": self.norm},
                **policy,
            },
        }

    def start_training(self, family: Family, threads: int) -> TrainingStep:
        """Make the worlds; return what runs one iteration in them (``AgentKind.fit``)."""
        worlds = self.make_worlds(family, threads)
        self.model.set_env(worlds)

        def run_iteration(
            iteration: int, progress: float, seed: int
        ) -> tuple[int, dict[str, float]]:
            return self.run_iteration(worlds, threads, progress, seed)

        return run_iteration

    def run_iteration(
        self, worlds: EpisodeVecEnv, threads: int, progress: float, seed: int
    ) -> tuple[int, dict[str, float]]:
        """Collect and learn by SB3's loop; return the collected steps and the metrics."""
        self.lr = decayed(self.config.lr, self.config.lr_end, progress)
        self.before_iteration(worlds)

        clock = _CollectionClock(threads)
        began = time.monotonic()
        with _restored_generators():
            self.model.set_random_seed(seed)
            self.model.learn(self.steps_per_world * self.config.worlds, clock, log_interval=None)
        seconds = time.monotonic() - began
        steps: int = self.model.num_timesteps
        self.after_iteration(worlds)

        metrics = worlds.metrics()
        for name, value in self.model.logger.name_to_value.items():
            metrics[name] = float(value)
        metrics["time/collect_fps"] = steps / clock.seconds
        metrics["time/learn_fps"] = steps / (seconds - clock.seconds)
        return steps, metrics

    def before_iteration(self, worlds: EpisodeVecEnv) -> None:
        """Prepare the worlds and the algorithm for an iteration."""

    def after_iteration(self, worlds: EpisodeVecEnv) -> None:
        """Update the normaliser with the collected observations; it is fixed in an iteration."""
        observations = np.concatenate(worlds.observations)
        normalised = observations[:, : len(self.norm.mean)]
        self.norm.update(torch.from_numpy(normalised))

    def update(self, trials: Trials, progress: float, seed: int) -> dict[str, float]:
        """Refuse: SB3 collects what it learns from.

        Raises:
            MetarobotError: Always.
        """
        raise MetarobotError(
            "Stable-Baselines3's agents learn in a loop of their own, not from given trials"
        )


class SB3PPOLearner(SB3Learner):
    """Train by SB3's PPO, with rewards divided by the deviation of the discounted return.

    VecNormalize scales rewards in the same way.
    """

    def __init__(self, config: SB3PPOConfig, shapes: Dimensions) -> None:
        super().__init__(config, shapes)
        self.return_norm = RunningNorm(1)
        self.optimiser = self.model.policy.optimizer

    def make_algorithm(self, shapes: Dimensions) -> Any:
        """Make PPO."""
        width = [self.config.width] * 2
        return PPO(**self.ppo_settings(net_arch={"pi": width, "vf": width}))

    def ppo_settings(self, **policy: Any) -> dict[str, Any]:
        """Return the arguments of SB3's PPO and RecurrentPPO.

        Raises:
            MetarobotError: The steps of an iteration cannot be split into the minibatches.
        """
        config = self.config
        steps = config.worlds * self.steps_per_world
        # SB3 needs at least two steps per minibatch to normalise advantages
        if steps % config.minibatches or steps < 2 * config.minibatches:
            raise MetarobotError(
                f"minibatches = {config.minibatches} do not share the {steps:,} steps "
                "of an iteration"
            )
        return {
            **self.common_settings(**policy, log_std_init=math.log(config.std)),
            "n_steps": self.steps_per_world,
            "n_epochs": config.epochs,
            "batch_size": steps // config.minibatches,
            "max_grad_norm": config.grad_norm,
            "gamma": config.gamma,
            "gae_lambda": config.lam,
            "vf_coef": config.value,
            "clip_range": config.clip,
            # SB3 stops at 1.5 times its target
            "target_kl": config.kl_stop / 1.5,
        }

    def before_iteration(self, worlds: EpisodeVecEnv) -> None:
        """Set the scale of the rewards."""
        worlds.reward_scale = float(self.return_norm.scale)

    def after_iteration(self, worlds: EpisodeVecEnv) -> None:
        """Update the normalisers with the collected observations and returns."""
        super().after_iteration(worlds)
        returns = discounted(torch.from_numpy(np.stack(worlds.rewards)), self.config.gamma)
        self.return_norm.update(returns.reshape(-1, 1))

    def state(self) -> dict[str, Tensor]:
        """Return weights, normalisers and optimiser state."""
        return flatten_state(self.optimiser, agent=self.agent, spread=self.return_norm)

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what ``state`` returned."""
        restore_state(state, self.optimiser, agent=self.agent, spread=self.return_norm)


class SB3RecurrentPPOLearner(SB3PPOLearner):
    """Train by sb3-contrib's RecurrentPPO over trials."""

    AGENT_CLASS = SB3RecurrentAgent

    def make_algorithm(self, shapes: Dimensions) -> Any:
        """Make RecurrentPPO."""
        width = self.config.width
        settings = self.ppo_settings(
            net_arch={"pi": [width], "vf": [width]}, lstm_hidden_size=width
        )
        return RecurrentPPO(**{**settings, "policy": TrialPolicy})

    def inputs(self, shapes: Dimensions) -> int:
        """Return the length of an encoded percept."""
        return Percept.size(shapes.obs, shapes.act)

    def normalised_inputs(self, shapes: Dimensions) -> int:
        """Return the length of observation and reward, the first inputs."""
        return shapes.obs + 1

    def make_worlds(self, family: Family, threads: int) -> EpisodeVecEnv:
        """Make the environment to train in, with a new task in every trial."""
        return TrialVecEnv(family, self.config.worlds, self.config.episodes, threads)


REPLAY_FIELDS = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
"""Arrays of SB3's replay buffer that are saved."""


class SB3SACLearner(SB3Learner):
    """Train by SB3's SAC; its replay is part of the saved state."""

    AGENT_CLASS = SB3SACAgent

    def __init__(self, config: SACConfig, shapes: Dimensions) -> None:
        # float32: two observations, an action, reward, done and timeout
        bytes_per_transition = 4 * (2 * shapes.obs + shapes.act + 3)
        check_replay_memory(config.replay, config.replay * bytes_per_transition)
        super().__init__(config, shapes)
        self.optimisers = {
            "actor": self.model.policy.actor.optimizer,
            "critic": self.model.policy.critic.optimizer,
            "entropy": self.model.ent_coef_optimizer,
        }

    def make_algorithm(self, shapes: Dimensions) -> Any:
        """Make SAC, with one round of gradient steps for each step of all worlds."""
        config = self.config
        settings = self.common_settings(net_arch=[config.width] * 2)
        return SAC(
            **settings,
            batch_size=config.batch,
            gradient_steps=config.updates,
            tau=config.tau,
            gamma=config.gamma,
            buffer_size=config.replay,
            learning_starts=config.start,
            # SB3 would ask the environment for it, which is not there yet
            target_entropy=-float(shapes.act),
        )

    def before_iteration(self, worlds: EpisodeVecEnv) -> None:
        """Set how many random steps are left; SB3 counts from the start of each iteration."""
        collected = self.model.replay_buffer.size() * self.config.worlds
        self.model.learning_starts = max(0, self.config.start - collected)

    def state(self) -> dict[str, Tensor]:
        """Return weights, normaliser, optimisers, the entropy coefficient and the replay."""
        flat: dict[str, Tensor] = {}
        for name, optimiser in self.optimisers.items():
            for key, value in flatten_state(optimiser).items():
                flat[f"{name}.{key}"] = value
        for key, value in self.agent.state_dict().items():
            flat[f"agent.{key}"] = value.detach().clone()
        flat["log_ent_coef"] = self.model.log_ent_coef.detach().clone()

        replay = self.model.replay_buffer
        flat["replay.place"] = torch.tensor([replay.pos, replay.full])
        for name in REPLAY_FIELDS:
            rows = vars(replay)[name][: replay.size()]
            flat[f"replay.{name}"] = torch.from_numpy(rows.copy())
        return flat

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what ``state`` returned."""
        for name, optimiser in self.optimisers.items():
            restore_state(with_prefix(state, f"{name}."), optimiser)
        self.agent.load_state_dict(with_prefix(state, "agent."))
        self.model.log_ent_coef.data.copy_(state["log_ent_coef"])

        replay = self.model.replay_buffer
        position, full = state["replay.place"].tolist()
        replay.pos = int(position)
        replay.full = bool(full)
        for name in REPLAY_FIELDS:
            vars(replay)[name][: replay.size()] = state[f"replay.{name}"].numpy()


class _CollectionClock(BaseCallback):  # type: ignore[misc,unused-ignore]
    """Measures the seconds spent collecting.

    Torch has one thread meanwhile, so that the physics has the cores.
    """

    def __init__(self, threads: int) -> None:
        super().__init__()
        self.threads = threads
        self.seconds = 0.0
        self._began = 0.0

    def _on_rollout_start(self) -> None:
        torch.set_num_threads(1)
        self._began = time.monotonic()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.seconds += time.monotonic() - self._began
        torch.set_num_threads(self.threads)


@contextmanager
def _restored_generators() -> Iterator[None]:
    """Restore the global random generators, which SB3 draws from, on leaving."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


ppo = AgentKind(
    name="sb3:ppo",
    doc="Stable-Baselines3's PPO: one behaviour for all tasks.",
    config=SB3PPOConfig,
    build=SB3PPOLearner,
    fit=SB3Learner.start_training,
)
sac = AgentKind(
    name="sb3:sac",
    doc="Stable-Baselines3's SAC: one behaviour for all tasks, off-policy.",
    config=SACConfig,
    build=SB3SACLearner,
    fit=SB3Learner.start_training,
)
recurrent_ppo = AgentKind(
    name="sb3:recurrentppo",
    doc="sb3-contrib's RecurrentPPO, an LSTM, over trials: RL2 as SB3 would have it.",
    config=RecurrentPPOConfig,
    build=SB3RecurrentPPOLearner,
    fit=SB3Learner.start_training,
)
