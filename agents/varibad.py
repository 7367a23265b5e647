"""VariBAD (Zintgraf et al. 2020): a policy on a Gaussian posterior over tasks.

A recurrent encoder infers the posterior from the trial so far. Encoder and decoder are trained by
the evidence lower bound: from a posterior at some time of a trial the decoder has to predict
rewards and motion of the whole trial, past and future.

The policy observes the observation, the posterior's mean and its standard deviation, and is trained
by PPO over trials. Its gradient does not reach the encoder, so that the posterior remains one over
tasks. The clipped steps are nevertheless taken on the current posteriors, so that a change of the
encoder counts as a change of the policy too. In training only, the critic observes the task.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metarobot.config_bounds import Count, LayerSize
from metarobot.learning.agent_interface import AgentKind, Context, Dimensions
from metarobot.learning.gaussian_posterior import (
    Gaussian,
    check_posterior,
    kl_divergence,
    log_density,
    sample,
    standard_normal,
)
from metarobot.learning.networks import RunningNorm, mlp, orthogonal
from metarobot.learning.ppo_core import (
    PPOBatch,
    RecurrentActorCritic,
    TrialPPOLearner,
    TrialPPOSettings,
    last_step,
)
from metarobot.learning.recurrent_memories import make_memory
from metarobot.types import Percept, Trials, TrialSequence, join_episodes

VARIANCE_UPDATE_RATE = 0.05
"""Weight of a minibatch in the running variance of the decoder's errors."""
MIN_ERROR_VARIANCE = 1e-4
"""Smallest variance of a decoder's error, in units of the variance of what is predicted."""


@dataclass(frozen=True, kw_only=True)
class VariBADConfig(TrialPPOSettings):
    """Settings of VariBAD; those that it shares with RL² have the same defaults."""

    latent: LayerSize = 8
    """Dimensions of the Gaussian over tasks."""
    through: bool = False
    """Let the policy's gradient reach the encoder too."""
    posteriors: Count = 8
    """Times of a trial, drawn anew in each pass, from whose posteriors it is reconstructed."""
    transitions: Count = 32
    """Steps of a trial, drawn anew in each pass, that are reconstructed from each of them."""


