"""Prototypes: an agent that recognises tasks in a learned embedding (Snell et al. 2017).

An encoder maps a set of transitions to a point. Sets from one task are pulled together, those from
different tasks are pushed apart, and distances are made to follow those between the tasks'
parameters, which the simulator knows. The policy acts on the embedding of all transitions so far,
so it adapts from step to step.

Embeddings of training tasks are kept as prototypes: a new task is recognised by the nearest ones,
or as unlike all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional

from metarobot.agents.ppo import PPO, PPOAgent, PPOConfig
from metarobot.config_bounds import Bounds, Count, LayerSize, NonNegative
from metarobot.errors import MetarobotError
from metarobot.learning.agent_interface import AgentKind, Context, Dimensions, FeedforwardPolicy
from metarobot.learning.metric_losses import (
    LOSSES,
    distance_loss,
    nearest_prototype,
    novelty_threshold,
)
from metarobot.learning.networks import RunningNorm, mlp
from metarobot.learning.optimiser_state import flatten_state, restore_state, with_prefix
from metarobot.learning.ppo_core import DistilledPPOSettings, decayed, set_learning_rate
from metarobot.types import Percept, Rollout, Trials, join_episodes, next_values

COLLAPSED = 1e-5
"""Spread of the prototypes, relative to their size, below which all of them are one point."""
REMEDY = "lower --encoder-lr, or resume from the last checkpoint, which is whole"
"""What to do about embeddings that broke down, for error messages."""


@dataclass(frozen=True, kw_only=True)
class PrototypeConfig(DistilledPPOSettings):
    """Settings of the prototype agent, and PPO's for the policy on its embedding."""

    loss: str = "prototypical"
    """Metric loss of the embedding: prototypical, contrastive or siamese."""
    distance: NonNegative = 5.0
    """Weight of the squared error of distances between embeddings to those between tasks."""
    embedding: LayerSize = 8
    """Dimensions of the embedding."""
    summary: LayerSize = 64
    """Features of a transition, whose weighted mean is embedded."""
    window: Count = 50
    """Transitions in a window."""
    windows: Annotated[int, Bounds(2, reason="a support and a query")] = 4
    """Windows that are kept of each task, half of them support, half query; the last is how its
    trial began."""
    bank: Count = 256
    """Training tasks whose windows and prototypes are kept, the latest."""
    lessons: Count = 32
    """Gradient steps of the encoder an iteration."""
    lesson_tasks: Count = 24
    """Tasks of the bank in each of these gradient steps."""
    encoder_lr: NonNegative = 1e-3
    """Adam's learning rate for the encoder at the start; it falls as the policy's does."""


class CollapseError(MetarobotError):
    """Embeddings that do not tell tasks apart, or are not finite."""


def encode_transitions(obs: Tensor, action: Tensor, reward: Tensor, next_obs: Tensor) -> Tensor:
    """Join observation, action, reward and change of observation, ``(..., transition)``."""
    return torch.cat([obs, action, reward[..., None], next_obs - obs], -1)


class TransitionEncoder(nn.Module):
    """Embeds a set of transitions of any number and order.

    A network maps each transition to features and a weight. The weighted mean over the set is
    mapped to the embedding. One learned summary, of weight 1, stands for no transitions and is
    always part of the mean.

    *Evidence* is what is summed over transitions: weighted features and, last, the weight itself,
    ``(..., summary + 1)``.
    """

    def __init__(self, shapes: Dimensions, config: PrototypeConfig) -> None:
        super().__init__()
        transition = 2 * shapes.obs + shapes.act + 1
        self.norm = RunningNorm(transition)
        self.read = mlp(transition, (config.width, config.width), config.summary + 1)
        self.nothing = nn.Parameter(torch.zeros(config.summary))
        self.place = mlp(config.summary, (config.width,), config.embedding)
        self.log_sharpness = nn.Parameter(torch.tensor(math.log(50.0)))

    def evidence(self, x: Tensor) -> Tensor:
        """Return the evidence of each transition ``(..., transition)``: ``(..., summary + 1)``."""
        output = self.read(self.norm(x))
        features = output[..., :-1]
        weight = functional.softplus(output[..., -1:])
        return torch.cat([weight * features, weight], -1)

    def begin(self, tasks: int) -> Tensor:
        """Return the evidence of no transitions, ``(task, summary + 1)``."""
        return self.nothing.new_zeros(tasks, len(self.nothing) + 1)

    def forward(self, evidence: Tensor) -> Tensor:
        """Embed summed evidence ``(..., summary + 1)``: ``(..., embedding)``."""
        # summary = (s_0 + Σ w_i s_i) / (1 + Σ w_i), s_0 the learned summary of no transitions
        weighted_features = evidence[..., :-1]
        total_weight = evidence[..., -1:]
        z: Tensor = self.place((self.nothing + weighted_features) / (1.0 + total_weight))
        return z


