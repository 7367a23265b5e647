"""VariBAD (Zintgraf et al. 2020): a recurrent encoder infers a Gaussian over tasks, on which a
policy acts.

Encoder and decoder are trained by the evidence lower bound: from the posterior after some steps of
a trial the decoder must tell rewards and motion of the whole trial, past and future. The policy
sees the observation, the posterior's mean and its standard deviation, and is trained by PPO over
trials. Its gradient stops there, so that the posterior stays one over tasks; but the clipped steps
are taken on the posteriors as they now are, so that what the encoder learns meanwhile counts as a
change of the policy too. In training only, the critic is shown the task.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metarobot.agents.rl2 import TrialBatch, TrialsConfig, TrialsPPO, last_step
from metarobot.learning.agent_interface import AgentKind, Context, Dimensions
from metarobot.learning.gaussian_posterior import (
    Gaussian,
    check_posterior,
    kl_divergence,
    log_density,
    sample,
    standard_normal,
)
from metarobot.learning.memories import make_memory
from metarobot.learning.networks import RunningNorm, mlp, orthogonal
from metarobot.types import Percept, Rollout, Trials, TrialSequence, join_episodes

PACE = 0.05
"""Share of a minibatch in the variance of a decoder's errors."""
FLOOR = 1e-4
"""Least variance of an error, in that of what is predicted."""


@dataclass(frozen=True, kw_only=True)
class VariBADConfig(TrialsConfig):
    """Settings of VariBAD; those of RL² wherever they mean the same."""

    latent: int = 8
    """Dimensions of the Gaussian over tasks."""
    through: bool = False
    """Let the policy's gradient reach the encoder too."""
    posteriors: int = 8
    """Times of a trial, drawn anew each pass, from whose posteriors it is reconstructed."""
    transitions: int = 32
    """Steps of a trial, drawn anew each pass, that are reconstructed from each of them."""


class VariBADAgent(nn.Module):
    """A memory, the posterior it infers, and a perceptron each for actor and critic over what is
    seen and inferred.
    """

    privileged = explores = False

    def __init__(self, shapes: Dimensions, config: VariBADConfig) -> None:
        super().__init__()
        width, latent = config.width, config.latent
        inputs, seen = shapes.obs + 1 + shapes.act + 2, shapes.obs + 2 * latent
        self.obs, self.latent, self.through = shapes.obs, latent, config.through
        self.norm = RunningNorm(shapes.obs + 1)
        self.embed = orthogonal(nn.Linear(inputs, width), math.sqrt(2))
        self.memory = make_memory(config.memory, width, width)
        held = len(self.memory.begin(1))
        self.context_names = (*("h", "c")[:held], "mean", "variance")
        self.encoder = mlp(width, (width,), 2 * latent, gain=0.1)
        self.actor = mlp(seen, (width, width), shapes.act, gain=0.01)
        self.critic = mlp(seen + shapes.task + shapes.critic, (width, width), 1)
        self.labels = mlp(2 * latent, (64,), 2 * shapes.task, gain=0.1)
        self.log_std = nn.Parameter(torch.full((shapes.act,), math.log(config.std)))

    def features(self, percept: Percept) -> Tensor:
        """Normalise observation and reward, and join the whole percept into one input ``(...,
        input)``.
        """
        seen = self.norm(torch.cat([percept.obs, percept.reward[..., None]], -1))
        return torch.cat(
            [seen, percept.action, percept.done[..., None], percept.first[..., None]], -1
        )

    def remember(self, x: Tensor) -> Tensor:
        """Run whole trials of inputs ``(time, world, input)`` through the memory, ``(time, world,
        width)``.
        """
        h: Tensor = self.memory.sequence(torch.tanh(self.embed(x)))
        return h

    def infer(self, h: Tensor) -> Gaussian:
        """Return the posterior over tasks from what is remembered."""
        mean, log_var = self.encoder(h).chunk(2, -1)
        return Gaussian(mean, log_var.exp())

    def situation(self, x: Tensor, q: Gaussian) -> Tensor:
        """Join the normalised observation in the input ``x`` with the posterior: what the policy
        acts on.
        """
        return torch.cat([x[..., : self.obs], q.mean, q.var.sqrt()], -1)

    def forward(
        self, x: Tensor, task: Tensor, critic_obs: Tensor
    ) -> tuple[Tensor, Tensor, Gaussian]:
        """Run whole trials of inputs ``(time, world, input)``: mean action, value and posterior at
        every step.

        ``task`` ``(world, parameter)`` and ``critic_obs`` ``(time, world, critic)`` reach the
        critic alone, which acting does without.
        """
        q = self.infer(self.remember(x))
        seen = self.situation(x, q if self.through else Gaussian(q.mean.detach(), q.var.detach()))
        told = torch.cat([seen, task.expand(len(x), -1, -1), critic_obs], -1)
        return self.actor(seen), self.critic(told)[..., 0], q

    def begin(self, worlds: int, task: Tensor | None = None) -> Context:
        """Return an empty memory a world, and the prior's mean and variance."""
        return (
            *self.memory.begin(worlds),
            *standard_normal(self.log_std.new_empty(worlds, self.latent)),
        )

    def act(
        self, percept: Percept, context: Context, noise: Tensor | None = None
    ) -> tuple[Tensor, Context]:
        """Step the memory, infer, and act on the posterior."""
        x = self.features(percept)
        h, remembered = self.memory.step(torch.tanh(self.embed(x)), context[:-2])
        q = self.infer(h)
        mean = self.actor(self.situation(x, q))
        return (mean if noise is None else torch.addcmul(mean, noise, self.log_std.exp())), (
            *remembered,
            *q,
        )

    def adapt(self, context: Context, episode: Rollout) -> Context:
        """Do nothing: the posterior, the context's last two tensors, was inferred while acting."""
        return context

    def posterior(self, context: Context) -> Gaussian:
        """Return mean and variance over the latent task, ``(task, latent)``."""
        return Gaussian(*context[-2:])

    def belief(self, context: Context) -> Gaussian:
        """Return what the posterior says of the task's encoding, ``(task, parameter)``, in the
        encoding's unit.
        """
        return self.told(self.posterior(context))

    def told(self, q: Gaussian) -> Gaussian:
        """Read a posterior as mean and variance of the task's encoding."""
        mean, log_var = self.labels(torch.cat([q.mean, q.var.log()], -1)).chunk(2, -1)
        return Gaussian(mean, log_var.exp())


