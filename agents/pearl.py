"""PEARL: a posterior over tasks from single transitions, in any order (Rakelly et al. 2019).

The posterior over the latent task z is the prior times one Gaussian factor for each transition. A
soft actor-critic (SAC, Haarnoja et al. 2018) acts on the observation and on z, which is sampled
once an episode; it learns off-policy, from a replay of trials.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from metarobot.config_bounds import Bounds, Count, Fraction, LayerSize, NonNegative, check_bounds
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
from metarobot.learning.ppo_core import decayed, set_gradients
from metarobot.learning.returns import discounted
from metarobot.learning.trial_replay import Transitions, TrialReplay
from metarobot.types import Percept, Rollout, Trials, join_episodes

MIN_LOG_STD = -5.0
MAX_LOG_STD = 1.0
"""Bounds on the log-deviation of the policy, before the squash."""


@dataclass(frozen=True, kw_only=True)
class PEARLConfig:
    """Settings of PEARL; the defaults reach the published results on one CPU core."""

    worlds: Count = 20
    """Trials an iteration, each of a task of its own."""
    episodes: Annotated[int, Bounds(2)] = 3
    """Episodes a trial: the first acts on the prior, the others on the posterior so far."""
    replay: Annotated[int, Bounds(1)] = 1_000_000
    """Capacity of the replay, in transitions."""
    latent: LayerSize = 5
    """Dimensions of z."""
    width: LayerSize = 128
    """Width of the two hidden layers of encoder, actor and critics."""
    gradient_steps: Count = 500
    """Gradient steps an iteration."""
    tasks: Count = 16
    """Tasks a gradient step."""
    batch: Count = 32
    """Transitions of each task that actor and critics learn from."""
    context: Count = 64
    """Transitions of each task that z is inferred from, at most; their number is sampled anew for
    each gradient step."""
    recent: Count = 100
    """Of the tasks of a gradient step, every second is among so many of the newest trials."""
    lr: NonNegative = 1e-3
    """Adam's learning rate at the start."""
    lr_end: Fraction = 0.1
    """Fraction of it that is left at the end; linear between."""
    gamma: Fraction = 0.97
    """Discount a control step."""
    tau: Fraction = 0.01
    """Fraction by which the target critics approach the critics at each gradient step."""
    kl: NonNegative = 1e-4
    """Weight β of the posterior's divergence from the prior."""
    alpha: Annotated[float, Bounds(1e-6)] = 0.01
    """Temperature at the start."""
    alpha_lr: NonNegative = 0.2
    """Its learning rate, as a fraction of ``lr``: entropy that is lost before the critics know
    anything stays lost."""
    entropy: NonNegative = 1.0
    """Minus the entropy that the temperature aims at, nats a dimension of the action."""
    least: Count = 4
    """Transitions that a task must have to be learned from."""


