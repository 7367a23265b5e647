"""An agent that recognises tasks by likeness: prototypes in a learned space (Snell et al. 2017;
Koch et al. 2015).

An encoder turns a set of transitions into a point. Sets of one task are pulled together, those of
different tasks are pushed apart, and distances are made to follow those between the tasks'
parameters, which the simulator knows. The policy acts on the point of all transitions so far, so it
adapts from step to step. Points of training tasks are kept as prototypes: a new task is like the
nearest ones, or like none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from metarobot.agents.ppo import PPO, PPOAgent, PPOConfig
from metarobot.learning.ppo_core import DistilledPPOSettings as PPOSettings
from metarobot.errors import MetarobotError
from metarobot.learning.agent_interface import AgentKind, Context, Dimensions
from metarobot.learning.metric_losses import (
    LOSSES,
    distance_loss,
    nearest_prototype,
    novelty_threshold,
)
from metarobot.learning.networks import RunningNorm, mlp
from metarobot.learning.optimiser_state import flatten_state, restore_state
from metarobot.types import Percept, Rollout, Trials, join_episodes, next_values

COLLAPSED = 1e-5
"""Spread of the prototypes, in their own size, below which all of them are one point."""
SAFE = "lower --encoder-lr, or resume from the last checkpoint, which is whole"


@dataclass(frozen=True, kw_only=True)
class PrototypeConfig(PPOSettings):
    """Settings of the agent that recognises tasks by likeness, and PPO's for the policy that acts
    on it.
    """

    loss: str = "prototypical"
    """What pulls windows of one task together and pushes tasks apart: prototypical, contrastive or
    siamese."""
    distance: float = 5.0
    """Weight of the squared error of distances between embeddings to those between tasks."""
    embedding: int = 8
    """Numbers in an embedding."""
    summary: int = 64
    """Features of a transition, whose weighted mean is embedded."""
    window: int = 50
    """Transitions in a window."""
    windows: int = 4
    """Windows of each task that are kept, half of them support, half query; the last is how its
    trial began."""
    bank: int = 256
    """Training tasks whose windows and prototypes are kept, the latest."""
    lessons: int = 32
    """Gradient steps of the encoder an iteration."""
    lesson_tasks: int = 24
    """Tasks of the bank that a lesson tells apart."""
    encoder_lr: float = 1e-3
    """Adam's learning rate for the encoder at the start; it falls as the policy's does."""


class CollapseError(MetarobotError):
    """Embeddings that tell no tasks apart, or are no numbers."""


def transitions(obs: Tensor, action: Tensor, reward: Tensor, after: Tensor) -> Tensor:
    """Join what is seen, done, got and how that changed what is seen, ``(..., transition)``."""
    return torch.cat([obs, action, reward[..., None], after - obs], -1)


class Encoder(nn.Module):
    """Embeds a set of transitions, whatever their order and number: what they say is added up.

    Of each transition a network reads features and how much they weigh. The weighted mean over the
    set, and one learned answer of weight 1 for nothing known, is placed in the space of tasks.
    """

    def __init__(self, shapes: Dimensions, config: PrototypeConfig) -> None:
        super().__init__()
        size = 2 * shapes.obs + shapes.act + 1
        self.norm = RunningNorm(size)
        self.read = mlp(size, (config.width, config.width), config.summary + 1)
        self.nothing = nn.Parameter(torch.zeros(config.summary))
        self.place = mlp(config.summary, (config.width,), config.embedding)
        self.log_sharpness = nn.Parameter(torch.tensor(math.log(50.0)))

    def evidence(self, x: Tensor) -> Tensor:
        """Read transitions ``(..., transition)``: features times their weight, then it, ``(...,
        summary + 1)``.
        """
        said = self.read(self.norm(x))
        weight = functional.softplus(said[..., -1:])
        return torch.cat([weight * said[..., :-1], weight], -1)

    def begin(self, tasks: int) -> Tensor:
        """Return the evidence of no transitions, ``(task, summary + 1)``."""
        return self.nothing.new_zeros(tasks, len(self.nothing) + 1)

    def forward(self, evidence: Tensor) -> Tensor:
        """Embed summed evidence ``(..., summary + 1)``: ``(..., embedding)``."""
        z: Tensor = self.place((self.nothing + evidence[..., :-1]) / (1.0 + evidence[..., -1:]))
        return z


class Bank(nn.Module):
    """Windows of the latest training tasks, the prototypes that they make, and how near is known:
    buffers all.

    Shapes: windows ``(bank, window, step, transition)``; lived ``(bank, window, step)``, 1 for a
    transition, 0 for padding; task ``(bank, parameter)``, encoded; prototype ``(bank, embedding)``;
    count, how many tasks ever came.
    """

    windows: Tensor
    lived: Tensor
    task: Tensor
    prototype: Tensor
    threshold: Tensor
    count: Tensor

    def __init__(self, shapes: Dimensions, config: PrototypeConfig) -> None:
        super().__init__()
        size = (config.bank, config.windows, config.window)
        self.register_buffer("windows", torch.zeros(*size, 2 * shapes.obs + shapes.act + 1))
        self.register_buffer("lived", torch.zeros(*size))
        self.register_buffer("task", torch.zeros(config.bank, shapes.task))
        self.register_buffer("prototype", torch.zeros(config.bank, config.embedding))
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def __len__(self) -> int:
        """Count the tasks that are held."""
        return min(int(self.count), len(self.task))

    def keep(self, x: Tensor, lived: Tensor, task: Tensor) -> None:
        """Take in new tasks in the places of the oldest."""
        rows = (self.count + torch.arange(len(task), device=task.device)) % len(self.task)
        self.windows[rows], self.lived[rows], self.task[rows] = x, lived, task
        self.count += len(task)


class PrototypeAgent(nn.Module):
    """An encoder, a bank of prototypes, and a policy that acts on what is seen and on the embedding
    of the task.
    """

    privileged = False
    explores = False

    def __init__(self, shapes: Dimensions, config: PrototypeConfig, policy: PPOAgent) -> None:
        super().__init__()
        self.policy = policy
        self.encoder = Encoder(shapes, config)
        self.bank = Bank(shapes, config)
        self.obs = shapes.obs

    @property
    def norm(self) -> RunningNorm:
        """The normaliser of what the policy sees."""
        return self.policy.norm

    def begin(self, worlds: int, task: Tensor | None = None) -> Context:
        """Return the last observation (none yet), the evidence so far (none), and the embedding
        that it makes.
        """
        nothing = self.encoder.begin(worlds)
        return nothing.new_zeros(worlds, self.obs), nothing, self.encoder(nothing)

    def act(
        self, percept: Percept, context: Context, noise: Tensor | None = None
    ) -> tuple[Tensor, Context]:
        """Take in the transition just lived and act on the embedding of all so far.

        An episode's last transition is left to ``adapt``: its observation was reset before anybody
        was shown it.
        """
        obs, evidence, _ = context
        lived = (1.0 - percept.done - percept.first)[:, None]
        x = transitions(obs, percept.action, percept.reward, percept.obs)
        evidence = evidence + lived * self.encoder.evidence(x)
        z = self.encoder(evidence)
        action, _ = self.policy.act(
            percept._replace(obs=self.shown(percept.obs, evidence, z)), (), noise
        )
        return action, (percept.obs, evidence, z)

    def adapt(self, context: Context, episode: Rollout) -> Context:
        """Take in the episode's last transition too."""
        obs, evidence, _ = context
        rows = torch.arange(len(obs), device=obs.device)
        last = episode.valid.sum(0) - 1
        seen, action, reward = (
            x[last, rows] for x in (episode.obs, episode.action, episode.reward)
        )
        evidence = evidence + self.encoder.evidence(
            transitions(seen, action, reward, episode.final_obs)
        )
        return obs, evidence, self.encoder(evidence)

    def shown(self, obs: Tensor, evidence: Tensor, z: Tensor) -> Tensor:
        """Join what the policy is shown: observation, embedding, and how much of it is evidence,
        not prior.
        """
        weight = evidence[..., -1:]
        return torch.cat([obs, z, weight / (1.0 + weight)], -1)

    def follow(self, evidence: Tensor, episode: Rollout) -> Tensor:
        """Add up evidence over an episode: before each of its steps and after the last, ``(time +
        1, task, ...)``.
        """
        after = next_values(episode, episode.obs, episode.final_obs)
        said = self.encoder.evidence(
            transitions(episode.obs, episode.action, episode.reward, after)
        )
        said = torch.where(episode.valid[..., None], said, 0.0)
        return torch.cat([evidence[None], said]).cumsum(0)

    @torch.no_grad()
    def embed(self, episode: Rollout, steps: int = -1) -> Tensor:
        """Embed the first ``steps`` transitions of an episode alone, or all, ``(task,
        embedding)``.
        """
        z: Tensor = self.encoder(
            self.follow(self.encoder.begin(episode.valid.shape[1]), episode)[steps]
        )
        return z

    @torch.no_grad()
    def embedded(self, steps: int | None = None) -> Tensor:
        """Embed the windows of the bank, cut to ``steps``, with the encoder as it is now: ``(task,
        window, ...)``.
        """
        held, bank = len(self.bank), self.bank
        said = (
            self.encoder.evidence(bank.windows[:held, :, :steps])
            * bank.lived[:held, :, :steps, None]
        )
        z: Tensor = self.encoder(said.sum(2))
        return z

    def refresh(self) -> dict[str, float]:
        """Make prototypes and threshold anew, since the encoder has changed; say how well it tells
        tasks apart.

        Raises for embeddings that are not finite, or that are the same for all tasks.
        """
        z, bank = self.embedded(), self.bank
        prototype, task = z.mean(1), bank.task[: len(z)]
        if not bool(z.isfinite().all()):
            raise CollapseError(f"the embeddings are not finite; {SAFE}")
        spread = float((prototype - prototype.mean(0)).square().sum(1).mean().sqrt())
        if spread < COLLAPSED * (1.0 + float(prototype.norm(dim=1).mean())) and bool(
            (task != task[0]).any()
        ):
            raise CollapseError(
                f"the embeddings collapsed: {len(z)} tasks lie within {spread:.1g} of one point; {SAFE}"
            )
        bank.prototype[: len(z)] = prototype
        bank.threshold.fill_(novelty_threshold(z, prototype))
        support, query = z.chunk(2, 1)
        found = task[nearest_prototype(query, support.mean(1))]
        right = float((found == task[:, None]).all(-1).float().mean())
        return {"accuracy": right, "spread": spread, "threshold": float(bank.threshold)}


