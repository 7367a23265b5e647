"""PEARL: a posterior over tasks from whatever was lived, in whatever order (Rakelly et al. 2019).

The posterior is the prior times one Gaussian factor a transition. A soft actor-critic (Haarnoja et
al. 2018) acts on the observation and on z, drawn once an episode; it learns off-policy, from the
trials of a replay.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from metarobot.errors import MetarobotError
from metarobot.learning.agent_interface import AgentKind, Context, Dimensions
from metarobot.learning.gaussian_posterior import (
    Gaussian,
    PosteriorError,
    check_posterior,
    kl_divergence,
    log_density,
    product_of_gaussians,
    sample,
    standard_normal,
)
from metarobot.learning.networks import RunningNorm, linears, mlp
from metarobot.learning.optimiser_state import flatten_state, restore_state
from metarobot.learning.ppo_core import set_gradients
from metarobot.learning.returns import discounted
from metarobot.learning.trial_replay import Transitions, TrialReplay
from metarobot.types import Percept, Rollout, Trials, join_episodes


@dataclass(frozen=True, kw_only=True)
class PEARLConfig:
    """Settings of PEARL; the defaults reach the results in the README on one CPU core."""

    worlds: int = 20
    """Trials an iteration, each of a task of its own."""
    episodes: int = 3
    """Episodes a trial: one from the prior, then from what the ones before told."""
    replay: int = 1_000_000
    """Transitions that are remembered."""
    latent: int = 5
    """Dimensions of z."""
    width: int = 128
    """Width of the two hidden layers of encoder, actor and critics."""
    gradient_steps: int = 500
    """Gradient steps an iteration."""
    tasks: int = 16
    """Tasks a gradient step."""
    batch: int = 32
    """Transitions of each task that actor and critics learn from."""
    context: int = 64
    """Transitions of each task that z is inferred from, at most; their number is drawn anew for
    each gradient step."""
    recent: int = 100
    """Of the tasks of a gradient step, every second is among so many of the last."""
    lr: float = 1e-3
    """Adam's learning rate at the start."""
    lr_end: float = 0.1
    """Fraction of it that is left at the end; linear between."""
    gamma: float = 0.97
    """Discount a control step."""
    tau: float = 0.01
    """Fraction of the way that the target critics follow at each gradient step."""
    kl: float = 1e-4
    """Weight of the posterior's divergence from the prior."""
    alpha: float = 0.01
    """Temperature at the start."""
    alpha_lr: float = 0.2
    """Its learning rate, as a fraction of ``lr``: entropy that is lost before the critics know
    anything stays lost."""
    entropy: float = 1.0
    """Minus the entropy that the temperature aims at, nats a dimension of the action."""
    least: int = 4
    """Transitions that a task must have to be learned from."""