class PEARLAgent(nn.Module):
    """An encoder of transitions, an actor conditioned on z, and a head that decodes the task.

    Its context is the posterior's mean and variance, and the sample z of the current episode.
    """

    privileged = False
    explores = False
    context_names = ("mean", "variance", "z")
    low: Tensor
    high: Tensor

    def __init__(self, dims: Dimensions, config: PEARLConfig) -> None:
        super().__init__()
        self.act_dim = dims.act
        self.noise_dim = dims.act + config.latent
        hidden = (config.width, config.width)
        transition_size = 2 * dims.obs + dims.act + 1
        self.norm = RunningNorm(dims.obs)
        self.reward_norm = RunningNorm(1)
        self.encoder = mlp(transition_size, hidden, 2 * config.latent, activation=nn.ReLU)
        self.actor = mlp(
            dims.obs + config.latent, hidden, 2 * dims.act, gain=0.01, activation=nn.ReLU
        )
        self.head = mlp(2 * config.latent, (config.width,), 2 * dims.task)
        self.register_buffer("low", torch.tensor(dims.low or (-1.0,) * dims.act))
        self.register_buffer("high", torch.tensor(dims.high or (1.0,) * dims.act))

    def begin(self, worlds: int, task: Tensor | None = None) -> Context:
        """Return the prior N(0, 1), mean and variance, and z, ``(task, latent)`` each."""
        z = self.low.new_zeros(worlds, self.noise_dim - self.act_dim)
        mean, var = standard_normal(z)
        return mean, var, z

    def act(
        self, percept: Percept, context: Context, noise: Tensor | None = None
    ) -> tuple[Tensor, Context]:
        """Act on z, which an episode's first step samples from the posterior.

        ``noise`` ``(world, act + latent)`` is that of the action and of z; without it both are
        means.
        """
        mean, var, z = context
        new_z = mean
        if noise is not None:
            new_z = sample(Gaussian(mean, var), noise[:, self.act_dim :])
        episode_starts = (percept.first + percept.done > 0)[:, None]
        z = torch.where(episode_starts, new_z, z)

        pre_squash, log_std = self.action_distribution(self.norm(percept.obs), z)
        if noise is not None:
            pre_squash = torch.addcmul(pre_squash, noise[:, : self.act_dim], log_std.exp())
        action = self.low + (self.high - self.low) * (torch.tanh(pre_squash) + 1.0) / 2.0
        return action, (mean, var, z)

    def adapt(self, context: Context, episode: Rollout) -> Context:
        """Multiply the posterior by one factor for each transition; their order is irrelevant."""
        seq = join_episodes((episode,))
        transitions = Transitions(
            seq.percept.obs, seq.action, seq.reward, seq.terminated.float(), seq.next_obs
        )
        mean, var = self.factors(transitions)
        # padding: a factor of infinite variance leaves the product as it is
        valid = seq.valid[..., None]
        factors = Gaussian(torch.where(valid, mean, 0.0), torch.where(valid, var, math.inf))
        posterior = multiply_factors(self.posterior(context), factors, dim=0)
        return posterior.mean, posterior.var, context[2]

    def posterior(self, context: Context) -> Gaussian:
        """Return the posterior over z, ``(task, latent)``."""
        return Gaussian(*context[:2])

    def belief(self, context: Context) -> Gaussian:
        """Return the belief about the task's encoding, ``(task, parameter)``."""
        return self.decode_task(self.posterior(context))

    def decode_task(self, posterior: Gaussian) -> Gaussian:
        """Predict the task's encoding ``(task, parameter)`` from a posterior over z."""
        inputs = torch.cat([posterior.mean, posterior.var.log()], -1)
        mean, raw_var = self.head(inputs).chunk(2, -1)
        return Gaussian(mean, functional.softplus(raw_var) + 1e-4)

    def factors(self, transitions: Transitions) -> Gaussian:
        """Return the Gaussian factor Ψ(z | s, a, r, s') of each transition, ``(..., latent)``."""
        inputs = torch.cat(
            [
                self.norm(transitions.obs),
                self.normalised_action(transitions.action),
                self.reward_norm(transitions.reward[..., None]),
                self.norm(transitions.next_obs),
            ],
            -1,
        )
        mean, raw_precision = self.encoder(inputs).chunk(2, -1)
        return Gaussian(mean, (functional.softplus(raw_precision) + 1e-6).reciprocal())

    def infer(self, transitions: Transitions) -> Gaussian:
        """Return the posterior ``(task, latent)`` given transitions ``(task, step, ...)``."""
        factors = self.factors(transitions)
        prior = standard_normal(factors.mean[:, 0])
        return multiply_factors(prior, factors, dim=1)

    def normalised_action(self, action: Tensor) -> Tensor:
        """Scale actions from their bounds to ±1."""
        return (action - self.low) * (2.0 / (self.high - self.low)) - 1.0

    def action_distribution(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-deviation before the squash, ``(..., act)`` each.

        ``x`` ``(..., obs)`` are normalised observations.
        """
        mean, log_std = self.actor(torch.cat([x, z], -1)).chunk(2, -1)
        return mean, log_std.clamp(MIN_LOG_STD, MAX_LOG_STD)


def multiply_factors(prior: Gaussian, factors: Gaussian, dim: int) -> Gaussian:
    """Return the product of a prior and of factors along an axis (Rakelly et al. 2019, eq. 2)."""
    # q(z | c) ∝ p(z) Π_n Ψ(z | c_n)
    mean = torch.cat([prior.mean.unsqueeze(dim), factors.mean], dim)
    var = torch.cat([prior.var.unsqueeze(dim), factors.var], dim)
    return product_of_gaussians(Gaussian(mean, var), dim)


def sample_squashed(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Sample actions tanh(μ + σ ε) and their log-probabilities, summed over the action axis.

    Haarnoja et al. 2018, appendix C. All arguments are ``(..., act)``; ``noise`` ε is standard
    normal.
    """
    # ln π(a) = ln N(u; μ, σ) − Σ ln(1 − tanh² u)
    # ln(1 − tanh² u) = 2 (ln 2 − u − softplus(−2 u)), which does not overflow
    u = mean + log_std.exp() * noise
    log_volume = 2.0 * (math.log(2.0) - u - functional.softplus(-2.0 * u))
    log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2.0 * math.pi) - log_volume
    return torch.tanh(u), log_prob.sum(-1)


