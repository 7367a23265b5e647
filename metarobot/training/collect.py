"""Rolling an agent through an environment: a pure function of (weights, tasks, seed)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from metarobot.env.base import Env, StepResult
from metarobot.learning.agent_interface import Agent, Context
from metarobot.resources import single_torch_thread
from metarobot.tasks.space import Task
from metarobot.types import Percept, Rollout, Trials


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
    watch: Callable[[int, Env, StepResult], None] | None = None,
) -> Trials:
    """Live one trial of ``episodes`` episodes in each task: act an episode, adapt, act the next.

    ``env`` only lends its worlds, ``rollouts`` for each task, which stand together: whatever it did
    before has no effect. The worlds of a task share its context, so only an agent that leaves its
    context alone while it acts, as one that adapts between episodes does, can have more than one.
    ``explore``, one for all or one an episode, adds the agent's own exploration noise; ``variant``
    ``(world,)`` says which variant the first episode is; ``between`` tampers with the context after
    each episode (the controls of an evaluation); ``record_teacher`` also writes down what the
    family advises at each step; ``watch`` is called after every step with (episode, env, step), for
    pictures.
    """
    env.set_tasks([task for task in tasks for _ in range(rollouts)])
    obs = env.reset(seed)
    if variant is not None:
        obs = env.set_variant(variant)
    noise = torch.Generator(env.device).manual_seed(seed)
    task = env.family.space.encode(tasks).to(env.device)
    context = agent.begin(len(tasks), task if agent.privileged else None)
    zeros = obs.new_zeros(env.worlds)
    percept = Percept(obs, obs.new_zeros(env.worlds, env.act_dim), zeros, zeros, zeros + 1)
    lived = []
    exploring = [explore] * episodes if isinstance(explore, bool) else explore
    for k in range(episodes):
        book = _Recorder(env, record_teacher)
        percept, context = _episode(
            agent, env, book, percept, context, noise if exploring[k] else None, k, watch
        )
        rollout = book.rollout()
        lived.append(rollout)
        if k + 1 < episodes:
            context = between(agent.adapt(context, rollout))
    return Trials(episodes=tuple(lived), task=task.repeat_interleave(rollouts, 0))


def _episode(
    agent: Agent,
    env: Env,
    book: _Recorder,
    percept: Percept,
    context: Context,
    generator: torch.Generator | None,
    k: int,
    watch: Callable[[int, Env, StepResult], None] | None,
) -> tuple[Percept, Context]:
    """Live one episode in every world; a world that ends early sleeps, its context untouched, until
    all have.
    """
    shape = (env.family.horizon, env.worlds, getattr(agent, "noise_dim", env.act_dim))
    noise = (
        None if generator is None else torch.randn(shape, generator=generator, device=env.device)
    )
    last, zeros = percept, torch.zeros_like(percept.reward)
    while book.living:
        action, after = agent.act(percept, context, None if noise is None else noise[book.time])
        shown = env.critic_obs(), env.teacher_action() if book.record_teacher else None
        step = env.step(action, book.awake)
        ended = (step.terminated | step.truncated).float()
        arrived = Percept(step.obs, action, step.reward, ended, zeros)
        context = context if after is context else tuple(book.kept(after, context))
        last = Percept(*book.kept(arrived, last))
        book.record(percept, *shown, action, step)
        percept = arrived
        if watch is not None:
            watch(k, env, step)
    return last._replace(obs=env.restart(k + 1)), context


class ExpertAgent:
    """A family's own program in an agent's place: it is told the task and looks at the state
    itself.
    """

    privileged = explores = False

    def __init__(self, env: Env, jitter: float = 0.0) -> None:
        self._env, self.jitter = env, jitter
        env.expert()
        self.asked: list[Tensor] = []
        """The actions asked for, step by step."""

    def begin(self, worlds: int, task: Tensor | None = None) -> Context:
        """Carry nothing."""
        return ()

    def act(
        self, percept: Percept, context: Context, noise: Tensor | None = None
    ) -> tuple[Tensor, Context]:
        """Do as the program says, disturbed by ``jitter`` times the noise, if there is any."""
        action = self._env.expert()
        self.asked.append(action)
        return action if noise is None else action + self.jitter * noise, context

    def adapt(self, context: Context, episode: Rollout) -> Context:
        """Learn nothing."""
        return context


class _Recorder:
    """The buffers of one episode, and which worlds are still in it."""

    def __init__(self, env: Env, record_teacher: bool = False) -> None:
        self.record_teacher, self._any_world = record_teacher, env.any_world
        horizon, worlds, zeros = (
            env.family.horizon,
            env.worlds,
            partial(torch.zeros, device=env.device),
        )
        self.time, self.living, self._all = 0, True, True
        self._alive = torch.ones(worlds, dtype=torch.bool, device=env.device)
        self._obs, self._action = (
            zeros(horizon, worlds, env.obs_dim),
            zeros(horizon, worlds, env.act_dim),
        )
        self._reward = zeros(horizon, worlds)
        self._flags = zeros(3, horizon, worlds, dtype=torch.bool)
        self._final_obs, self._faulted = zeros(worlds, env.obs_dim), zeros(worlds, dtype=torch.bool)
        self._final_critic_obs = torch.zeros_like(env.critic_obs())
        self._critic_obs = zeros(horizon, *self._final_critic_obs.shape)
        self._advice = zeros(horizon, worlds, env.act_dim if record_teacher else 0)
        self._terms: dict[str, Tensor] = {}

    @property
    def awake(self) -> Tensor | None:
        """Which worlds are still in the episode; None if all are."""
        return None if self._all else self._alive

    def kept(self, new: Iterable[Tensor], old: Iterable[Tensor]) -> Iterable[Tensor]:
        """Take what is new in the living worlds, what was in the others."""
        return (
            new if self._all else (_where(self._alive, a, b) for a, b in zip(new, old, strict=True))
        )

    def record(
        self,
        percept: Percept,
        critic_obs: Tensor,
        teacher_action: Tensor | None,
        action: Tensor,
        step: StepResult,
    ) -> None:
        """Write down one step: what was seen, record_teacher, done and got."""
        t = self.time
        self._obs[t], self._action[t], self._reward[t] = percept.obs, action, step.reward
        self._flags[0, t], self._flags[1, t], self._flags[2, t] = (
            step.terminated,
            step.truncated,
            self._alive,
        )
        for name, term in step.terms.items():
            self._terms[name] = self._terms.get(name, 0.0) + term * self._alive
        self._critic_obs[t] = critic_obs
        if teacher_action is not None:
            self._advice[t] = teacher_action
        final = (step.final_obs, step.final_critic_obs)
        self._final_obs, self._final_critic_obs = self.kept(
            final, (self._final_obs, self._final_critic_obs)
        )
        self._faulted |= step.faulted & self._alive
        self.time += 1
        ended = step.terminated | step.truncated
        if self._any_world(ended):
            self._alive &= ~ended
            self._all, self.living = (
                False,
                self.time < len(self._reward) and self._any_world(self._alive),
            )

    def rollout(self) -> Rollout:
        """Return the episode, cut to the steps some world lived."""
        lived = slice(0, self.time)
        terminated, truncated, valid = self._flags[:, lived]
        return Rollout(
            obs=self._obs[lived],
            action=self._action[lived],
            reward=self._reward[lived] * valid,
            terminated=terminated & valid,
            truncated=truncated & valid,
            valid=valid,
            final_obs=self._final_obs,
            critic_obs=self._critic_obs[lived],
            final_critic_obs=self._final_critic_obs,
            faulted=self._faulted,
            teacher_action=self._advice[lived],
            terms={k: v.float() for k, v in self._terms.items()},
        )


def _where(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(mask.view(-1, *[1] * (new.dim() - 1)), new, old)