class PrototypeBank(nn.Module):
    """Windows of transitions of the latest training tasks, and their prototypes; all buffers."""

    windows: Tensor
    """Encoded transitions, ``(bank, window, step, transition)``."""
    lived: Tensor
    """1.0 for a transition, 0.0 for padding, ``(bank, window, step)``."""
    task: Tensor
    """Encoded tasks, ``(bank, parameter)``."""
    prototype: Tensor
    """Mean embedding of each task's windows, ``(bank, embedding)``."""
    threshold: Tensor
    """Distance to the nearest prototype beyond which a task is unlike all training tasks."""
    count: Tensor
    """Number of tasks that were ever added."""

    def __init__(self, shapes: Dimensions, config: PrototypeConfig) -> None:
        super().__init__()
        size = (config.bank, config.windows, config.window)
        transition = 2 * shapes.obs + shapes.act + 1
        self.register_buffer("windows", torch.zeros(*size, transition))
        self.register_buffer("lived", torch.zeros(*size))
        self.register_buffer("task", torch.zeros(config.bank, shapes.task))
        self.register_buffer("prototype", torch.zeros(config.bank, config.embedding))
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def __len__(self) -> int:
        """Return the number of tasks in the bank."""
        return min(int(self.count), len(self.task))

    def add(self, windows: Tensor, valid: Tensor, task: Tensor) -> None:
        """Add new tasks in the place of the oldest."""
        new = torch.arange(len(task), device=task.device)
        rows = (self.count + new) % len(self.task)
        self.windows[rows] = windows
        self.lived[rows] = valid
        self.task[rows] = task
        self.count += len(task)