class TwinCritics(nn.Module):
    """Two critics Q(s, a, z) of the same shape, in one batched matrix product a layer."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        nets = [linears(mlp(inputs, (width, width), 1, gain=0.01)) for _ in range(2)]
        layers = list(zip(*nets, strict=True))
        self.weights = nn.ParameterList(
            torch.stack([layer.weight.detach().mT for layer in pair]) for pair in layers
        )
        self.biases = nn.ParameterList(
            torch.stack([layer.bias.detach()[None] for layer in pair]) for pair in layers
        )

    def forward(self, x: Tensor, train_weights: bool = True) -> Tensor:
        """Return both values ``(2, step)`` of inputs ``(step, input)``.

        With ``train_weights`` false, gradients reach the inputs but not the critics' weights.
        """
        h = x.expand(2, -1, -1)
        last = len(self.weights) - 1
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if not train_weights:
                weight = weight.detach()
                bias = bias.detach()
            h = torch.baddbmm(bias, h, weight)
            if i < last:
                h = torch.relu(h)
        return h[..., 0]


class PEARLBatch(NamedTuple):
    """The data of one gradient step, ``(task, ...)``."""

    context: Transitions
    """Transitions to infer z from."""
    steps: Transitions
    """Transitions that actor and critics learn from."""
    task: Tensor
    """Encodings of the tasks, ``(task, parameter)``."""
    latent_noise: Tensor
    """Standard normal, ``(task, latent)``."""
    action_noise: Tensor
    """Standard normal for the actions at ``obs`` and at ``next_obs``, ``(task, step, 2 act)``."""


STATISTICS = ("critic_loss", "actor_loss", "kl", "belief_nll", "entropy", "value")
"""Statistics of a gradient step, in the order in which ``PEARL._loss`` returns them."""


class PEARL:
    """Trains a ``PEARLAgent`` by SAC on a replay of trials."""

    def __init__(self, config: PEARLConfig, dims: Dimensions) -> None:
        """Initialise weights from torch's global generator.

        Raises:
            MetarobotError: A setting out of bounds, or ``context`` less than ``least``.
        """
        check_bounds(config)
        if config.context < config.least:
            raise MetarobotError(
                f"context must be at least {config.least}, the least of a task, "
                f"not {config.context}"
            )
        self.config = config
        self.dims = dims
        self.agent = PEARLAgent(dims, config)
        self.critics = TwinCritics(dims.obs + dims.act + config.latent, config.width)
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)
        self.return_norm = RunningNorm(1)
        self.temperature = nn.ParameterDict({"log": torch.tensor(math.log(config.alpha))})

        networks = [*self.agent.parameters(), *self.critics.parameters()]
        temperature = [*self.temperature.parameters()]
        self._parameters = [*networks, *temperature]
        self.optimiser = torch.optim.Adam(
            [{"params": networks}, {"params": temperature}], lr=config.lr, fused=True
        )
        self._replay: TrialReplay | None = None

    def reserve_memory(self) -> None:
        """Allocate the replay, unless it is.

        Raises:
            MetarobotError: It needs more memory than is free, or is too small for an iteration.
        """
        if self._replay is None:
            self._replay = TrialReplay(self.dims, self.config.replay, self.config.worlds)

    @property
    def replay(self) -> TrialReplay:
        """The replay, allocated at first use."""
        self.reserve_memory()
        assert self._replay is not None
        return self._replay

    def update(self, trials: Trials, progress: float, seed: int) -> dict[str, float]:
        """Store trials in the replay, and take gradient steps on it."""
        c = self.config
        self._store(trials)
        networks, temperature = self.optimiser.param_groups
        networks["lr"] = decayed(c.lr, c.lr_end, progress)
        temperature["lr"] = decayed(c.alpha_lr * c.lr, c.lr_end, progress)

        generator = torch.Generator().manual_seed(seed)
        sums = torch.zeros(len(STATISTICS), device=trials.task.device)
        for _ in range(c.gradient_steps):
            sums += self._gradient_step(generator)

        metrics = {
            f"train/{name}": float(total) / c.gradient_steps
            for name, total in zip(STATISTICS, sums, strict=True)
        }
        metrics["train/alpha"] = float(self.temperature["log"].detach().exp())
        metrics["train/replay"] = float(self.replay.transition_count)
        metrics["train/posterior_std"] = self._checked_posterior_std(trials)
        metrics["train/learning_rate"] = float(networks["lr"])
        return metrics

    def _store(self, trials: Trials) -> None:
        """Update normalisers and replay with trials.

        Raises:
            PosteriorError: There is nothing to infer a task from.
        """
        c = self.config
        self._check_context(trials)

        for module in (self.critics, self.targets, self.temperature, self.return_norm):
            module.to(trials.task.device)
        # R_t = γ R_{t−1} + r_t, whose standard deviation scales the critics' rewards
        seq = join_episodes(trials.episodes)
        past_return = discounted(seq.reward, c.gamma)
        self.agent.norm.update(seq.percept.obs[seq.valid])
        self.agent.reward_norm.update(seq.reward[seq.valid][:, None])
        self.return_norm.update(past_return[seq.valid][:, None])
        self.replay.add(trials)

    def _check_context(self, trials: Trials) -> None:
        """Check that a task can be inferred from all episodes but the last of each trial."""
        exploration = join_episodes(trials.episodes[:-1])
        worlds = len(trials.task)

        fewest, world = exploration.valid.sum(0).min(0)
        if fewest < self.config.least:
            raise PosteriorError(
                f"pearl: task {int(world)} of {worlds} has {int(fewest)} transitions to infer it "
                f"from, fewer than least = {self.config.least}"
            )

        context = torch.cat(
            [exploration.percept.obs, exploration.action, exploration.reward[..., None]], -1
        )
        if worlds > 1 and torch.equal(context, context[:, :1].expand_as(context)):
            raise PosteriorError(
                f"pearl: the contexts of all {worlds} tasks are identical; "
                f"nothing tells tasks apart"
            )

    @torch.no_grad()
    def _checked_posterior_std(self, trials: Trials) -> float:
        """Return the posterior's mean standard deviation after trials.

        Raises:
            PosteriorError: Weights or posteriors are not finite, or all posteriors are the same.
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

    def _gradient_step(self, generator: torch.Generator) -> Tensor:
        """Take one gradient step on all weights and update the target critics.

        Returns:
            ``STATISTICS``, ``(statistic,)``.
        """
        loss, statistics = self._loss(self._sample_batch(generator))
        statistics = set_gradients(loss, statistics, self._parameters)
        self.optimiser.step()
        with torch.no_grad():
            # Q' += τ (Q − Q')
            torch._foreach_lerp_(
                list(self.targets.parameters()), list(self.critics.parameters()), self.config.tau
            )
        return statistics

    def _sample_batch(self, generator: torch.Generator) -> PEARLBatch:
        """Sample tasks, their transitions and noise."""
        c = self.config
        replay = self.replay
        device = self.agent.low.device
        rows = replay.sample_trials(c.tasks, c.recent, generator)

        # size of the context, log-uniform between least and context, so that posteriors of few
        # transitions are trained as well
        size_ratio = (c.context / c.least) ** float(torch.rand((), generator=generator))
        context_size = round(c.least * size_ratio)
        context_indices = replay.sample_transitions(rows, context_size, c.episodes - 1, generator)
        step_indices = replay.sample_transitions(rows, c.batch, c.episodes, generator)

        latent_noise = torch.randn(c.tasks, c.latent, generator=generator)
        action_noise = torch.randn(c.tasks, c.batch, 2 * self.dims.act, generator=generator)
        context = replay.transitions_at(context_indices)
        steps = replay.transitions_at(step_indices)
        return PEARLBatch(
            context=Transitions(*(values.to(device) for values in context)),
            steps=Transitions(*(values.to(device) for values in steps)),
            task=replay.task(rows).to(device),
            latent_noise=latent_noise.to(device),
            action_noise=action_noise.to(device),
        )

    def _loss(self, batch: PEARLBatch) -> tuple[Tensor, Tensor]:
        """Return the sum of all losses, and ``STATISTICS``.

        There is one loss for all weights, so whatever a term uses but must not train is detached:
        the encoder learns from the critics' loss and from the divergence only.
        """
        c = self.config
        agent = self.agent
        posterior = agent.infer(batch.context)
        z = sample(posterior, batch.latent_noise)[:, None].expand(-1, c.batch, -1).flatten(0, 1)
        noise, next_noise = batch.action_noise.flatten(0, 1).chunk(2, -1)

        steps = Transitions(*(values.flatten(0, 1) for values in batch.steps))
        steps = steps._replace(obs=agent.norm(steps.obs), next_obs=agent.norm(steps.next_obs))
        mean_over_steps = 1.0 / (c.tasks * c.batch)

        # critics: (Q(s, a, z) − y)², both critics summed
        target = self._td_target(steps, z.detach(), next_noise)
        critic_input = torch.cat([steps.obs, agent.normalised_action(steps.action), z], -1)
        td_error = self.critics(critic_input) - target
        critic_loss = mean_over_steps * td_error.square().sum()

        # actor: α ln π(a | s, z) − min Q(s, a, z)
        value, log_prob = self._policy_value(steps.obs, z.detach(), noise)
        log_alpha = self.temperature["log"]
        actor_loss = mean_over_steps * (log_alpha.exp().detach() * log_prob - value).sum()

        # temperature: −ln α (ln π(a | s, z) + H), which raises α where the entropy −ln π is below
        # the target H = −entropy nats a dimension
        entropy_gap = log_prob.detach() - c.entropy * self.dims.act
        temperature_loss = -log_alpha * mean_over_steps * entropy_gap.sum()

        # encoder: β KL(q(z | c) ‖ N(0, 1)), and what it gets from the critics
        divergence = kl_divergence(posterior, standard_normal(posterior.mean)).sum() / c.tasks

        # head: −ln p(task | q), which does not train the encoder
        belief = agent.decode_task(Gaussian(posterior.mean.detach(), posterior.var.detach()))
        belief_nll = -log_density(belief, batch.task).sum() / c.tasks

        statistics = torch.stack(
            (
                critic_loss,
                actor_loss,
                divergence,
                belief_nll,
                -mean_over_steps * log_prob.sum(),
                mean_over_steps * target.sum(),
            )
        )
        loss = critic_loss + c.kl * divergence + actor_loss + belief_nll + temperature_loss
        return loss, statistics

    @torch.no_grad()
    def _td_target(self, steps: Transitions, z: Tensor, noise: Tensor) -> Tensor:
        """Return the critics' targets, ``(step,)``: reward and discounted soft value."""
        # y = r + γ (1 − terminated) (min Q'(s', a', z) − α ln π(a' | s', z))
        next_action, log_prob = sample_squashed(
            *self.agent.action_distribution(steps.next_obs, z), noise
        )
        next_value = self.targets(torch.cat([steps.next_obs, next_action, z], -1)).amin(0)
        soft_value = next_value - self.temperature["log"].exp() * log_prob
        reward = steps.reward * self.return_norm.scale
        target: Tensor = reward + self.config.gamma * (1.0 - steps.terminated) * soft_value
        return target

    def _policy_value(self, x: Tensor, z: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lower critic's value of sampled actions, and their log-probabilities.

        Both are ``(step,)``, for normalised observations ``(step, obs)``.
        """
        action, log_prob = sample_squashed(*self.agent.action_distribution(x, z), noise)
        values = self.critics(torch.cat([x, action, z], -1), train_weights=False)
        return values.amin(0), log_prob

    def products(self) -> list[tuple[int, int, int]]:
        """List the matrix products of an average gradient step, as (rows, inner, columns).

        This is the least work that a gradient step can be, which the benchmark compares it with.
        """
        c = self.config
        step_rows = c.tasks * c.batch
        # mean of the log-uniform size of the context; all of one size if the bounds are equal
        log_ratio = max(math.log(c.context / c.least), 1e-9)
        context_rows = round(c.tasks * (c.context - c.least) / log_ratio) or c.tasks * c.least

        encoder = [(x.in_features, x.out_features) for x in linears(self.agent.encoder)]
        actor = [(x.in_features, x.out_features) for x in linears(self.agent.actor)]
        critics = [(w.shape[1], w.shape[2]) for w in self.critics.weights] * 2
        forward = [(context_rows, encoder), (step_rows, 2 * actor + 3 * critics)]
        # Backward by weights, and by inputs except those of the first layer; either takes as many
        # multiplications as the layer itself.
        backward = [
            (context_rows, encoder + encoder[1:]),
            (step_rows, actor + actor[1:] + 3 * critics),
        ]
        return [
            (rows, inner, columns)
            for rows, layers in (*forward, *backward)
            for inner, columns in layers
        ]

    def state(self) -> dict[str, Tensor]:
        """Return weights, normalisers, optimiser and replay."""
        state = flatten_state(self.optimiser, **self._modules())
        replay = {f"replay.{name}": tensor for name, tensor in self.replay.state().items()}
        return state | replay

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what ``state`` returned."""
        restore_state(state, self.optimiser, **self._modules())
        replay = {
            name.removeprefix("replay."): tensor
            for name, tensor in state.items()
            if name.startswith("replay.")
        }
        self.replay.load(replay)

    def _modules(self) -> dict[str, nn.Module]:
        """Name the modules as checkpoints do."""
        # "spread" is the return normaliser's name in checkpoints
        return {
            "agent": self.agent,
            "critics": self.critics,
            "targets": self.targets,
            "temperature": self.temperature,
            "spread": self.return_norm,
        }


pearl = AgentKind(
    name="pearl",
    doc="A posterior over tasks from single transitions; SAC acts on a draw of it.",
    config=PEARLConfig,
    build=PEARL,
)
