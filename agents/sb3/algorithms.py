"""Stable-Baselines3's algorithms as agents: trained by SB3's own loops, kept, tested and filmed as
any other.

PPO and SAC have no memory: one behaviour for all tasks. RecurrentPPO is given a whole trial for its
episode, and in every observation the reward, the action and the end that came before it: what RL²
is (Duan et al. 2016), by SB3. So its LSTM lives through the episodes of a trial; SB3 clears it at
the ends of episodes, and then it could carry nothing on.

The worlds begin anew with every iteration, from tasks, starts and noise keyed by (seed, iteration):
what is saved is all there is, and a killed run goes on bit for bit.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box
from torch import Tensor

from metarobot.agents.sb3.policies import (
    Normalised,
    RecurrentPPO,
    SB3PPOAgent,
    SB3RecurrentAgent,
    SB3SACAgent,
    TrialPolicy,
)
from metarobot.agents.sb3.trial_envs import EpisodeVecEnv, TrialVecEnv
from metarobot.env.sb3_vec_env import PPO, SAC, BaseCallback, Logger
from metarobot.errors import MetarobotError
from metarobot.learning.agent_interface import AgentKind, Dimensions, TrainingStep
from metarobot.learning.networks import RunningNorm
from metarobot.learning.optimiser_state import flatten_state, restore_state
from metarobot.learning.returns import discounted
from metarobot.resources import check_replay_memory
from metarobot.tasks.family import Family
from metarobot.types import Trials


@dataclass(frozen=True, kw_only=True)
class SB3PPOConfig:
    """Settings of SB3's PPO: those of our own PPO wherever they mean the same, so that they are
    compared fairly.
    """

    worlds: int = 64
    """Worlds that live side by side."""
    episodes: int = 2
    """Episodes an iteration in each world."""
    width: int = 128
    """Width of the two hidden layers of actor and critic."""
    lr: float = 1e-3
    """Adam's learning rate at the start."""
    lr_end: float = 0.05
    """Fraction of it that is left at the end; linear between."""
    epochs: int = 8
    """Passes over an iteration's steps."""
    minibatches: int = 16
    """Gradient steps a pass."""
    gamma: float = 0.97
    """Discount a control step."""
    lam: float = 0.95
    """GAE's trace decay."""
    clip: float = 0.2
    """PPO's bound on the probability ratio."""
    kl_stop: float = 0.045
    """Approximate KL divergence from the collecting policy at which an iteration's learning
    stops."""
    value: float = 0.5
    """Weight of the critic's squared error."""
    grad_norm: float = 1.0
    """Bound on the gradient's norm."""
    std: float = 0.6
    """Standard deviation of the first policy's actions."""


@dataclass(frozen=True, kw_only=True)
class RecurrentPPOConfig(SB3PPOConfig):
    """Settings of sb3-contrib's RecurrentPPO; ``episodes`` are those of a trial."""

    width: int = 128
    """Width of the LSTMs of actor and critic, and of a hidden layer over each."""
    epochs: int = 5
    """Passes over an iteration's trials."""
    minibatches: int = 8
    """Gradient steps a pass."""


@dataclass(frozen=True, kw_only=True)
class SACConfig:
    """Settings of SB3's SAC."""

    worlds: int = 64
    """Worlds that live side by side."""
    episodes: int = 1
    """Episodes an iteration in each world."""
    width: int = 256
    """Width of the two hidden layers of actor and critics."""
    lr: float = 1e-3
    """Adam's learning rate at the start."""
    lr_end: float = 0.05
    """Fraction of it that is left at the end; linear between."""
    updates: int = 4
    """Gradient steps for each step of all worlds."""
    batch: int = 256
    """Transitions a gradient step."""
    gamma: float = 0.97
    """Discount a control step."""
    tau: float = 0.005
    """Share of the critics that enters their slow copies at each gradient step."""
    start: int = 10_000
    """Steps of random actions before learning begins."""
    replay: int = 1_000_000
    """Transitions kept."""


