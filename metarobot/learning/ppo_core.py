"""PPO, written once: settings, clipped surrogate, schedules, epoch loop and learner.

Schulman et al. 2017. ``PPOLearner`` updates any Gaussian policy with a critic from collected
trials. ``TrialPPOLearner`` is the same for agents with a memory, over whole trials. An algorithm
adds its networks and, if it has one, an auxiliary loss on what it infers about the task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from metarobot.config_bounds import Bounds, Count, Fraction, LayerSize, NonNegative
from metarobot.errors import MetarobotError
from metarobot.learning.agent_interface import Context, Dimensions
from metarobot.learning.networks import RunningNorm, log_prob, normalise_leading
from metarobot.learning.optimiser_state import flatten_state, restore_state
from metarobot.learning.returns import discounted, explained_variance, gae
from metarobot.types import Percept, Rollout, Trials, TrialSequence, join_episodes

# ---------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PPOSettings:
    """Settings of PPO; the same defaults in all agents that share them, for a fair comparison."""

    worlds: Count = 64
    """Tasks an iteration, one per world."""
    episodes: Count = 2
    """Episodes per task."""
    width: LayerSize = 128
    """Width of the two hidden layers of actor and critic."""
    lr: NonNegative = 1e-3
    """Adam's learning rate at the start."""
    lr_end: NonNegative = 0.05
    """Fraction of the learning rate that is left at the end of training; linear between."""
    epochs: Count = 8
    """Passes over the steps of an iteration."""
    minibatches: Count = 16
    """Gradient steps per pass."""
    gamma: Fraction = 0.97
    """Discount per control step."""
    lam: Fraction = 0.95
    """Trace decay of generalised advantage estimation (GAE)."""
    clip: NonNegative = 0.2
    """PPO's bound on the probability ratio."""
    kl_stop: NonNegative = 0.045
    """Approximate KL divergence from the collecting policy at which an update stops early."""
    value: NonNegative = 0.5
    """Weight of the critic's squared error."""
    grad_norm: NonNegative = 1.0
    """Bound on the norm of the gradient."""
    std: Annotated[float, Bounds(1e-3, 10.0)] = 0.6
    """Standard deviation of the untrained policy's actions."""


@dataclass(frozen=True, kw_only=True)
class DistilledPPOSettings(PPOSettings):
    """Settings of PPO that can also learn from a teacher's actions."""

    teach: NonNegative = 0.0
    """Initial weight of the squared error to the teacher's action (the family's advice, or else its
    scripted expert); falls to zero by the end of training (kickstarting, Schmitt et al. 2018)."""


@dataclass(frozen=True, kw_only=True)
class TrialPPOSettings(DistilledPPOSettings):
    """Settings of PPO over whole trials, for agents with a memory."""

    worlds: Count = 64
    """Trials an iteration, one per world."""
    episodes: Count = 2
    """Episodes per trial."""
    memory: str = "linear"
    """Kind of memory: linear (trains in parallel over time), gru or lstm."""
    width: LayerSize = 128
    """Width of the memory, and of the two hidden layers of actor and critic."""
    lr: NonNegative = 2e-3
    """Adam's learning rate at the start."""
    epochs: Count = 5
    """Passes over the trials of an iteration."""
    minibatches: Count = 8
    """Gradient steps per pass, each on whole trials."""


# ---------------------------------------------------------------------------------------------
# The pieces that other PPO-like learners use too
# ---------------------------------------------------------------------------------------------

GradientStep = Callable[[], Tensor]
"""Takes a gradient step and returns its statistics ``(statistic,)``."""


