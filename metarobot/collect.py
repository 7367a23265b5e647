"""Rolling an agent through an environment: a pure function of (weights, tasks, seed)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from metarobot.agent import Agent, Context
from metarobot.env import Env, Step
from metarobot.tasks import Task
from metarobot.types import Percept, Rollout, Trials


@torch.inference_mode()
def collect(
    agent: Agent,
    env: Env,
    tasks: Sequence[Task],
    *,
    episodes: int,
    seed: int,
    explore: bool = True,
    between: Callable[[Context], Context] = lambda context: context,
    watch: Callable[[int, Env, Step], None] | None = None,
) -> Trials:
    """Live one trial of ``episodes`` episodes in each task: act an episode, adapt, act the next.

    ``env`` only lends its worlds: whatever it did before has no effect. ``explore`` adds the agent's own exploration
    noise; ``between`` tampers with the context after each episode (the controls of an evaluation); ``watch`` is called
    after every step with (episode, env, step), for pictures.
    """
    env.set_tasks(tasks)
    obs = env.reset(seed)
    noise = torch.Generator().manual_seed(seed)
    task = env.family.space.encode(tasks)
    context = agent.begin(env.worlds, task if agent.privileged else None)
    zeros = torch.zeros(env.worlds)
    percept = Percept(obs, torch.zeros(env.worlds, env.act_dim), zeros, zeros, zeros + 1)
    rollouts = []
    for k in range(episodes):
        rollout, percept, context = _episode(agent, env, percept, context, noise if explore else None, k, watch)
        context = between(agent.adapt(context, rollout))
        rollouts.append(rollout)
    return Trials(episodes=tuple(rollouts), task=task)


def _episode(
    agent: Agent,
    env: Env,
    percept: Percept,
    context: Context,
    generator: torch.Generator | None,
    k: int,
    watch: Callable[[int, Env, Step], None] | None,
) -> tuple[Rollout, Percept, Context]:
    """Live one episode in every world; a world that ends early waits, its context untouched, for the others."""
    time, worlds = env.family.horizon, env.worlds
    obs, action = torch.zeros(time, worlds, env.obs_dim), torch.zeros(time, worlds, env.act_dim)
    reward = torch.zeros(time, worlds)
    terminated, truncated, valid = (torch.zeros(time, worlds, dtype=torch.bool) for _ in range(3))
    final_obs, faulted = torch.zeros(worlds, env.obs_dim), torch.zeros(worlds, dtype=torch.bool)
    alive, all_alive = torch.ones(worlds, dtype=torch.bool), True
    noise = None if generator is None else torch.randn(time, worlds, env.act_dim, generator=generator)
    sums: dict[str, Tensor] = {}
    last = percept
    for t in range(time):
        chosen, after = agent.act(percept, context, None if noise is None else noise[t])
        step = env.step(chosen)
        obs[t], action[t], reward[t] = percept.obs, chosen, step.reward
        terminated[t], truncated[t], valid[t] = step.terminated, step.truncated, alive
        ended = step.terminated | step.truncated
        zeros = torch.zeros(worlds)
        percept = Percept(step.obs, chosen, step.reward, ended.float(), zeros)
        for name, term in step.terms.items():
            sums[name] = sums.get(name, 0.0) + term * alive
        if all_alive:
            context, final_obs, last = after, step.final_obs, percept
        else:
            context = tuple(keep(alive, a, b) for a, b in zip(after, context, strict=True))
            final_obs = keep(alive, step.final_obs, final_obs)
            last = Percept(*(keep(alive, a, b) for a, b in zip(percept, last, strict=True)))
        faulted |= step.faulted & alive
        if watch is not None:
            watch(k, env, step)
        if bool(ended.any()):
            alive = alive & ~ended
            all_alive = False
            if not bool(alive.any()):
                break
    lived = slice(0, t + 1)
    rollout = Rollout(
        obs=obs[lived],
        action=action[lived],
        reward=reward[lived] * valid[lived],
        terminated=terminated[lived] & valid[lived],
        truncated=truncated[lived] & valid[lived],
        valid=valid[lived],
        final_obs=final_obs,
        faulted=faulted,
        terms={k: v.float() for k, v in sums.items()},
    )
    return rollout, last._replace(obs=env.restart(k + 1)), context


def keep(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Take ``new`` in the worlds of ``mask``, ``old`` in the others."""
    return torch.where(mask.view(-1, *[1] * (new.dim() - 1)), new, old)