class SB3Learner:
    """Trains an agent by one of SB3's algorithms, an iteration at a time."""

    agent_class: type[SB3PPOAgent] = SB3PPOAgent

    def __init__(self, config: Any, shapes: Dimensions) -> None:
        self.config, self.lr = config, config.lr
        self.span = config.episodes * max(1, shapes.horizon)
        """Control steps of an iteration in each world."""
        self.norm = RunningNorm(self.features(shapes))
        self.model = self.algorithm(shapes)
        # as SB3's own ``load`` sets up an algorithm that has no environment yet
        self.model.observation_space = Box(-np.inf, np.inf, (self.inputs(shapes),))
        self.model.action_space, self.model.n_envs = Box(-1.0, 1.0, (shapes.act,)), config.worlds
        self.model._setup_model()
        self.model.set_logger(Logger(None, []))
        self.agent = self.agent_class(self.model.policy, shapes)

    def algorithm(self, shapes: Dimensions) -> Any:
        """Make SB3's algorithm, not yet set up."""
        raise NotImplementedError

    def features(self, shapes: Dimensions) -> int:
        """Return how many of the inputs are normalised."""
        return shapes.obs

    def inputs(self, shapes: Dimensions) -> int:
        """Return the length of what the policy sees."""
        return shapes.obs

    def worlds(self, family: Family, threads: int) -> EpisodeVecEnv:
        """Make what the algorithm lives in: a new task in every episode."""
        return EpisodeVecEnv(family, self.config.worlds, 1, threads)

    def settings(self, **policy: Any) -> dict[str, Any]:
        """Return what all algorithms are made with."""
        normalised = {
            "features_extractor_class": Normalised,
            "features_extractor_kwargs": {"norm": self.norm},
        }
        plain = {"policy": "MlpPolicy", "env": None, "device": "cpu", "_init_setup_model": False}
        return {
            **plain,
            "learning_rate": lambda _: self.lr,
            "policy_kwargs": {**normalised, **policy},
        }

    def inhabit(self, family: Family, threads: int) -> TrainingStep:
        """Move into worlds; return what lives an iteration in them and learns from it."""
        worlds = self.worlds(family, threads)
        self.model.set_env(worlds)
        return lambda _, progress, seed: self.iterate(worlds, threads, progress, seed)

    def iterate(
        self, worlds: EpisodeVecEnv, threads: int, progress: float, seed: int
    ) -> tuple[int, dict[str, float]]:
        """Live and learn by SB3's loop; return the steps lived, and metrics."""
        self.lr = self.config.lr * (1.0 - progress * (1.0 - self.config.lr_end))
        self.prepare(worlds)
        clock, began = _Clock(threads), time.monotonic()
        with _generators_restored():
            self.model.set_random_seed(seed)
            self.model.learn(self.span * self.config.worlds, clock, log_interval=None)
        seconds, lived = time.monotonic() - began, self.model.num_timesteps
        self.absorb(worlds)
        said = {k: float(v) for k, v in self.model.logger.name_to_value.items()}
        speed = {
            "collect_fps": lived / clock.collecting,
            "learn_fps": lived / (seconds - clock.collecting),
        }
        return lived, {**worlds.metrics(), **said, **{f"time/{k}": v for k, v in speed.items()}}

    def prepare(self, worlds: EpisodeVecEnv) -> None:
        """Set what an iteration begins with."""

    def absorb(self, worlds: EpisodeVecEnv) -> None:
        """Let the normaliser see what has been lived; while living and learning it stands."""
        self.norm.update(
            torch.from_numpy(np.concatenate(worlds.percepts)[:, : len(self.norm.mean)])
        )

    def update(self, trials: Trials, progress: float, seed: int) -> dict[str, float]:
        """Refuse: SB3 lives what it learns from."""
        raise MetarobotError(
            "Stable-Baselines3's agents learn from what its own loop lives, not from trials"
        )