class PrototypeAgent(nn.Module):
    """An encoder, a bank of prototypes, and a policy on observation and embedding of the task.

    The context is the last observation, the evidence so far, and its embedding.
    """

    privileged = False
    explores = False

    def __init__(self, shapes: Dimensions, config: PrototypeConfig, policy: PPOAgent) -> None:
        super().__init__()
        self.policy = policy
        self.encoder = TransitionEncoder(shapes, config)
        self.bank = PrototypeBank(shapes, config)
        self.obs = shapes.obs

    @property
    def norm(self) -> RunningNorm:
        """The normaliser of what the policy observes."""
        return self.policy.norm

    def task_bank(self) -> PrototypeBank:
        """Return the bank of prototypes; see ``EmbedsTasks``."""
        return self.bank

    def begin(self, worlds: int, task: Tensor | None = None) -> Context:
        """Return a zero observation, no evidence, and its embedding."""
        evidence = self.encoder.begin(worlds)
        no_obs = evidence.new_zeros(worlds, self.obs)
        return no_obs, evidence, self.encoder(evidence)

    def act(
        self, percept: Percept, context: Context, noise: Tensor | None = None
    ) -> tuple[Tensor, Context]:
        """Add the last transition to the evidence, and act on the embedding.

        An episode's last transition is left to ``adapt``, because the observation it led to was
        reset before the agent could observe it.
        """
        last_obs, evidence, _ = context
        inside_episode = (1.0 - percept.done - percept.first)[:, None]
        transition = encode_transitions(last_obs, percept.action, percept.reward, percept.obs)
        evidence = evidence + inside_episode * self.encoder.evidence(transition)
        z = self.encoder(evidence)

        policy_percept = percept._replace(obs=self.policy_obs(percept.obs, evidence, z))
        action, _ = self.policy.act(policy_percept, (), noise)
        return action, (percept.obs, evidence, z)

    def adapt(self, context: Context, episode: Rollout) -> Context:
        """Add the episode's last transition to the evidence."""
        last_obs, evidence, _ = context
        worlds = torch.arange(len(last_obs), device=last_obs.device)
        last = episode.valid.sum(0) - 1
        transition = encode_transitions(
            episode.obs[last, worlds],
            episode.action[last, worlds],
            episode.reward[last, worlds],
            episode.final_obs,
        )
        evidence = evidence + self.encoder.evidence(transition)
        return last_obs, evidence, self.encoder(evidence)

    def policy_obs(self, obs: Tensor, evidence: Tensor, z: Tensor) -> Tensor:
        """Join what the policy observes: observation, embedding, and the evidence's share in it."""
        weight = evidence[..., -1:]
        return torch.cat([obs, z, weight / (1.0 + weight)], -1)

    def cumulative_evidence(self, evidence: Tensor, episode: Rollout) -> Tensor:
        """Sum evidence over an episode, starting from ``evidence`` ``(task, summary + 1)``.

        Returns:
            The sums before each step and after the last, ``(time + 1, task, summary + 1)``.
        """
        next_obs = next_values(episode, episode.obs, episode.final_obs)
        transitions = encode_transitions(episode.obs, episode.action, episode.reward, next_obs)
        new = self.encoder.evidence(transitions)
        new = torch.where(episode.valid[..., None], new, 0.0)
        return torch.cat([evidence[None], new]).cumsum(0)

    @torch.no_grad()
    def embed(self, episode: Rollout, steps: int = -1) -> Tensor:
        """Embed the first ``steps`` transitions of an episode, or all, ``(task, embedding)``."""
        nothing = self.encoder.begin(episode.valid.shape[1])
        z: Tensor = self.encoder(self.cumulative_evidence(nothing, episode)[steps])
        return z

    @torch.no_grad()
    def embedded(self, steps: int | None = None) -> Tensor:
        """Embed the bank's windows, cut to ``steps``, with the current encoder.

        Returns:
            ``(task, window, embedding)``.
        """
        tasks = len(self.bank)
        windows = self.bank.windows[:tasks, :, :steps]
        valid = self.bank.lived[:tasks, :, :steps, None]
        evidence = self.encoder.evidence(windows) * valid
        z: Tensor = self.encoder(evidence.sum(2))
        return z

    def refresh(self) -> dict[str, float]:
        """Recompute prototypes and threshold with the current encoder; return metrics of them.

        Raises:
            CollapseError: The embeddings are not finite, or the same for all tasks.
        """
        z = self.embedded()
        bank = self.bank
        prototype = z.mean(1)
        task = bank.task[: len(z)]
        if not bool(z.isfinite().all()):
            raise CollapseError(f"the embeddings are not finite; {REMEDY}")

        offsets = prototype - prototype.mean(0)
        spread = float(offsets.square().sum(1).mean().sqrt())
        size = 1.0 + float(prototype.norm(dim=1).mean())
        tasks_differ = bool((task != task[0]).any())
        if spread < COLLAPSED * size and tasks_differ:
            raise CollapseError(
                f"the embeddings collapsed: {len(z)} tasks lie within {spread:.1g} of one point; "
                f"{REMEDY}"
            )

        bank.prototype[: len(z)] = prototype
        bank.threshold.fill_(novelty_threshold(z, prototype))

        # accuracy: query windows classified by the prototypes of the support windows alone
        support, query = z.chunk(2, 1)
        found = task[nearest_prototype(query, support.mean(1))]
        correct = (found == task[:, None]).all(-1)
        return {
            "accuracy": float(correct.float().mean()),
            "spread": spread,
            "threshold": float(bank.threshold),
        }