class PEARLAgent(nn.Module):
    """An encoder of single transitions, an actor that is told z, and a head that reads the task off
    the posterior.
    """

    privileged = explores = False
    context_names = ("mean", "variance", "z")
    low: Tensor
    high: Tensor

    def __init__(self, shapes: Dimensions, config: PEARLConfig) -> None:
        super().__init__()
        self.act_dim, self.noise_dim = shapes.act, shapes.act + config.latent
        hidden = (config.width, config.width)
        self.norm, self.reward_norm = RunningNorm(shapes.obs), RunningNorm(1)
        self.encoder = mlp(
            2 * shapes.obs + shapes.act + 1, hidden, 2 * config.latent, activation=nn.ReLU
        )
        self.actor = mlp(
            shapes.obs + config.latent, hidden, 2 * shapes.act, gain=0.01, activation=nn.ReLU
        )
        self.head = mlp(2 * config.latent, (config.width,), 2 * shapes.task)
        self.register_buffer("low", torch.tensor(shapes.low or (-1.0,) * shapes.act))
        self.register_buffer("high", torch.tensor(shapes.high or (1.0,) * shapes.act))

    def begin(self, worlds: int, task: Tensor | None = None) -> Context:
        """Return the prior N(0, 1), mean and variance, and z, ``(task, latent)`` each."""
        zeros = self.low.new_zeros(worlds, self.noise_dim - self.act_dim)
        return *standard_normal(zeros), zeros

    def act(
        self, percept: Percept, context: Context, noise: Tensor | None = None
    ) -> tuple[Tensor, Context]:
        """Act on z: an episode's first step draws it from the posterior, or without noise takes the
        mean.
        """
        mean, var, z = context
        drawn = mean if noise is None else sample(Gaussian(mean, var), noise[:, self.act_dim :])
        z = torch.where((percept.first + percept.done > 0)[:, None], drawn, z)
        u, log_std = self.policy(self.norm(percept.obs), z)
        u = u if noise is None else torch.addcmul(u, noise[:, : self.act_dim], log_std.exp())
        return self.low + (self.high - self.low) * (torch.tanh(u) + 1.0) / 2.0, (mean, var, z)

    def adapt(self, context: Context, episode: Rollout) -> Context:
        """Multiply the posterior by a factor for each transition of the episode; their order does
        not matter.
        """
        seq = join_episodes((episode,))
        mean, var = self.factors(
            Transitions(
                seq.percept.obs, seq.action, seq.reward, seq.terminated.float(), seq.next_obs
            )
        )
        # a factor of infinite variance says nothing
        lived = seq.valid[..., None]
        factors = Gaussian(torch.where(lived, mean, 0.0), torch.where(lived, var, math.inf))
        return *updated(self.posterior(context), factors, 0), context[2]

    def posterior(self, context: Context) -> Gaussian:
        """Return the distribution of z given all that was lived, ``(task, latent)``."""
        return Gaussian(*context[:2])

    def belief(self, context: Context) -> Gaussian:
        """Return what the posterior says of the task's encoding, ``(task, parameter)``."""
        return self.told(self.posterior(context))

    def told(self, posterior: Gaussian) -> Gaussian:
        """Read the task's encoding off a posterior."""
        mean, raw = self.head(torch.cat([posterior.mean, posterior.var.log()], -1)).chunk(2, -1)
        return Gaussian(mean, functional.softplus(raw) + 1e-4)

    def factors(self, lived: Transitions) -> Gaussian:
        """Return what each transition says of z, ``(..., latent)``."""
        x = (
            self.norm(lived.obs),
            self.centred(lived.action),
            self.reward_norm(lived.reward[..., None]),
        )
        mean, raw = self.encoder(torch.cat([*x, self.norm(lived.next_obs)], -1)).chunk(2, -1)
        return Gaussian(mean, (functional.softplus(raw) + 1e-6).reciprocal())

    def infer(self, lived: Transitions) -> Gaussian:
        """Return the posterior given transitions ``(task, step, ...)``."""
        factors = self.factors(lived)
        return updated(standard_normal(factors.mean[:, 0]), factors, 1)

    def centred(self, action: Tensor) -> Tensor:
        """Move actions from their bounds to ±1."""
        return (action - self.low) * (2.0 / (self.high - self.low)) - 1.0

    def policy(self, obs: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-deviation, before the squash, for normalised observations."""
        mean, log_std = self.actor(torch.cat([obs, z], -1)).chunk(2, -1)
        return mean, log_std.clamp(-5.0, 1.0)


def updated(prior: Gaussian, factors: Gaussian, dim: int) -> Gaussian:
    """Multiply a prior by factors along an axis."""
    return product_of_gaussians(
        Gaussian(
            *(torch.cat([a.unsqueeze(dim), b], dim) for a, b in zip(prior, factors, strict=True))
        ),
        dim,
    )


def squashed(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Draw an action ``tanh(μ + σ ε)`` and its log-density, summed over the action axis."""
    # ln(1 − tanh² u) = 2 (ln 2 − u − softplus(−2 u))
    u = mean + log_std.exp() * noise
    volume = 2.0 * (math.log(2.0) - u - functional.softplus(-2.0 * u))
    density = -0.5 * noise.square() - log_std - 0.5 * math.log(2.0 * math.pi) - volume
    return torch.tanh(u), density.sum(-1)


class Twins(nn.Module):
    """Two critics of the same shape, in one batched product a layer."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        nets = [linears(mlp(inputs, (width, width), 1, gain=0.01)) for _ in range(2)]
        layers = list(zip(*nets, strict=True))
        self.weights = nn.ParameterList(
            torch.stack([x.weight.detach().mT for x in pair]) for pair in layers
        )
        self.biases = nn.ParameterList(
            torch.stack([x.bias.detach()[None] for x in pair]) for pair in layers
        )

    def forward(self, x: Tensor, learns: bool = True) -> Tensor:
        """Return both values ``(2, step)`` of inputs ``(step, input)``; ``learns`` passes gradients
        to the weights.
        """
        h = x.expand(2, -1, -1)
        for i, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = torch.baddbmm(*((b, h, w) if learns else (b.detach(), h, w.detach())))
            h = torch.relu(h) if i < len(self.weights) - 1 else h
        return h[..., 0]


class PEARLBatch(NamedTuple):
    """What a gradient step learns from, ``(task, ...)``: transitions to infer from, and to learn
    control from.
    """

    context: Transitions
    steps: Transitions
    task: Tensor
    noise: Tensor
    """Standard normal, ``(task, latent)``."""
    noises: Tensor
    """The same for the actions now and next, ``(task, step, 2 act)``."""


STATISTICS = ("critic_loss", "actor_loss", "kl", "belief_nll", "entropy", "value")


class PEARL:
    """Trains a ``PEARLAgent`` by SAC on a replay."""

    def __init__(self, config: PEARLConfig, shapes: Dimensions) -> None:
        if config.episodes < 2:
            raise MetarobotError("episodes must be at least 2: one to infer from, one to show it")
        if config.context < config.least:
            raise MetarobotError(
                f"context must be at least {config.least}, the least of a task, not {config.context}"
            )
        self.config, self.shapes = config, shapes
        self.agent = PEARLAgent(shapes, config)
        inputs = shapes.obs + shapes.act + config.latent
        self.critics = Twins(inputs, config.width)
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)
        self.return_norm = RunningNorm(1)
        self.temperature = nn.ParameterDict({"log": torch.tensor(math.log(config.alpha))})
        nets, rest = (
            [*self.agent.parameters(), *self.critics.parameters()],
            [*self.temperature.parameters()],
        )
        self._parameters = [*nets, *rest]
        self.optimiser = torch.optim.Adam(
            [{"params": nets}, {"params": rest}], lr=config.lr, fused=True
        )
        self._replay: TrialReplay | None = None

    def reserve_memory(self) -> None:
        """Take the memory that the replay needs, or refuse."""
        if self._replay is None:
            self._replay = TrialReplay(self.shapes, self.config.replay, self.config.worlds)

    @property
    def replay(self) -> TrialReplay:
        """What was lived."""
        self.reserve_memory()
        assert self._replay is not None
        return self._replay

    def update(self, trials: Trials, progress: float, seed: int) -> dict[str, float]:
        """Remember trials, and learn from what is remembered."""
        c = self.config
        self._remember(trials)
        for group, share in zip(self.optimiser.param_groups, (1.0, c.alpha_lr), strict=True):
            group["lr"] = share * c.lr * (1.0 - progress * (1.0 - c.lr_end))
        generator = torch.Generator().manual_seed(seed)
        sums = torch.zeros(len(STATISTICS), device=trials.task.device)
        for _ in range(c.gradient_steps):
            sums += self._step(generator)
        metrics = {
            f"train/{k}": float(v) / c.gradient_steps for k, v in zip(STATISTICS, sums, strict=True)
        }
        extra = {
            "alpha": float(self.temperature["log"].detach().exp()),
            "replay": float(self.replay.transitions),
        }
        extra |= {
            "posterior_std": self._sound(trials),
            "learning_rate": float(self.optimiser.param_groups[0]["lr"]),
        }
        return metrics | {f"train/{k}": v for k, v in extra.items()}

    def _remember(self, trials: Trials) -> None:
        """Take trials into normalisers and replay, unless there is nothing to infer a task from."""
        explored, worlds = join_episodes(trials.episodes[:-1]), len(trials.task)
        fewest, world = explored.valid.sum(0).min(0)
        if fewest < self.config.least:
            raise PosteriorError(
                f"pearl: task {int(world)} of {worlds} has {int(fewest)} transitions to infer it from, "
                f"fewer than least = {self.config.least}"
            )
        told = torch.cat([explored.percept.obs, explored.action, explored.reward[..., None]], -1)
        if worlds > 1 and torch.equal(told, told[:, :1].expand_as(told)):
            raise PosteriorError(
                f"pearl: the contexts of all {worlds} tasks are identical; nothing tells tasks apart"
            )
        for module in (self.critics, self.targets, self.temperature, self.return_norm):
            module.to(trials.task.device)
        seq = join_episodes(trials.episodes)
        self.agent.norm.update(seq.percept.obs[seq.valid])
        self.agent.reward_norm.update(seq.reward[seq.valid][:, None])
        self.return_norm.update(discounted(seq.reward, self.config.gamma)[seq.valid][:, None])
        self.replay.add(trials)

    @torch.no_grad()
    def _sound(self, trials: Trials) -> float:
        """Return the posterior's mean deviation after trials; raise if weights or posteriors have
        broken down.
        """
        if not all(bool(p.isfinite().all()) for p in self._parameters):
            raise PosteriorError(
                "pearl: the weights are not finite any more; take a lower learning rate"
            )
        context = self.agent.begin(len(trials.task))
        for episode in trials.episodes[:-1]:
            context = self.agent.adapt(context, episode)
        posterior = self.agent.posterior(context)
        check_posterior(posterior, "pearl")
        return float(posterior.var.sqrt().mean())

    def _step(self, generator: torch.Generator) -> Tensor:
        """Take one gradient step on all weights at once, and let the target critics follow."""
        statistics = set_gradients(*self._loss(self._draw(generator)), self._parameters)
        self.optimiser.step()
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.targets.parameters()), list(self.critics.parameters()), self.config.tau
            )
        return statistics

    def _draw(self, generator: torch.Generator) -> PEARLBatch:
        c, held, exploring, device = (
            self.config,
            self.replay,
            self.config.episodes - 1,
            self.agent.low.device,
        )
        rows = held.draw(c.tasks, c.recent, generator)
        n = round(c.least * (c.context / c.least) ** float(torch.rand((), generator=generator)))
        context = held.steps(held.pick(rows, n, exploring, generator))
        steps = held.steps(held.pick(rows, c.batch, c.episodes, generator))
        noise = torch.randn(c.tasks, c.latent, generator=generator)
        noises = torch.randn(c.tasks, c.batch, 2 * self.shapes.act, generator=generator)
        context, steps = (Transitions(*(x.to(device) for x in lived)) for lived in (context, steps))
        return PEARLBatch(
            context, steps, held.task(rows).to(device), noise.to(device), noises.to(device)
        )

    def _loss(self, batch: PEARLBatch) -> tuple[Tensor, Tensor]:
        """Return the loss and the statistics.

        One loss for all weights: what is given to one part but not to be changed by it is detached.
        """
        c, agent = self.config, self.agent
        posterior = agent.infer(batch.context)
        z = sample(posterior, batch.noise)[:, None].expand(-1, c.batch, -1).flatten(0, 1)
        now, following = batch.noises.flatten(0, 1).chunk(2, -1)
        lived = Transitions(*(v.flatten(0, 1) for v in batch.steps))
        lived = lived._replace(obs=agent.norm(lived.obs), next_obs=agent.norm(lived.next_obs))
        target = self._target(lived, z.detach(), following)
        error = self.critics(torch.cat([lived.obs, agent.centred(lived.action), z], -1)) - target
        value, density = self._outlook(lived.obs, z.detach(), now)
        told = agent.told(Gaussian(*(x.detach() for x in posterior)))
        weight = 1.0 / (c.tasks * c.batch)
        critic_loss = weight * error.square().sum()
        actor_loss = weight * (self.temperature["log"].exp().detach() * density - value).sum()
        # the temperature rises where the policy's entropy is below the target
        temperature_loss = (
            -self.temperature["log"]
            * weight
            * (density.detach() - c.entropy * self.shapes.act).sum()
        )
        divergence = kl_divergence(posterior, standard_normal(posterior.mean)).sum() / c.tasks
        belief_nll = -log_density(told, batch.task).sum() / c.tasks
        shown = (
            critic_loss,
            actor_loss,
            divergence,
            belief_nll,
            -weight * density.sum(),
            weight * target.sum(),
        )
        loss = critic_loss + c.kl * divergence + actor_loss + belief_nll + temperature_loss
        return loss, torch.stack(shown)

    @torch.no_grad()
    def _target(self, lived: Transitions, z: Tensor, noise: Tensor) -> Tensor:
        """Return what the critics learn, ``(step,)``: one step's reward and the soft value of what
        follows.
        """
        # y = r + γ (1 − terminated) (min Q'(s', a') − α ln π(a' | s'))
        action, density = squashed(*self.agent.policy(lived.next_obs, z), noise)
        value = self.targets(torch.cat([lived.next_obs, action, z], -1)).amin(0)
        soft = value - self.temperature["log"].exp() * density
        target: Tensor = (
            lived.reward * self.return_norm.scale
            + self.config.gamma * (1.0 - lived.terminated) * soft
        )
        return target

    def _outlook(self, obs: Tensor, z: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the critics' lower value of an action drawn now, and its log-density, ``(step,)``
        each.
        """
        action, density = squashed(*self.agent.policy(obs, z), noise)
        return self.critics(torch.cat([obs, action, z], -1), learns=False).amin(0), density

    def products(self) -> list[tuple[int, int, int]]:
        """List the matrix products of a mean gradient step, (rows, inner, columns): the least that
        it costs.
        """
        c, rows = self.config, self.config.tasks * self.config.batch
        context = (
            round(c.tasks * (c.context - c.least) / max(math.log(c.context / c.least), 1e-9))
            or c.tasks * c.least
        )
        nets = (linears(self.agent.encoder), linears(self.agent.actor))
        encoder, actor = ([(x.in_features, x.out_features) for x in net] for net in nets)
        critics = [(w.shape[1], w.shape[2]) for w in self.critics.weights] * 2
        forward = (context, encoder), (rows, 2 * actor + 3 * critics)
        # backward by weights, and by inputs but for the first; each of as many multiplications as
        # the layer's own
        backward = (context, encoder + encoder[1:]), (rows, actor + actor[1:] + 3 * critics)
        return [(n, a, b) for n, layers in (*forward, *backward) for a, b in layers]

    def state(self) -> dict[str, Tensor]:
        """Return weights, normalisers, optimiser and replay."""
        modules = {"agent": self.agent, "critics": self.critics, "targets": self.targets}
        flat = flatten_state(
            self.optimiser, **modules, temperature=self.temperature, spread=self.return_norm
        )
        return flat | {f"replay.{k}": v for k, v in self.replay.state().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore them."""
        modules = {"agent": self.agent, "critics": self.critics, "targets": self.targets}
        restore_state(
            state, self.optimiser, **modules, temperature=self.temperature, spread=self.return_norm
        )
        self.replay.load(
            {k.removeprefix("replay."): v for k, v in state.items() if k.startswith("replay.")}
        )


pearl = AgentKind(
    name="pearl",
    doc="A posterior over tasks from single transitions; SAC acts on a draw of it.",
    config=PEARLConfig,
    build=PEARL,
)