class PPOLearner(SB3Learner):
    """SB3's PPO, its rewards scaled by the spread of their discounted sums, as VecNormalize
    does.
    """

    def __init__(self, config: SB3PPOConfig, shapes: Dimensions) -> None:
        super().__init__(config, shapes)
        self.spread = RunningNorm(1)

    def algorithm(self, shapes: Dimensions) -> Any:
        """Make PPO."""
        width = [self.config.width] * 2
        return PPO(**self.on_policy(net_arch={"pi": width, "vf": width}))

    def on_policy(self, **policy: Any) -> dict[str, Any]:
        """Return the settings of PPO."""
        c, steps = self.config, self.config.worlds * self.span
        if steps % c.minibatches or steps < 2 * c.minibatches:
            raise MetarobotError(
                f"minibatches = {c.minibatches} do not share the {steps:,} steps of an iteration"
            )
        learning = {
            "n_epochs": c.epochs,
            "batch_size": steps // c.minibatches,
            "max_grad_norm": c.grad_norm,
        }
        returns = {"gamma": c.gamma, "gae_lambda": c.lam, "vf_coef": c.value}
        # SB3 stops at 1.5 times its target
        bounds = {"clip_range": c.clip, "target_kl": c.kl_stop / 1.5}
        policy |= {"log_std_init": math.log(c.std)}
        return {**self.settings(**policy), "n_steps": self.span, **learning, **returns, **bounds}

    def prepare(self, worlds: EpisodeVecEnv) -> None:
        """Scale the rewards by what is known of them."""
        worlds.scale = float(self.spread.scale)

    def absorb(self, worlds: EpisodeVecEnv) -> None:
        """Let the normalisers see what has been lived."""
        super().absorb(worlds)
        sums = discounted(torch.from_numpy(np.stack(worlds.rewards)), self.config.gamma)
        self.spread.update(sums.reshape(-1, 1))

    def state(self) -> dict[str, Tensor]:
        """Return weights, normalisers and optimiser."""
        return flatten_state(self.model.policy.optimizer, agent=self.agent, spread=self.spread)

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore them."""
        restore_state(state, self.model.policy.optimizer, agent=self.agent, spread=self.spread)


class RecurrentPPOLearner(PPOLearner):
    """sb3-contrib's RecurrentPPO over trials."""

    agent_class = SB3RecurrentAgent

    def algorithm(self, shapes: Dimensions) -> Any:
        """Make RecurrentPPO."""
        width = self.config.width
        policy = {"net_arch": {"pi": [width], "vf": [width]}, "lstm_hidden_size": width}
        return RecurrentPPO(**{**self.on_policy(**policy), "policy": TrialPolicy})

    def features(self, shapes: Dimensions) -> int:
        """Return the length of observation and reward."""
        return shapes.obs + 1

    def inputs(self, shapes: Dimensions) -> int:
        """Return the length of a percept."""
        return shapes.obs + 1 + shapes.act + 2

    def worlds(self, family: Family, threads: int) -> EpisodeVecEnv:
        """Make worlds that live trials."""
        return TrialVecEnv(family, self.config.worlds, self.config.episodes, threads)


KEPT = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
"""What SB3's replay holds."""