class Prototype:
    """Train a ``PrototypeAgent``: PPO for the policy, then a metric loss for the encoder.

    No gradient of the policy reaches the encoder: an embedding says which task it is and nothing
    else.
    """

    def __init__(self, config: PrototypeConfig, shapes: Dimensions) -> None:
        _check_settings(config)
        self.config = config

        # the policy is PPO's, with embedding and evidence share as part of its observation
        ppo_settings = {f.name: getattr(config, f.name) for f in fields(DistilledPPOSettings)}
        policy_obs = shapes.obs + config.embedding + 1
        policy_shapes = replace(shapes, obs=policy_obs, critic=shapes.critic + shapes.task)
        self.ppo = PPO(PPOConfig(**ppo_settings), policy_shapes)

        self.agent = PrototypeAgent(shapes, config, self.ppo.agent)
        self.optimiser = torch.optim.Adam(
            self.agent.encoder.parameters(), lr=config.encoder_lr, eps=1e-5, fused=True
        )

    def update(self, trials: Trials, progress: float, seed: int) -> dict[str, float]:
        """Update the agent from one iteration's trials.

        Raises:
            CollapseError: The embeddings broke down, or there is nothing to tell tasks apart by.
        """
        config = self.config
        generator = torch.Generator().manual_seed(seed)
        metrics = self.ppo.update(self._with_policy_obs(trials), progress, seed)

        self._add_to_bank(trials, generator)
        set_learning_rate(self.optimiser, decayed(config.encoder_lr, config.lr_end, progress))
        losses = trials.task.new_zeros(2)
        for _ in range(config.lessons):
            losses = losses + self._encoder_step(generator)
        losses = losses / config.lessons
        if not bool(losses.isfinite().all()):
            raise CollapseError(f"the loss of the embeddings is {float(losses.sum())}; {REMEDY}")

        encoder_metrics = {
            "loss": float(losses[0]),
            "distance_loss": float(losses[1]),
            "sharpness": float(self.agent.encoder.log_sharpness.detach().exp()),
            **self.agent.refresh(),
        }
        return metrics | {f"metric/{name}": value for name, value in encoder_metrics.items()}

    @torch.no_grad()
    def _with_policy_obs(self, trials: Trials) -> Trials:
        """Replace observations by what the policy observed, and show its critic the task."""
        agent = self.agent
        evidence = agent.encoder.begin(len(trials.task))
        episodes = []
        for episode in trials.episodes:
            sums = agent.cumulative_evidence(evidence, episode)
            obs = torch.cat([episode.obs, episode.final_obs[None]])
            policy_obs = agent.policy_obs(obs, sums, agent.encoder(sums))
            task_in_time = trials.task.expand(len(episode.obs), -1, -1)
            episodes.append(
                replace(
                    episode,
                    obs=policy_obs[:-1],
                    final_obs=policy_obs[-1],
                    critic_obs=torch.cat([episode.critic_obs, task_in_time], -1),
                    final_critic_obs=torch.cat([episode.final_critic_obs, trials.task], -1),
                )
            )
            evidence = sums[-1]
        return replace(trials, episodes=tuple(episodes))

    def _add_to_bank(self, trials: Trials, generator: torch.Generator) -> None:
        """Cut windows at random places of each trial, the last at its start, and add them.

        Raises:
            MetarobotError: A task with fewer than two transitions.
            CollapseError: All tasks have the same transitions.
        """
        config = self.config
        seq = join_episodes(trials.episodes)
        x = encode_transitions(seq.percept.obs, seq.action, seq.reward, seq.next_obs)
        steps = seq.valid.sum(0)
        if int(steps.min()) < 2:
            raise MetarobotError(
                f"a task has {int(steps.min())} transitions; support and query need at least 2"
            )
        if bool((x == x[:, :1]).all()) and bool((trials.task != trials.task[0]).any()):
            raise CollapseError(
                f"{len(steps)} tasks have identical transitions: there is nothing to tell them "
                "apart by"
            )
        self.agent.encoder.norm.update(x[seq.valid])

        # first step of each window, (task, window)
        uniform = torch.rand(len(steps), config.windows, generator=generator).to(x)
        uniform[:, -1] = 0.0
        possible_starts = (steps - config.window + 1).clamp_min(1)
        start = (uniform * possible_starts[:, None]).long()

        # all its steps, (task, window, step); short trials leave padding
        step = start[..., None] + torch.arange(config.window, device=x.device)
        valid = (step < steps[:, None, None]).to(x)
        worlds = torch.arange(len(steps), device=x.device)[:, None, None]
        windows = x[step.clamp_max(len(x) - 1), worlds] * valid[..., None]
        self.agent.bank.add(windows, valid, trials.task)

    def _encoder_step(self, generator: torch.Generator) -> Tensor:
        """Take one gradient step of the encoder on random tasks of the bank.

        Returns:
            The metric loss and the distance loss, ``(2,)``.
        """
        config = self.config
        bank = self.agent.bank
        encoder = self.agent.encoder
        order = torch.randperm(len(bank), generator=generator)
        rows = order[: config.lesson_tasks].to(bank.task.device)
        task = bank.task[rows]
        valid = bank.lived[rows]
        valid = valid * _shorten(valid, generator)

        evidence = encoder.evidence(bank.windows[rows]) * valid[..., None]
        z = encoder(evidence.sum(2))
        label = torch.unique(task, dim=0, return_inverse=True)[1]
        metric_loss = LOSSES[config.loss](z, label, encoder.log_sharpness.exp())
        stress = distance_loss(z, task)

        loss = metric_loss + config.distance * stress
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(encoder.parameters(), config.grad_norm)
        self.optimiser.step()
        return torch.stack([metric_loss, stress]).detach()

    def warm_start(self, policy: FeedforwardPolicy) -> None:
        """Initialise so that the agent acts as ``policy``, with its own exploration noise."""
        self.ppo.warm_start(policy)

    def state(self) -> dict[str, Tensor]:
        """Return weights, normalisers, bank and optimiser states."""
        encoder_state = flatten_state(self.optimiser)
        flat = {f"lessons.{key}": value for key, value in encoder_state.items()}
        return flat | flatten_state(self.ppo.optimiser, **self._modules())

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what ``state`` returned."""
        restore_state(state, self.ppo.optimiser, **self._modules())
        restore_state(with_prefix(state, "lessons."), self.optimiser)

    def _modules(self) -> dict[str, nn.Module]:
        """Return the modules to save: PPO's, with its policy as part of the whole agent."""
        return self.ppo.modules | {"agent": self.agent}


def _check_settings(config: PrototypeConfig) -> None:
    """Raise ``MetarobotError`` for settings that cannot work together."""
    if config.loss not in LOSSES:
        raise MetarobotError(f"no loss called {config.loss!r}; there are: {', '.join(LOSSES)}")
    if config.bank < config.worlds:
        raise MetarobotError(
            f"bank = {config.bank} cannot hold the tasks of one iteration, worlds = {config.worlds}"
        )


def _shorten(valid: Tensor, generator: torch.Generator) -> Tensor:
    """Return a mask that cuts the query windows, the later half, to random lengths.

    Lengths are log-uniform, so that few transitions count as much as many.

    Args:
        valid: The mask of the windows, ``(task, window, step)``; the result has its shape.
        generator: Source of the lengths.
    """
    tasks, windows, steps = valid.shape
    length = steps ** torch.rand(tasks, windows, 1, generator=generator)
    length[:, : windows // 2] = steps
    return (torch.arange(steps) < length).to(valid)


prototype = AgentKind(
    name="prototype",
    doc=(
        "Recognises tasks by similarity: acts on an embedding of the transitions so far; keeps "
        "prototypes."
    ),
    config=PrototypeConfig,
    build=Prototype,
)