class Head(nn.Module):
    """A perceptron over a task and a step, whose first layer is shared out: each of the two passes
    it once.
    """

    def __init__(self, latent: int, inputs: int, outputs: int, width: int) -> None:
        super().__init__()
        self.task = orthogonal(nn.Linear(latent, width), math.sqrt(2))
        self.seen = orthogonal(nn.Linear(inputs, width, bias=False), math.sqrt(2))
        self.rest = mlp(width, (width,), outputs)

    def forward(self, task: Tensor, seen: Tensor) -> Tensor:
        """Map every task ``(draw, world, latent)`` with every step ``(step, world, input)`` of its
        world.
        """
        out: Tensor = self.rest(torch.tanh(self.task(task)[:, None] + self.seen(seen)))
        return out


class Decoder(nn.Module):
    """Says what a step leads to in a task: where the robot gets to, and from there the reward.

    The variance of its errors is that of recent ones: where its own gradient would take it, only
    sooner (Rybkin et al. 2021).
    """

    var: Tensor

    def __init__(self, shapes: Dimensions, latent: int, width: int = 64) -> None:
        super().__init__()
        self.motion = Head(latent, shapes.obs + shapes.act, shapes.obs, width)
        self.reward = Head(latent, 2 * shapes.obs + shapes.act, 1, width)
        self.register_buffer("var", torch.ones(shapes.obs + 1))

    def forward(self, task: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Return the errors about each step under each of several tasks, ``(draw, step, world, obs
        + 1)``.

        Shapes: task ``(draw, world, latent)``; before ``(step, world, obs + act)``, observation and
        action; after ``(step, world, obs + 1)``, the next observation and the reward.
        """
        n = after.shape[-1] - 1
        motion = self.motion(task, before) + before[..., :n] - after[..., :n]
        reward = self.reward(task, torch.cat([before, after[..., :n]], -1)) - after[..., n:]
        return torch.cat([motion, reward], -1)

    def log_density(self, squared: Tensor) -> Tensor:
        """Return the log-density of squared errors ``(..., obs + 1)``, one by one."""
        return -0.5 * (squared / self.var + (2 * math.pi * self.var).log())

    def measure(self, squared: Tensor) -> None:
        """Take in the mean squared errors of a minibatch, ``(obs + 1,)``."""
        self.var.lerp_(squared, PACE).clamp_(min=FLOOR)


class Draws(NamedTuple):
    """What is drawn for one pass: times of posteriors, noise of their samples, and steps to
    reconstruct.

    Shapes: times ``(draw, world)``; noise ``(draw, world, latent)``; before ``(step, world, obs +
    act)`` and after ``(step, world, obs + 1)`` as the decoder takes them; steps ``(world,)``, how
    many each trial has.
    """

    times: Tensor
    noise: Tensor
    before: Tensor
    after: Tensor
    steps: Tensor


class VariBAD(TrialsPPO):
    """Trains a ``VariBADAgent``."""

    parts = ("reward_log_density", "motion_log_density", "posterior_kl", "belief_loss")

    def __init__(self, config: VariBADConfig, shapes: Dimensions) -> None:
        decoder = Decoder(shapes, config.latent)
        super().__init__(config, VariBADAgent(shapes, config), shapes, decoder=decoder)
        self.decoder, self.drawn = decoder, (config.posteriors, config.transitions)
        acting = [
            p
            for k, p in self.agent.named_parameters()
            if k.startswith(("actor.", "critic.", "log_std"))
        ]
        apart = [acting, list(self.agent.labels.parameters())]
        others = {id(p) for p in chain(*apart)}
        # their gradients differ by orders of magnitude: none is to shrink another's bound
        self.groups = [*apart, [p for p in chain(*self.groups) if id(p) not in others]]

    def update(self, trials: Trials, progress: float, seed: int) -> dict[str, float]:
        """Learn from one set of trials; raise if the posterior has broken down."""
        self.decoder.to(trials.task.device)
        metrics = super().update(trials, progress, seed)
        seq = join_episodes(trials.episodes)
        with torch.no_grad():
            h = self.agent.remember(self.agent.features(seq.percept))
            check_posterior(
                self.agent.infer(h[last_step(seq), torch.arange(h.shape[1], device=h.device)]),
                "varibad",
            )
        return metrics

    def _draw(self, seq: TrialSequence, generator: torch.Generator) -> Draws:
        steps, (posteriors, transitions) = last_step(seq) + 1, self.drawn
        columns = torch.arange(len(steps), device=steps.device)

        def times(n: int) -> Tensor:
            return (torch.rand(n, len(steps), generator=generator).to(steps.device) * steps).long()

        noise = torch.randn(posteriors, len(steps), self.agent.latent, generator=generator).to(
            steps.device
        )
        drawn = times(transitions), columns
        reward = seq.reward[drawn][..., None]
        obs, after = (
            self.agent.norm(torch.cat([x[drawn], reward], -1))
            for x in (seq.percept.obs, seq.next_obs)
        )
        before = torch.cat([obs[..., :-1], seq.action[drawn]], -1)
        return Draws(times(posteriors), noise, before, after, steps)

    def _step(self, batch: TrialBatch, drawn: Draws, rows: Tensor, teach: float) -> Tensor:
        """Take one gradient step, and the measure of the decoder's errors."""
        statistics = super()._step(batch, drawn, rows, teach)
        self.decoder.measure(statistics[4 + len(self.parts) :])
        return statistics[: 4 + len(self.parts)]

    def _known(
        self, known: Gaussian, batch: TrialBatch, drawn: Draws, weight: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the bound and the error of the belief, at times drawn from some trials."""
        squared, divergence, q = self._elbo(known, drawn, rows)
        density = self.decoder.log_density(squared)
        # J = E_t [E_q(m|τ:t) ln p(τ|m) − KL(q(m|τ:t) ‖ q(m|τ:t−1))], here a step of the trial
        bound = density.sum(-1) - divergence / drawn.steps[rows]
        # whoever has seen nothing yet has the prior
        told = Gaussian(
            *(
                torch.cat([x.detach(), y[:1]])
                for x, y in zip(q, standard_normal(q.mean), strict=True)
            )
        )
        belief = -log_density(self.agent.told(told), batch.task[rows])
        share = self.config.minibatches / self.config.worlds
        parts = (
            torch.stack([density[..., -1], density[..., :-1].sum(-1), divergence]).mean(1).sum(-1)
        )
        parts = torch.cat([parts, belief.mean(0).sum()[None], squared.mean(0).sum(0)])
        return share * (belief.mean(0).sum() - bound.mean(0).sum()), share * parts

    def _elbo(self, known: Gaussian, drawn: Draws, rows: Tensor) -> tuple[Tensor, Tensor, Gaussian]:
        """Return the parts of the bound at the times drawn from some trials, and the posteriors
        there.

        Shapes: the decoder's squared errors, meaned over steps, ``(draw, world, obs + 1)``;
        divergences ``(draw, world)``.
        """
        times, columns = drawn.times[:, rows], torch.arange(len(rows), device=rows.device)
        q, previous = (
            Gaussian(*(x[t, columns] for x in known)) for t in (times, (times - 1).clamp_min(0))
        )
        first = (times == 0)[..., None]
        previous = Gaussian(
            *(
                torch.where(first, a, b)
                for a, b in zip(standard_normal(q.mean), previous, strict=True)
            )
        )
        errors = self.decoder(
            sample(q, drawn.noise[:, rows]), drawn.before[:, rows], drawn.after[:, rows]
        )
        return errors.square().mean(1), kl_divergence(q, previous), q


varibad = AgentKind(
    name="varibad",
    doc="VariBAD: a recurrent encoder infers a Gaussian over tasks while acting; PPO over trials, and a decoder.",
    config=VariBADConfig,
    build=VariBAD,
)
