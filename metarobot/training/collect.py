"""Collecting trials with an agent: a pure function of (weights, tasks, seed)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from metarobot.env.base import Env, StepResult
from metarobot.learning.agent_interface import Agent, Context, DrawsNoise
from metarobot.tasks.space import Task
from metarobot.threads_and_memory import single_torch_thread
from metarobot.types import Percept, Rollout, Trials

Watcher = Callable[[int, Env, StepResult], None]
"""Called after every step with (episode, env, result of the step)."""


@torch.no_grad()
@single_torch_thread()
def collect(
    agent: Agent,
    env: Env,
    tasks: Sequence[Task],
    *,
    episodes: int,
    seed: int,
    rollouts: int = 1,
    explore: bool | Sequence[bool] = True,
    between: Callable[[Context], Context] = lambda context: context,
    variant: Tensor | None = None,
    record_teacher: bool = False,
    watch: Watcher | None = None,
) -> Trials:
    """Collect one trial of each task: the agent acts an episode, adapts, acts the next.

    The result depends on the weights, the tasks and the seed alone: what ``env`` did before has no
    effect. The worlds of a task share its context, so only an agent that does not change its
    context while it acts, as one that adapts between episodes, can have more than one.

    Args:
        agent: Acts and adapts.
        env: Has ``rollouts`` worlds for each task; those of a task are next to each other.
        tasks: One for each trial.
        episodes: Episodes of a trial.
        seed: Keys the starts, the noise of the observations and the exploration.
        rollouts: Worlds of one task.
        explore: Whether the agent adds its exploration noise; one for all episodes or one for each.
        between: Changes the context after each adaptation, for the controls of an evaluation.
        variant: Which variant the first episode of each world is ``(world,)``; None draws it.
        record_teacher: Whether to record the teacher's action at each step.
        watch: Called after every step, for pictures.

    Raises:
        MetarobotError: A task of another family, or another number of worlds.
    """
    env.set_tasks([task for task in tasks for _ in range(rollouts)])
    obs = env.reset(seed)
    if variant is not None:
        obs = env.set_variant(variant)

    encoded = env.family.space.encode(tasks).to(env.device)
    context = agent.begin(len(tasks), encoded if agent.privileged else None)
    percept = Percept.at_trial_start(obs, env.act_dim)

    # A generator of its own: collecting neither reads nor changes torch's global one.
    generator = torch.Generator(env.device).manual_seed(seed)
    noise_dim = agent.noise_dim if isinstance(agent, DrawsNoise) else env.act_dim
    noise_shape = (env.family.horizon, env.worlds, noise_dim)
    explores = [explore] * episodes if isinstance(explore, bool) else explore

    collected = []
    for k in range(episodes):
        # Drawn for the whole episode, so that an early end changes nothing in the next one.
        noise = None
        if explores[k]:
            noise = torch.randn(noise_shape, generator=generator, device=env.device)
        rollout, last, context = _collect_episode(
            agent, env, percept, context, noise, record_teacher=record_teacher, watch=watch, k=k
        )
        collected.append(rollout)

        # The first percept of the next episode still has the last action, its reward and the end.
        percept = last._replace(obs=env.restart(k + 1))
        if k + 1 < episodes:
            context = between(agent.adapt(context, rollout))
    return Trials(episodes=tuple(collected), task=encoded.repeat_interleave(rollouts, 0))


def _collect_episode(
    agent: Agent,
    env: Env,
    percept: Percept,
    context: Context,
    noise: Tensor | None,
    *,
    record_teacher: bool,
    watch: Watcher | None,
    k: int,
) -> tuple[Rollout, Percept, Context]:
    """Act one episode in every world, until all are over; ``noise`` is ``(time, world, noise)``.

    A world that ends early waits, its context unchanged, until all have ended. Returns the
    episode, and each world's percept after its last step and context.
    """
    buffers = _EpisodeBuffers(env, record_teacher)
    last = percept
    for t in range(env.family.horizon):
        active = ~env.over
        if not env.any_world(active):
            break
        some_wait = env.any_world(env.over)

        action, next_context = agent.act(percept, context, None if noise is None else noise[t])
        # Read before the step, which changes the state that the action was chosen in.
        critic_obs = env.critic_obs()
        teacher_action = env.teacher_action() if record_teacher else None
        result = env.step(action)
        buffers.record(t, active, percept.obs, critic_obs, teacher_action, action, result)

        ended = (result.terminated | result.truncated).float()
        percept = Percept(
            result.obs, action, result.reward, done=ended, first=torch.zeros_like(ended)
        )

        # Agents act in all worlds, also in those that wait, where nothing of it is kept.
        if some_wait:
            last = Percept(*(_where(active, *pair) for pair in zip(percept, last, strict=True)))
            if next_context is not context:
                pairs = zip(next_context, context, strict=True)
                context = tuple(_where(active, *pair) for pair in pairs)
        else:
            last = percept
            context = next_context

        if watch is not None:
            watch(k, env, result)
    return buffers.rollout(), last, context


class _EpisodeBuffers:
    """What is recorded of one episode, of the family's horizon, cut to the longest world's."""

    def __init__(self, env: Env, record_teacher: bool) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=env.device)

        horizon = env.family.horizon
        worlds = env.worlds
        critic_dim = env.critic_obs().shape[1]
        self._steps = 0
        self._obs = zeros(horizon, worlds, env.obs_dim)
        self._critic_obs = zeros(horizon, worlds, critic_dim)
        self._action = zeros(horizon, worlds, env.act_dim)
        self._teacher_action = zeros(horizon, worlds, env.act_dim if record_teacher else 0)
        self._reward = zeros(horizon, worlds)
        self._terminated = zeros(horizon, worlds, dtype=torch.bool)
        self._truncated = zeros(horizon, worlds, dtype=torch.bool)
        self._valid = zeros(horizon, worlds, dtype=torch.bool)
        self._final_obs = zeros(worlds, env.obs_dim)
        self._final_critic_obs = zeros(worlds, critic_dim)
        self._faulted = zeros(worlds, dtype=torch.bool)
        self._terms: dict[str, Tensor] = {}

    def record(
        self,
        t: int,
        active: Tensor,
        obs: Tensor,
        critic_obs: Tensor,
        teacher_action: Tensor | None,
        action: Tensor,
        result: StepResult,
    ) -> None:
        """Record step ``t``: what was observed before it, the action, and what it led to.

        Rows of worlds that are not ``active`` ``(world,)`` are padding.
        """
        self._steps = t + 1
        self._obs[t] = obs
        self._critic_obs[t] = critic_obs
        self._action[t] = action
        if teacher_action is not None:
            self._teacher_action[t] = teacher_action
        self._reward[t] = result.reward
        self._terminated[t] = result.terminated
        self._truncated[t] = result.truncated
        self._valid[t] = active

        self._final_obs = _where(active, result.final_obs, self._final_obs)
        self._final_critic_obs = _where(active, result.final_critic_obs, self._final_critic_obs)
        self._faulted |= result.faulted
        for name, term in result.terms.items():
            self._terms[name] = self._terms.get(name, 0.0) + term * active

    def rollout(self) -> Rollout:
        """Return the episode, cut to the steps that were taken in any world."""
        taken = slice(0, self._steps)
        return Rollout(
            obs=self._obs[taken],
            action=self._action[taken],
            reward=self._reward[taken] * self._valid[taken],
            terminated=self._terminated[taken],
            truncated=self._truncated[taken],
            valid=self._valid[taken],
            final_obs=self._final_obs,
            critic_obs=self._critic_obs[taken],
            final_critic_obs=self._final_critic_obs,
            faulted=self._faulted,
            teacher_action=self._teacher_action[taken],
            terms={k: v.float() for k, v in self._terms.items()},
        )


def _where(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Choose by a mask over the first axis."""
    return torch.where(mask.view(-1, *[1] * (new.dim() - 1)), new, old)


class ExpertAgent:
    """A family's scripted expert as an agent: it reads the task and the state from the environment.

    Args:
        env: The environment it will act in.
        jitter: Standard deviation of the noise on its actions, where exploration is on.

    Raises:
        MetarobotError: The family has no expert.
    """

    privileged = False
    explores = False

    def __init__(self, env: Env, jitter: float = 0.0) -> None:
        self._env = env
        self.jitter = jitter
        env.expert()
        self.asked: list[Tensor] = []
        """The expert's actions ``(world, act)`` before the noise, step by step."""

    def begin(self, worlds: int, task: Tensor | None = None) -> Context:
        """Return an empty context."""
        return ()

    def act(
        self, percept: Percept, context: Context, noise: Tensor | None = None
    ) -> tuple[Tensor, Context]:
        """Return the expert's action ``(world, act)``, plus ``jitter`` times the noise, if any."""
        action = self._env.expert()
        self.asked.append(action)
        return action if noise is None else action + self.jitter * noise, context

    def adapt(self, context: Context, episode: Rollout) -> Context:
        """Return the context unchanged."""
        return context