class Prototype:
    """Trains a ``PrototypeAgent``: PPO on what the policy was shown, then lessons for the encoder
    from the bank.

    No gradient of the policy reaches the encoder: an embedding says which task it is, nothing else.
    """

    def __init__(self, config: PrototypeConfig, shapes: Dimensions) -> None:
        _check(config)
        self.config = config
        usual = PPOConfig(**{f.name: getattr(config, f.name) for f in fields(PPOSettings)})
        seen = shapes.obs + config.embedding + 1
        self.ppo = PPO(usual, replace(shapes, obs=seen, critic=shapes.critic + shapes.task))
        self.agent = PrototypeAgent(shapes, config, self.ppo.agent)
        self.optimiser = torch.optim.Adam(
            self.agent.encoder.parameters(), lr=config.encoder_lr, eps=1e-5, fused=True
        )

    def update(self, trials: Trials, progress: float, seed: int) -> dict[str, float]:
        """Learn from one set of trials."""
        c, generator = self.config, torch.Generator().manual_seed(seed)
        metrics = self.ppo.update(self._shown(trials), progress, seed)
        self._keep(trials, generator)
        for group in self.optimiser.param_groups:
            group["lr"] = c.encoder_lr * (1.0 - progress * (1.0 - c.lr_end))
        held = len(self.agent.bank)
        lessons = (self._lesson(held, generator) for _ in range(c.lessons))
        losses = sum(lessons, start=trials.task.new_zeros(2)) / c.lessons
        if not bool(losses.isfinite().all()):
            raise CollapseError(f"the loss of the embeddings is {float(losses.sum())}; {SAFE}")
        told = {"loss": float(losses[0]), "distance_loss": float(losses[1])}
        told |= {
            "sharpness": float(self.agent.encoder.log_sharpness.detach().exp()),
            **self.agent.refresh(),
        }
        return metrics | {f"metric/{k}": v for k, v in told.items()}

    @torch.no_grad()
    def _shown(self, trials: Trials) -> Trials:
        """Put the embedding into what the policy saw, as it acted, and the task into what its
        critic sees.
        """
        evidence, episodes = self.agent.encoder.begin(len(trials.task)), []
        for e in trials.episodes:
            sums = self.agent.follow(evidence, e)
            seen = self.agent.shown(
                torch.cat([e.obs, e.final_obs[None]]), sums, self.agent.encoder(sums)
            )
            told = torch.cat([e.critic_obs, trials.task.expand(len(e.obs), -1, -1)], -1)
            final = torch.cat([e.final_critic_obs, trials.task], -1)
            episodes.append(
                replace(
                    e, obs=seen[:-1], final_obs=seen[-1], critic_obs=told, final_critic_obs=final
                )
            )
            evidence = sums[-1]
        return replace(trials, episodes=tuple(episodes))

    def _keep(self, trials: Trials, generator: torch.Generator) -> None:
        """Draw windows of each trial into the bank, the last one from its beginning."""
        c, seq = self.config, join_episodes(trials.episodes)
        x, count = (
            transitions(seq.percept.obs, seq.action, seq.reward, seq.next_obs),
            seq.valid.sum(0),
        )
        if int(count.min()) < 2:
            raise MetarobotError(
                f"a task lived {int(count.min())} transitions; support and query need at least 2"
            )
        if bool((x == x[:, :1]).all()) and bool((trials.task != trials.task[0]).any()):
            raise CollapseError(
                f"{len(count)} tasks lived identical transitions: there is nothing to tell them apart by"
            )
        self.agent.encoder.norm.update(x[seq.valid])
        start = torch.rand(len(count), c.windows, generator=generator).to(x)
        start[:, -1] = 0.0
        start = (start * (count - c.window + 1).clamp_min(1)[:, None]).long()
        step = start[..., None] + torch.arange(c.window, device=x.device)
        lived = (step < count[:, None, None]).to(x)
        rows = torch.arange(len(count), device=x.device)[:, None, None]
        self.agent.bank.keep(
            x[step.clamp_max(len(x) - 1), rows] * lived[..., None], lived, trials.task
        )

    def _lesson(self, held: int, generator: torch.Generator) -> Tensor:
        """Take one gradient step of the encoder on some of the bank's ``held`` tasks; return the
        losses.
        """
        c, bank, encoder = self.config, self.agent.bank, self.agent.encoder
        rows = torch.randperm(held, generator=generator)[: c.lesson_tasks].to(bank.task.device)
        task, lived = bank.task[rows], bank.lived[rows] * _cut(bank.lived[rows], generator)
        z = encoder((encoder.evidence(bank.windows[rows]) * lived[..., None]).sum(2))
        label = torch.unique(task, dim=0, return_inverse=True)[1]
        apart, error = LOSSES[c.loss](z, label, encoder.log_sharpness.exp()), distance_loss(z, task)
        loss = apart + c.distance * error
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(encoder.parameters(), c.grad_norm)
        self.optimiser.step()
        return torch.stack([apart, error]).detach()

    def warm_start(self, policy: PPOAgent) -> None:
        """Begin as a policy without memory acts."""
        self.ppo.warm_start(policy)

    def state(self) -> dict[str, Tensor]:
        """Return weights, normalisers, bank and optimisers."""
        ppo = self.ppo
        lessons = {f"lessons.{k}": v for k, v in flatten_state(self.optimiser).items()}
        return lessons | flatten_state(
            ppo.optimiser, agent=self.agent, spread=ppo.return_norm, critic_norm=ppo.critic_norm
        )

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore them."""
        ppo = self.ppo
        restore_state(
            state,
            ppo.optimiser,
            agent=self.agent,
            spread=ppo.return_norm,
            critic_norm=ppo.critic_norm,
        )
        restore_state(
            {k.removeprefix("lessons."): v for k, v in state.items() if k.startswith("lessons.")},
            self.optimiser,
        )


def _check(c: PrototypeConfig) -> None:
    """Raise for settings that cannot work together."""
    if c.loss not in LOSSES:
        raise MetarobotError(f"no loss called {c.loss!r}; there are: {', '.join(LOSSES)}")
    if c.windows < 2:
        raise MetarobotError(f"windows must be at least 2, a support and a query, not {c.windows}")
    if c.bank < c.worlds:
        raise MetarobotError(
            f"bank = {c.bank} cannot hold the tasks of one iteration, worlds = {c.worlds}"
        )


def _cut(lived: Tensor, generator: torch.Generator) -> Tensor:
    """Cut the later half of windows ``(task, window, step)`` short, to lengths of their own; 1
    where something is left.

    Lengths are log-uniform: what a few transitions tell counts as much as what many do.
    """
    tasks, windows, steps = lived.shape
    length = steps ** torch.rand(tasks, windows, 1, generator=generator)
    length[:, : windows // 2] = steps
    return (torch.arange(steps) < length).to(lived)


prototype = AgentKind(
    name="prototype",
    doc="Recognises tasks by likeness: acts on an embedding of the transitions so far; keeps prototypes.",
    config=PrototypeConfig,
    build=Prototype,
)