def clipped_surrogate(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """Return PPO's clipped objective of each step, to be maximised (Schulman et al. 2017, eq. 7).

    ``ratio`` is π(a|s) / π_old(a|s); all tensors have the same shape.
    """
    # L = min(r A, clip(r, 1 − ε, 1 + ε) A)
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def distillation_loss(mean: Tensor, teacher_action: Tensor) -> Tensor:
    """Return the squared error of the mean action to the teacher's, averaged over actuators.

    Args:
        mean: Mean action of the policy, ``(..., act)``.
        teacher_action: The teacher's action, ``(..., act)``; NaN where the teacher has no opinion,
            which counts as no error.

    Returns:
        One loss per step, ``(...,)``.
    """
    error = torch.where(teacher_action.isnan(), 0.0, mean - teacher_action.nan_to_num())
    return error.square().mean(-1)


def decayed(start: float, end_fraction: float, progress: float) -> float:
    """Return a value that falls linearly from ``start`` to ``end_fraction`` of it over training."""
    return start * (1.0 - progress * (1.0 - end_fraction))


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Give all parameter groups of an optimiser one learning rate."""
    for group in optimiser.param_groups:
        group["lr"] = rate


def set_gradients(loss: Tensor, statistics: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """Set each parameter's gradient of ``loss`` and return the statistics, detached."""
    targets = list(parameters)
    gradients = torch.autograd.grad(loss, targets)
    for parameter, gradient in zip(targets, gradients, strict=True):
        parameter.grad = gradient
    return statistics.detach()


def run_epochs(
    passes: Iterable[Iterable[GradientStep]], watched: int, limit: float
) -> tuple[Tensor, int]:
    """Run the PPO epochs until the statistic number ``watched`` exceeds ``limit``.

    On the CPU the statistic is compared after every gradient step. On an accelerator reading it
    waits for all queued work, so it is read once per pass (the largest of that pass), and learning
    stops at the end of the pass.

    Returns:
        The sum of the statistics over all gradient steps ``(statistic,)``, and the number of steps.
    """
    sums = torch.zeros(())
    steps_taken = 0
    for steps in passes:
        watched_values = []
        for step in steps:
            statistics = step()
            sums = statistics if steps_taken == 0 else sums + statistics
            steps_taken += 1
            watched_values.append(statistics[watched])
            if statistics.device.type == "cpu" and float(statistics[watched]) > limit:
                return sums, steps_taken
        if float(torch.stack(watched_values).amax()) > limit:
            break
    return sums, steps_taken


# ---------------------------------------------------------------------------------------------
# Agents
# ---------------------------------------------------------------------------------------------


class ActorCritic(nn.Module):
    """A Gaussian policy with a critic: what ``PPOLearner`` trains.

    A subclass sets ``norm`` and ``log_std``, and acts by ``begin`` and ``act``.
    """

    privileged: bool = False
    explores: bool = False
    norm: RunningNorm
    """Normaliser of the observation, or of observation and reward."""
    log_std: nn.Parameter
    """Logarithm of the standard deviation of each action, ``(act,)``."""

    def forward(self, x: Tensor, task: Tensor, critic_obs: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Evaluate actor and critic at every step of the sequences ``x``.

        Args:
            x: Inputs of the actor, ``(time, sequence, input)``.
            task: Encoded task of each sequence, ``(sequence, parameter)``, for the critic alone.
            critic_obs: What only the critic observes, ``(time, sequence, critic)``.

        Returns:
            Mean action ``(time, sequence, act)``, value ``(time, sequence)``, and what the agent
            infers about the task, for an auxiliary loss; None if it infers nothing.
        """
        raise NotImplementedError

    def with_noise(self, mean: Tensor, noise: Tensor | None) -> Tensor:
        """Return the mean action, plus standard normal ``noise`` times the policy's deviation."""
        return mean if noise is None else torch.addcmul(mean, noise, self.log_std.exp())

    def adapt(self, context: Context, episode: Rollout) -> Context:
        """Return the context unchanged: whatever adapts, adapts while acting."""
        return context


class RecurrentActorCritic(ActorCritic):
    """An ``ActorCritic`` over the whole percept, with observation and reward normalised."""

    def features(self, percept: Percept, task: Tensor | None = None) -> Tensor:
        """Return the network's input ``(..., input)``: the encoded percept, then the task if given.

        ``task`` ``(world, parameter)`` is for privileged agents alone.
        """
        x = normalise_leading(self.norm, percept.flat())
        if task is None:
            return x
        return torch.cat([x, task.expand(*x.shape[:-1], -1)], -1)


# ---------------------------------------------------------------------------------------------
# Learners
# ---------------------------------------------------------------------------------------------


class PolicyEvaluation(NamedTuple):
    """The collecting policy, evaluated at each step of the trials: ``(time, world, ...)``."""

    x: Tensor
    """Inputs of the actor."""
    critic_obs: Tensor
    """What only the critic observes, normalised."""
    mean: Tensor
    """Mean action."""
    value: Tensor
    next_value: Tensor
    """Value of the observation that the step led to."""
    trace_end: Tensor
    """True where the advantage's trace ends although the episode did not terminate."""


class PPOBatch(NamedTuple):
    """The data of one update, ``(time, sequence, ...)``; minibatches are drawn among the sequences.

    A sequence is a whole trial for agents with a memory, and a single step for those without.
    """

    x: Tensor
    critic_obs: Tensor
    value: Tensor
    target: Tensor
    """What the critic is to predict."""
    advantage: Tensor
    log_prob: Tensor
    """Log-probability of the action under the policy that collected it."""
    action: Tensor
    teacher_action: Tensor
    valid: Tensor
    """1.0 for a collected step, 0.0 for padding."""
    task: Tensor
    """Encoded task of each sequence, ``(sequence, parameter)``."""

    def select(self, rows: Tensor) -> PPOBatch:
        """Return the minibatch of some sequences."""
        *in_time, task = self
        return PPOBatch._make([*(tensor[:, rows] for tensor in in_time), task[rows]])


class PPOLearner:
    """Train an ``ActorCritic`` by PPO on collected trials.

    A subclass evaluates the collecting policy in ``_evaluate``, and may add an auxiliary loss.
    """

    STATISTICS: ClassVar = ("policy_gradient_loss", "value_loss", "approx_kl", "clip_fraction")
    """Names of the statistics of every gradient step."""
    AUXILIARY_STATISTICS: ClassVar[tuple[str, ...]] = ()
    """Names of those of the auxiliary loss, which follow."""

    def __init__(
        self,
        config: DistilledPPOSettings,
        agent: ActorCritic,
        shapes: Dimensions,
        **others: nn.Module,
    ) -> None:
        """Set up normalisers and optimiser; ``others`` are modules trained beside the agent."""
        self.config = config
        self.agent = agent
        self.return_norm = RunningNorm(1)
        self.critic_norm = RunningNorm(shapes.critic)
        # the keys are prefixes of tensor names in checkpoints
        self.modules: dict[str, nn.Module] = {
            "agent": agent,
            "spread": self.return_norm,
            "critic_norm": self.critic_norm,
            **others,
        }
        # each group of parameters has its gradient's norm bounded separately
        self.groups = [list(module.parameters()) for module in (agent, *others.values())]
        self.optimiser = torch.optim.Adam(chain(*self.groups), lr=config.lr, eps=1e-5, fused=True)

    def update(self, trials: Trials, progress: float, seed: int) -> dict[str, float]:
        """Update the agent from one iteration's trials; see ``Learner.update``."""
        config = self.config
        seq = join_episodes(trials.episodes)
        self._update_normalisers(seq)
        batch = self._make_batch(seq, trials.task)

        set_learning_rate(self.optimiser, decayed(config.lr, config.lr_end, progress))
        teach = decayed(config.teach, 0.0, progress)
        generator = torch.Generator().manual_seed(seed)

        def passes() -> Iterator[list[GradientStep]]:
            sequences = batch.x.shape[1]
            for _ in range(config.epochs):
                draws = self._draw(seq, generator)
                order = torch.randperm(sequences, generator=generator).to(batch.x.device)
                yield [
                    partial(self._step, batch, draws, rows, teach)
                    for rows in order.chunk(config.minibatches)
                ]

        names = (*self.STATISTICS, *self.AUXILIARY_STATISTICS)
        sums, steps = run_epochs(passes(), names.index("approx_kl"), config.kl_stop)

        metrics = {name: float(total) / steps for name, total in zip(names, sums, strict=True)}
        valid = batch.valid.bool()
        explained = explained_variance(batch.value[valid], batch.target[valid])
        metrics["std"] = float(self.agent.log_std.detach().exp().mean())
        metrics["explained_variance"] = float(explained)
        metrics["gradient_steps"] = float(steps)
        metrics["learning_rate"] = float(self.optimiser.param_groups[0]["lr"])
        return {f"train/{name}": value for name, value in metrics.items()}

    def _update_normalisers(self, seq: TrialSequence) -> None:
        """Update the normalisers of observations and returns with the collected steps."""
        valid = seq.valid
        returns = discounted(seq.reward, self.config.gamma)
        self.agent.norm.update(self._normalised(seq.percept)[valid])
        self.critic_norm.to(valid.device).update(seq.critic_obs[valid])
        self.return_norm.to(valid.device).update(returns[valid][:, None])

    def _normalised(self, percept: Percept) -> Tensor:
        """Return the features that the agent normalises, ``(time, world, feature)``."""
        return percept.obs

    def _make_batch(self, seq: TrialSequence, task: Tensor) -> PPOBatch:
        """Make the data of one update from the collected trials; here one sequence per trial."""
        return self._targets(seq, task)

    @torch.no_grad()
    def _targets(self, seq: TrialSequence, task: Tensor) -> PPOBatch:
        """Compute advantages and value targets of all steps, ``(time, world, ...)``."""
        policy = self._evaluate(seq, task)

        # dividing rewards by the deviation of the discounted return keeps values near 1
        reward = seq.reward * self.return_norm.scale
        advantage = gae(
            reward,
            policy.value,
            policy.next_value,
            seq.terminated,
            policy.trace_end,
            self.config.gamma,
            self.config.lam,
        )
        target = advantage + policy.value

        # Â = (A − mean A) / std A, over the collected steps
        collected = advantage[seq.valid]
        advantage = (advantage - collected.mean()) / (collected.std() + 1e-8)

        return PPOBatch(
            x=policy.x,
            critic_obs=policy.critic_obs,
            value=policy.value,
            target=target,
            advantage=advantage,
            log_prob=log_prob(policy.mean, self.agent.log_std, seq.action),
            action=seq.action,
            teacher_action=seq.teacher_action,
            valid=seq.valid.to(reward.dtype),
            task=task,
        )

    def _evaluate(self, seq: TrialSequence, task: Tensor) -> PolicyEvaluation:
        """Evaluate actor and critic at every collected step."""
        raise NotImplementedError

    def _draw(self, seq: TrialSequence, generator: torch.Generator) -> Any:
        """Draw what the auxiliary loss needs anew in every pass; here nothing."""
        return None

    def _step(self, batch: PPOBatch, draws: Any, rows: Tensor, teach: float) -> Tensor:
        """Take one gradient step on the sequences ``rows``; return the statistics."""
        loss, statistics = self._loss(batch.select(rows), draws, rows, teach)
        statistics = set_gradients(loss, statistics, chain(*self.groups))
        for group in self.groups:
            nn.utils.clip_grad_norm_(group, self.config.grad_norm)
        self.optimiser.step()
        return statistics

    def _loss(
        self, minibatch: PPOBatch, draws: Any, rows: Tensor, teach: float
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of a minibatch, and the statistics ``(statistic,)``."""
        config = self.config
        weight = minibatch.valid / minibatch.valid.sum()
        mean, value, inferred = self.agent(minibatch.x, minibatch.task, minibatch.critic_obs)

        # r = π(a|s) / π_old(a|s)
        log_ratio = log_prob(mean, self.agent.log_std, minibatch.action) - minibatch.log_prob
        ratio = log_ratio.exp()

        # L_policy = −E[min(r A, clip(r, 1 − ε, 1 + ε) A)]
        surrogate = clipped_surrogate(ratio, minibatch.advantage, config.clip)
        policy_loss = -(weight * surrogate).sum()
        if teach > 0:
            distillation = distillation_loss(mean, minibatch.teacher_action)
            policy_loss = policy_loss + teach * (weight * distillation).sum()

        # L_value = E[(V(s) − V_target)²]
        value_loss = (weight * (value - minibatch.target).square()).sum()

        auxiliary_loss, auxiliary = self._auxiliary_loss(
            inferred, minibatch.task, weight, draws, rows
        )
        with torch.no_grad():
            # KL(π_old ‖ π) ≈ E[r − 1 − ln r], never negative (Schulman 2020, "k3")
            kl = (weight * (ratio - 1 - log_ratio)).sum()
            clipped = (weight * ((ratio - 1).abs() > config.clip)).sum()

        loss = policy_loss + config.value * value_loss + auxiliary_loss
        common = torch.stack([policy_loss, value_loss, kl, clipped])
        return loss, torch.cat([common, auxiliary])

    def _auxiliary_loss(
        self, inferred: Any, task: Tensor, weight: Tensor, draws: Any, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of what the agent infers about the task, and its statistics; here zero.

        Args:
            inferred: The third output of the agent's ``forward``.
            task: Encoded tasks, ``(sequence, parameter)``.
            weight: Share of each step in the mean over the minibatch, ``(time, sequence)``.
            draws: What ``_draw`` returned for this pass, for all sequences.
            rows: The sequences of the minibatch among all, ``(sequence,)``.
        """
        return weight.new_zeros(()), weight.new_zeros(0)

    def state(self) -> dict[str, Tensor]:
        """Return weights, normalisers and optimiser state."""
        return flatten_state(self.optimiser, **self.modules)

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what ``state`` returned."""
        restore_state(state, self.optimiser, **self.modules)


class TrialPPOLearner(PPOLearner):
    """Train a ``RecurrentActorCritic`` by PPO on whole trials, one sequence per trial."""

    agent: RecurrentActorCritic

    def __init__(
        self,
        config: TrialPPOSettings,
        agent: RecurrentActorCritic,
        shapes: Dimensions,
        **others: nn.Module,
    ) -> None:
        """Set up as ``PPOLearner`` does.

        Raises:
            MetarobotError: ``worlds`` is not a multiple of ``minibatches``.
        """
        if config.worlds % config.minibatches:
            raise MetarobotError(
                f"worlds = {config.worlds} is not a multiple of minibatches = {config.minibatches}"
            )
        super().__init__(config, agent, shapes, **others)

    def _normalised(self, percept: Percept) -> Tensor:
        """Return observation and reward, the leading features of the encoded percept."""
        return percept.flat()[..., : len(self.agent.norm.mean)]

    def _evaluate(self, seq: TrialSequence, task: Tensor) -> PolicyEvaluation:
        """Run the memory over whole trials, and over the percept after each trial's last step.

        A termination ends the trace. A time limit inside the trial does not: it leads on into the
        next episode, through which the memory goes on too. The end of the trial bootstraps from the
        value of the final observation.
        """
        percept = _append_final_percept(seq)
        x = self.agent.features(percept, task if self.agent.privileged else None)
        critic_obs = self.critic_norm(_append_final(seq, seq.critic_obs, seq.next_critic_obs))
        mean, value, _ = self.agent(x, task, critic_obs)

        trace_end = torch.zeros_like(seq.valid)
        worlds = torch.arange(trace_end.shape[1], device=trace_end.device)
        trace_end[last_step(seq), worlds] = True

        return PolicyEvaluation(
            x=x[:-1],
            critic_obs=critic_obs[:-1],
            mean=mean[:-1],
            value=value[:-1],
            next_value=value[1:],
            trace_end=trace_end,
        )


def last_step(seq: TrialSequence) -> Tensor:
    """Return the index of each trial's last step, ``(world,)``."""
    return seq.valid.sum(0) - 1


def _append_final_percept(seq: TrialSequence) -> Percept:
    """Append to each trial the percept its last step led to, as if the episode went on."""
    percept = seq.percept
    return Percept(
        obs=_append_final(seq, percept.obs, seq.next_obs),
        action=_append_final(seq, percept.action, seq.action),
        reward=_append_final(seq, percept.reward, seq.reward),
        done=_append_final(seq, percept.done, torch.zeros_like(percept.done)),
        first=_append_final(seq, percept.first, torch.zeros_like(percept.first)),
    )


def _append_final(seq: TrialSequence, x: Tensor, following: Tensor) -> Tensor:
    """Append to each trial of ``x`` ``(time, world, ...)`` the last valid row of ``following``.

    Returns:
        ``(time + 1, world, ...)``; the appended row stands right after the trial's last step, so
        trials with padding keep their padding after it.
    """
    ends = last_step(seq)
    worlds = torch.arange(len(ends), device=ends.device)
    longer = torch.cat([x, torch.zeros_like(x[:1])])
    longer[ends + 1, worlds] = following[ends, worlds]
    return longer