class VariBADAgent(RecurrentActorCritic):
    """A memory, the posterior inferred from it, and perceptrons for actor and critic.

    The context is the memory's state, then mean and variance of the posterior.
    """

    def __init__(self, shapes: Dimensions, config: VariBADConfig) -> None:
        super().__init__()
        width = config.width
        latent = config.latent
        self.obs = shapes.obs
        self.latent = latent
        self.through = config.through

        self.norm = RunningNorm(shapes.obs + 1)
        self.embed = orthogonal(
            nn.Linear(Percept.size(shapes.obs, shapes.act), width), math.sqrt(2)
        )
        self.memory = make_memory(config.memory, width, width)
        memory_tensors = len(self.memory.begin(1))
        self.context_names = (*("h", "c")[:memory_tensors], "mean", "variance")
        self.encoder = mlp(width, (width,), 2 * latent, gain=0.1)

        policy_inputs = shapes.obs + 2 * latent
        self.actor = mlp(policy_inputs, (width, width), shapes.act, gain=0.01)
        self.critic = mlp(policy_inputs + shapes.task + shapes.critic, (width, width), 1)
        self.labels = mlp(2 * latent, (64,), 2 * shapes.task, gain=0.1)
        self.log_std = nn.Parameter(torch.full((shapes.act,), math.log(config.std)))

    def run_memory(self, x: Tensor) -> Tensor:
        """Run trials ``(time, world, input)`` through the memory, to ``(time, world, width)``."""
        h: Tensor = self.memory.sequence(torch.tanh(self.embed(x)))
        return h

    def infer(self, h: Tensor) -> Gaussian:
        """Return the posterior over tasks from the memory's output ``(..., width)``."""
        mean, log_var = self.encoder(h).chunk(2, -1)
        return Gaussian(mean, log_var.exp())

    def policy_input(self, x: Tensor, posterior: Gaussian) -> Tensor:
        """Join the normalised observation, the start of the input ``x``, with the posterior."""
        return torch.cat([x[..., : self.obs], posterior.mean, posterior.var.sqrt()], -1)

    def forward(
        self, x: Tensor, task: Tensor, critic_obs: Tensor
    ) -> tuple[Tensor, Tensor, Gaussian]:
        """Run whole trials ``x`` ``(time, world, input)`` through encoder, actor and critic.

        Args:
            x: What ``features`` returns for every step.
            task: Encoded task, ``(world, parameter)``, for the critic alone.
            critic_obs: What only the critic observes, ``(time, world, critic)``.

        Returns:
            Mean action ``(time, world, act)``, value ``(time, world)`` and posterior
            ``(time, world, latent)``.
        """
        posterior = self.infer(self.run_memory(x))
        detached = Gaussian(posterior.mean.detach(), posterior.var.detach())
        policy_input = self.policy_input(x, posterior if self.through else detached)
        task_in_time = task.expand(len(x), -1, -1)
        value = self.critic(torch.cat([policy_input, task_in_time, critic_obs], -1))
        return self.actor(policy_input), value[..., 0], posterior

    def begin(self, worlds: int, task: Tensor | None = None) -> Context:
        """Return an empty memory for each world, and the prior's mean and variance."""
        prior = standard_normal(self.log_std.new_empty(worlds, self.latent))
        return (*self.memory.begin(worlds), *prior)

    def act(
        self, percept: Percept, context: Context, noise: Tensor | None = None
    ) -> tuple[Tensor, Context]:
        """Step the memory, infer the posterior, and act on it."""
        x = self.features(percept)
        h, state = self.memory.step(torch.tanh(self.embed(x)), context[:-2])
        posterior = self.infer(h)
        action = self.with_noise(self.actor(self.policy_input(x, posterior)), noise)
        return action, (*state, *posterior)

    def posterior(self, context: Context) -> Gaussian:
        """Return mean and variance of the latent task, ``(task, latent)``."""
        return Gaussian(*context[-2:])

    def belief(self, context: Context) -> Gaussian:
        """Return mean and variance of the encoded task, ``(task, parameter)``."""
        return self.decode_task(self.posterior(context))

    def decode_task(self, posterior: Gaussian) -> Gaussian:
        """Map a posterior to mean and variance of the encoded task, ``(..., parameter)``."""
        inputs = torch.cat([posterior.mean, posterior.var.log()], -1)
        mean, log_var = self.labels(inputs).chunk(2, -1)
        return Gaussian(mean, log_var.exp())


class PairwiseHead(nn.Module):
    """A perceptron over all pairs of a latent task and a step.

    The first layer is linear in both, so each task and each step passes it once, not once per pair.
    """

    def __init__(self, latent: int, inputs: int, outputs: int, width: int) -> None:
        super().__init__()
        self.task = orthogonal(nn.Linear(latent, width), math.sqrt(2))
        self.seen = orthogonal(nn.Linear(inputs, width, bias=False), math.sqrt(2))
        self.rest = mlp(width, (width,), outputs)

    def forward(self, task: Tensor, step: Tensor) -> Tensor:
        """Map tasks ``(draw, world, latent)`` and steps ``(step, world, input)`` of their worlds.

        Returns:
            ``(draw, step, world, output)``.
        """
        out: Tensor = self.rest(torch.tanh(self.task(task)[:, None] + self.seen(step)))
        return out