class SACLearner(SB3Learner):
    """SB3's SAC; what is saved holds its replay."""

    agent_class = SB3SACAgent

    def __init__(self, config: SACConfig, shapes: Dimensions) -> None:
        check_replay_memory(config.replay, 4 * config.replay * (2 * shapes.obs + shapes.act + 3))
        super().__init__(config, shapes)
        policy = self.model.policy
        self.optimisers = {
            "actor": policy.actor.optimizer,
            "critic": policy.critic.optimizer,
            "entropy": self.model.ent_coef_optimizer,
        }

    def algorithm(self, shapes: Dimensions) -> Any:
        """Make SAC, one round of gradient steps for each step of all worlds."""
        c = self.config
        learning = {
            "batch_size": c.batch,
            "gradient_steps": c.updates,
            "tau": c.tau,
            "gamma": c.gamma,
        }
        experience = {"buffer_size": c.replay, "learning_starts": c.start}
        # SB3 would ask the environment for it
        entropy = {"target_entropy": -float(shapes.act)}
        return SAC(**{**self.settings(net_arch=[c.width] * 2), **learning, **experience, **entropy})

    def prepare(self, worlds: EpisodeVecEnv) -> None:
        """Act at random only until enough has been lived; SB3 counts from each iteration's
        start.
        """
        lived = self.model.replay_buffer.size() * self.config.worlds
        self.model.learning_starts = max(0, self.config.start - lived)

    def state(self) -> dict[str, Tensor]:
        """Return weights, normaliser, optimisers, the entropy's weight and the replay."""
        flat = {
            f"{name}.{k}": v
            for name, o in self.optimisers.items()
            for k, v in flatten_state(o).items()
        }
        flat |= {f"agent.{k}": v.detach().clone() for k, v in self.agent.state_dict().items()}
        replay = self.model.replay_buffer
        rows = {
            name: torch.from_numpy(getattr(replay, name)[: replay.size()].copy()) for name in KEPT
        }
        place = torch.tensor([replay.pos, replay.full])
        entropy = self.model.log_ent_coef.detach().clone()
        return {
            **flat,
            "log_ent_coef": entropy,
            "replay.place": place,
            **{f"replay.{k}": v for k, v in rows.items()},
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore them."""
        for name, optimiser in self.optimisers.items():
            restore_state(
                {
                    k.removeprefix(f"{name}."): v
                    for k, v in state.items()
                    if k.startswith(f"{name}.")
                },
                optimiser,
            )
        self.agent.load_state_dict(
            {k.removeprefix("agent."): v for k, v in state.items() if k.startswith("agent.")}
        )
        self.model.log_ent_coef.data.copy_(state["log_ent_coef"])
        replay = self.model.replay_buffer
        replay.pos, replay.full = int(state["replay.place"][0]), bool(state["replay.place"][1])
        for name in KEPT:
            getattr(replay, name)[: replay.size()] = state[f"replay.{name}"].numpy()


class _Clock(BaseCallback):  # type: ignore[misc,unused-ignore]
    """Counts the seconds spent collecting, during which torch has one thread, so that physics has
    the cores.
    """

    def __init__(self, threads: int) -> None:
        super().__init__()
        self.threads, self.collecting, self._began = threads, 0.0, 0.0

    def _on_rollout_start(self) -> None:
        torch.set_num_threads(1)
        self._began = time.monotonic()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.collecting += time.monotonic() - self._began
        torch.set_num_threads(self.threads)


@contextmanager
def _generators_restored() -> Iterator[None]:
    """Leave the global generators, which SB3 draws from, as they were found."""
    plain, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(numpy)


ppo = AgentKind(
    name="sb3:ppo",
    doc="Stable-Baselines3's PPO: one behaviour for all tasks.",
    config=SB3PPOConfig,
    build=PPOLearner,
    fit=SB3Learner.inhabit,
)
sac = AgentKind(
    name="sb3:sac",
    doc="Stable-Baselines3's SAC: one behaviour for all tasks, off-policy.",
    config=SACConfig,
    build=SACLearner,
    fit=SB3Learner.inhabit,
)
recurrent_ppo = AgentKind(
    name="sb3:recurrentppo",
    doc="sb3-contrib's RecurrentPPO, an LSTM, over trials: RL2 as SB3 would have it.",
    config=RecurrentPPOConfig,
    build=RecurrentPPOLearner,
    fit=SB3Learner.inhabit,
)