class Decoder(nn.Module):
    """Predicts what a step leads to in a task: the next observation, and from there the reward.

    The variance of its errors is estimated from recent errors, which is where its own gradient
    would take it, only sooner (Rybkin et al. 2021).
    """

    var: Tensor

    def __init__(self, shapes: Dimensions, latent: int, width: int = 64) -> None:
        super().__init__()
        transition = shapes.obs + shapes.act
        self.motion = PairwiseHead(latent, transition, shapes.obs, width)
        self.reward = PairwiseHead(latent, transition + shapes.obs, 1, width)
        self.register_buffer("var", torch.ones(shapes.obs + 1))

    def forward(self, task: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Return the prediction errors of each step under each of several tasks.

        Args:
            task: Latent tasks, ``(draw, world, latent)``.
            before: Observation and action, ``(step, world, obs + act)``.
            after: Next observation and reward, ``(step, world, obs + 1)``.

        Returns:
            ``(draw, step, world, obs + 1)``.
        """
        obs_dim = after.shape[-1] - 1
        obs = before[..., :obs_dim]
        next_obs = after[..., :obs_dim]
        reward = after[..., obs_dim:]

        motion_error = self.motion(task, before) + obs - next_obs
        reward_error = self.reward(task, torch.cat([before, next_obs], -1)) - reward
        return torch.cat([motion_error, reward_error], -1)

    def log_density(self, squared: Tensor) -> Tensor:
        """Return the log-density of squared errors ``(..., obs + 1)``, one by one."""
        # ln N(e; 0, σ²) = −½ (e² / σ² + ln 2πσ²)
        return -0.5 * (squared / self.var + (2 * math.pi * self.var).log())

    def update_variance(self, squared: Tensor) -> None:
        """Move the variance towards a minibatch's mean squared errors, ``(obs + 1,)``."""
        self.var.lerp_(squared, VARIANCE_UPDATE_RATE).clamp_(min=MIN_ERROR_VARIANCE)


class Draws(NamedTuple):
    """What is drawn for one pass over the trials: times, noise, and steps to reconstruct."""

    times: Tensor
    """Times whose posteriors are used, ``(draw, world)``."""
    noise: Tensor
    """Standard normal noise of the samples from these posteriors, ``(draw, world, latent)``."""
    before: Tensor
    """Observation and action of the steps to reconstruct, ``(step, world, obs + act)``."""
    after: Tensor
    """Their next observation and reward, ``(step, world, obs + 1)``."""
    steps: Tensor
    """Number of steps of each trial, ``(world,)``."""


class VariBAD(TrialPPOLearner):
    """Train a ``VariBADAgent``: the policy by PPO over trials, the posterior by the ELBO."""

    AUXILIARY_STATISTICS = (
        "reward_log_density",
        "motion_log_density",
        "posterior_kl",
        "belief_loss",
    )
    agent: VariBADAgent
    config: VariBADConfig

    def __init__(self, config: VariBADConfig, shapes: Dimensions) -> None:
        # weights are drawn from the global generator: the decoder's first, then the agent's
        decoder = Decoder(shapes, config.latent)
        super().__init__(config, VariBADAgent(shapes, config), shapes, decoder=decoder)
        self.decoder = decoder

        # Their gradients differ by orders of magnitude, so the norm of each group is bounded
        # separately: none shrinks another's steps.
        policy: list[nn.Parameter] = []
        labels: list[nn.Parameter] = []
        inference: list[nn.Parameter] = []
        for name, parameter in self.agent.named_parameters():
            if name.startswith(("actor.", "critic.", "log_std")):
                policy.append(parameter)
            elif name.startswith("labels."):
                labels.append(parameter)
            else:
                inference.append(parameter)
        inference += decoder.parameters()
        self.groups = [policy, labels, inference]

    def update(self, trials: Trials, progress: float, seed: int) -> dict[str, float]:
        """Update the agent from one iteration's trials.

        Raises:
            PosteriorError: The posterior is not finite, or the same in all tasks.
        """
        self.decoder.to(trials.task.device)
        metrics = super().update(trials, progress, seed)

        seq = join_episodes(trials.episodes)
        with torch.no_grad():
            h = self.agent.run_memory(self.agent.features(seq.percept))
            worlds = torch.arange(h.shape[1], device=h.device)
            check_posterior(self.agent.infer(h[last_step(seq), worlds]), "varibad")
        return metrics

    def _draw(self, seq: TrialSequence, generator: torch.Generator) -> Draws:
        """Draw the times of posteriors, their noise and the steps to reconstruct, for one pass."""
        steps = last_step(seq) + 1
        device = steps.device
        worlds = torch.arange(len(steps), device=device)

        def draw_times(count: int) -> Tensor:
            uniform = torch.rand(count, len(steps), generator=generator).to(device)
            return (uniform * steps).long()

        # the order of these three draws fixes the random stream
        noise_shape = (self.config.posteriors, len(steps), self.agent.latent)
        noise = torch.randn(noise_shape, generator=generator).to(device)
        transitions = (draw_times(self.config.transitions), worlds)
        times = draw_times(self.config.posteriors)

        reward = seq.reward[transitions][..., None]
        obs = self.agent.norm(torch.cat([seq.percept.obs[transitions], reward], -1))[..., :-1]
        after = self.agent.norm(torch.cat([seq.next_obs[transitions], reward], -1))
        before = torch.cat([obs, seq.action[transitions]], -1)
        return Draws(times, noise, before, after, steps)

    def _step(self, batch: PPOBatch, draws: Draws, rows: Tensor, teach: float) -> Tensor:
        """Take one gradient step, and update the variance of the decoder's errors."""
        statistics = super()._step(batch, draws, rows, teach)
        # behind the reported statistics stand the decoder's squared errors, ``(obs + 1,)``
        reported = len(self.STATISTICS) + len(self.AUXILIARY_STATISTICS)
        self.decoder.update_variance(statistics[reported:])
        return statistics[:reported]

    def _auxiliary_loss(
        self, inferred: Gaussian, task: Tensor, weight: Tensor, draws: Draws, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return minus the evidence lower bound, plus the error of the belief about the task.

        The statistics are followed by the decoder's mean squared errors.
        """
        squared, divergence, posterior = self._reconstruct(inferred, draws, rows)
        density = self.decoder.log_density(squared)

        # J = E_t [E_q(m|τ:t) ln p(τ|m) − KL(q(m|τ:t) ‖ q(m|τ:t−1))]  (Zintgraf et al. 2020, eq. 8),
        # here per step of the trial
        bound = density.sum(-1) - divergence / draws.steps[rows]

        # the belief is trained at these posteriors and at the prior, with which a trial begins;
        # its gradient stops at the posterior
        prior = standard_normal(posterior.mean)
        posteriors = Gaussian(
            torch.cat([posterior.mean.detach(), prior.mean[:1]]),
            torch.cat([posterior.var.detach(), prior.var[:1]]),
        )
        belief_loss = -log_density(self.agent.decode_task(posteriors), task)

        # sums over the trials of a minibatch, times this, are means over trials
        share = self.config.minibatches / self.config.worlds
        loss = share * (belief_loss.mean(0).sum() - bound.mean(0).sum())

        reward_density = density[..., -1]
        motion_density = density[..., :-1].sum(-1)
        per_draw = torch.stack([reward_density, motion_density, divergence])
        statistics = torch.cat(
            [
                per_draw.mean(1).sum(-1),
                belief_loss.mean(0).sum()[None],
                squared.mean(0).sum(0),
            ]
        )
        return loss, share * statistics

    def _reconstruct(
        self, inferred: Gaussian, draws: Draws, rows: Tensor
    ) -> tuple[Tensor, Tensor, Gaussian]:
        """Evaluate the terms of the lower bound at the drawn times of some trials.

        Returns:
            The decoder's squared errors, averaged over steps, ``(draw, world, obs + 1)``; the KL
            divergences from the posterior one step earlier, ``(draw, world)``; the posteriors
            ``(draw, world, latent)``.
        """
        times = draws.times[:, rows]
        earlier = (times - 1).clamp_min(0)
        worlds = torch.arange(len(rows), device=rows.device)
        posterior = Gaussian(inferred.mean[times, worlds], inferred.var[times, worlds])

        # before the first step the posterior is the prior
        first = (times == 0)[..., None]
        prior = standard_normal(posterior.mean)
        previous = Gaussian(
            torch.where(first, prior.mean, inferred.mean[earlier, worlds]),
            torch.where(first, prior.var, inferred.var[earlier, worlds]),
        )

        latent_task = sample(posterior, draws.noise[:, rows])
        errors = self.decoder(latent_task, draws.before[:, rows], draws.after[:, rows])
        return errors.square().mean(1), kl_divergence(posterior, previous), posterior


varibad = AgentKind(
    name="varibad",
    doc=(
        "VariBAD: a recurrent encoder infers a Gaussian over tasks while acting; PPO over trials, "
        "and a decoder."
    ),
    config=VariBADConfig,
    build=VariBAD,
)
