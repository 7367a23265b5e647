"""Adapt an agent to logged episodes, in a process of its own beside the controller.

``python -m metarobot.deploy.adaptation_worker RUN LOG.npz OUT.npz`` reads the rollouts that a robot
has collected and the context they were collected with. The run's agent adapts to them exactly as it
does in evaluation. The new context is written to OUT, or the reason why there is none.

This process needs torch; the controller does not. ``metarobot.bridge.adaptation_client`` is the
controller's end, and documents what the two files hold.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor
from tyro.conf import Positional

from metarobot.bridge.adaptation_client import CONTEXT_PREFIX, DEFAULT_KL_BOUND, KL_KEY, REASON_KEY
from metarobot.errors import MetarobotError
from metarobot.files import atomic_path
from metarobot.learning.agent_interface import Context, MeasuresDivergence, agents
from metarobot.learning.maml_agent import GradientAgent
from metarobot.learning.networks import RunningNorm
from metarobot.training.run_folder import open_run
from metarobot.types import Percept, Rollout

MAX_REWARD = 1000.0
"""Largest size of a step's reward; those of the families in the box are below 20."""
MAX_OBS_DEVIATION = 100.0
"""Standard deviations, of training, by which an observation may differ from the mean of training.
Networks see 10 at most; in simulation it is about 5."""
MAX_ACTION_DEVIATION = 10.0
"""Standard deviations by which an action may differ from the policy's mean. A normal distribution
gives 5 in a million samples."""
MAX_ACTION = 100.0
"""Largest action of an agent of which only that can be said; bounds of actions are 1 or so."""
NICENESS = 10
"""Lowers this process's priority: the controller comes first."""


class AdaptationError(MetarobotError):
    """A log that does not fit the agent, or an adaptation that must not be used."""


def rollout_from_log(log: Mapping[str, Any]) -> Rollout:
    """Build a ``Rollout`` of a log's arrays; its rollouts become the world axis.

    Args:
        log: ``obs``, ``action``, ``reward``, ``terminated``, ``truncated``, ``valid`` with leading
            axes ``(time, rollout)``, and ``final_obs`` ``(rollout, obs)``.

    Raises:
        KeyError: An array is missing.
    """
    values: dict[str, Any] = {
        name: torch.from_numpy(np.asarray(log[name]))
        for name in ("obs", "action", "reward", "final_obs")
    }
    flags: dict[str, Any] = {
        name: torch.from_numpy(np.asarray(log[name])).bool()
        for name in ("terminated", "truncated", "valid")
    }
    steps, worlds = values["reward"].shape

    # a robot has neither a critic's observation nor a teacher
    empty = torch.zeros(steps, worlds, 0)
    return Rollout(
        **values,
        **flags,
        critic_obs=empty,
        final_critic_obs=empty[0],
        faulted=torch.zeros(worlds, dtype=torch.bool),
        teacher_action=empty,
    )


def usable_rollouts(episode: Rollout) -> Rollout:
    """Return the rollouts without those that are not whole and finite: these have no valid step.

    Raises:
        AdaptationError: Fewer are left than ``quorum`` says.
    """
    steps, count = episode.valid.shape
    lengths = episode.valid.sum(0)
    # Valid steps are the first ones, and the last of them ended the episode
    is_prefix = (episode.valid == (torch.arange(steps)[:, None] < lengths)).all(0)
    last = (lengths - 1).clamp_min(0)
    ended = (episode.terminated | episode.truncated).gather(0, last[None])[0]
    finite = episode.final_obs.isfinite().all(-1)
    for values in (episode.obs, episode.action, episode.reward[..., None]):
        finite &= (values.isfinite().all(-1) | ~episode.valid).all(0)
    usable = is_prefix & ended & finite & (lengths > 0)

    found = int(usable.sum())
    if found < quorum(count):
        raise AdaptationError(
            f"there was nothing to learn from: {found} of {count} rollouts are whole and finite, "
            f"fewer than {quorum(count)}"
        )
    return replace(episode, valid=episode.valid & usable)


def quorum(rollouts: int) -> int:
    """Return how many of so many rollouts must be usable: half, and two at least if there are."""
    return max(math.ceil(rollouts / 2), min(rollouts, 2))


@torch.no_grad()
def check_plausible(agent: Any, old: Context, episode: Rollout) -> None:
    """Check that the agent may have chosen the actions, and the robot given the rest.

    Raises:
        AdaptationError: A number is out of its range.
    """
    valid = episode.valid
    reward = float(episode.reward[valid].abs().max())
    if reward > MAX_REWARD:
        raise AdaptationError(f"a step's reward of {reward:.3g}, more than {MAX_REWARD:g}")

    obs = episode.obs[valid]
    for norm in agent.modules() if isinstance(agent, torch.nn.Module) else ():
        if isinstance(norm, RunningNorm) and len(norm.mean) == obs.shape[-1]:
            deviation = float(((obs - norm.shift) * norm.scale).abs().max())
            if deviation > MAX_OBS_DEVIATION:
                raise AdaptationError(
                    f"an observation {deviation:.3g} standard deviations from the mean of those "
                    f"in training, more than {MAX_OBS_DEVIATION:g}"
                )

    action = episode.action[valid]
    if isinstance(agent, GradientAgent):
        mean, log_std = agent.distribution(old[0], agent.norm(obs)[None])
        deviation = float(((action - mean[0]).abs() * (-log_std).exp()).max())
        if deviation > MAX_ACTION_DEVIATION:
            raise AdaptationError(
                f"an action {deviation:.3g} standard deviations from what the policy would have "
                f"chosen, more than {MAX_ACTION_DEVIATION:g}"
            )
    elif float(action.abs().max()) > MAX_ACTION:
        raise AdaptationError(
            f"an action of {float(action.abs().max()):.3g}, more than {MAX_ACTION:g}"
        )


@torch.no_grad()
def divergence(agent: Any, old: Context, new: Context, episode: Rollout) -> float:
    """Return the mean KL divergence of the new policy from the old one on an episode's states.

    An agent that does not declare ``MeasuresDivergence`` is treated as if it acted with Gaussian
    noise of standard deviation 1: KL = |μ_new − μ_old|² / 2, where μ is its action at an episode's
    first step, at which it uses what it adapted to.
    """
    if isinstance(agent, MeasuresDivergence):
        batch = _first_task(agent.batch(old[0], episode))
        return float(agent.divergence(new[0][0], batch))

    rows = episode.valid.nonzero(as_tuple=True)
    obs = episode.obs[rows]
    count = len(obs)
    percept = Percept(
        obs=obs,
        action=torch.zeros_like(episode.action[rows]),
        reward=torch.zeros(count),
        done=torch.ones(count),
        first=torch.zeros(count),
    )

    # the context of the one task, once for each state
    old_context = tuple(x.expand(count, *x.shape[1:]) for x in old)
    new_context = tuple(x.expand(count, *x.shape[1:]) for x in new)
    old_action, _ = agent.act(percept, old_context)
    new_action, _ = agent.act(percept, new_context)
    return float(0.5 * (new_action - old_action).square().sum(-1).mean())


def _first_task(batch: Any) -> Any:
    """Return a batch, a named tuple of tensors ``(task, ...)``, without its task axis."""
    return type(batch)(*(x[0] for x in batch))


def adapt(run_name: str, log: Mapping[str, Any], max_kl: float) -> tuple[Context, float]:
    """Return the context to which the run's agent adapts, and its KL divergence from the old one.

    Args:
        run_name: Run folder, or name of a trained agent in the box.
        log: Arrays as for ``rollout_from_log``, and the tensors of the old context.
        max_kl: Largest mean KL divergence of the new policy from the old one.

    Raises:
        AdaptationError: The log does not fit the agent, there was nothing to learn from, or the new
            context is not finite or too far from the old one.
    """
    run = open_run(run_name)
    if agents.get(run.agent).imitates:
        raise AdaptationError(f"{run.agent} adapts to demonstrations, not to its own episodes")
    agent = run.load_agent()

    initial = agent.begin(1)
    old = tuple(
        torch.from_numpy(np.asarray(log[f"{CONTEXT_PREFIX}{i}"])) for i in range(len(initial))
    )
    _check_context_shapes(old, initial)
    episode = usable_rollouts(rollout_from_log(log))
    check_plausible(agent, old, episode)

    new = agent.adapt(old, episode)
    if not all(bool(x.isfinite().all()) for x in new):
        raise AdaptationError("adapting diverged: the new context is not finite")
    # an agent that finds no valid rollout, or whose step diverged, returns the old context
    if all(torch.equal(a, b) for a, b in zip(new, old, strict=True)):
        raise AdaptationError("there was nothing to learn from, or the step diverged")

    kl = divergence(agent, old, new, episode)
    # not "kl > max_kl": NaN must be refused too
    if not kl <= max_kl:
        raise AdaptationError(
            f"the new policy is a KL divergence of {kl:.3g} from the old one, more than {max_kl:g}"
        )
    return new, kl


def _check_context_shapes(given: Context, expected: Context) -> None:
    """Raise if a log's context has other shapes than the agent's: it is another agent's log."""
    given_shapes = [tuple(x.shape) for x in given]
    expected_shapes = [tuple(x.shape) for x in expected]
    if given_shapes != expected_shapes:
        raise AdaptationError(
            f"the log's context is of shapes {given_shapes}, not {expected_shapes}"
        )


def main(
    run: Positional[str],
    log: Positional[Path],
    out: Positional[Path],
    /,
    kl: float = DEFAULT_KL_BOUND,
) -> None:
    """Adapt a run's agent to the episodes that a robot has collected.

    Args:
        run: Run folder, or trained agent in the box.
        log: Rollouts and context, as the controller wrote them.
        out: Where to write the new context, or the reason why there is none.
        kl: Largest mean KL divergence of the new policy from the old one.
    """
    if not (kl > 0 and math.isfinite(kl)):
        raise AdaptationError(f"kl must be a positive number, not {kl:g}")

    result: dict[str, Any]
    try:
        with np.load(log, allow_pickle=False) as archive:
            arrays = dict(archive)
        context, found_kl = adapt(run, arrays, kl)
        result = {f"{CONTEXT_PREFIX}{i}": _to_numpy(x) for i, x in enumerate(context)}
        result[KL_KEY] = np.float64(found_kl)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as e:
        message = " ".join(repr(e).split())[:200]
        result = {REASON_KEY: np.array(f"the log is not one to adapt to: {message}")}
    except MetarobotError as e:
        result = {REASON_KEY: np.array(str(e))}

    with atomic_path(out) as temporary, temporary.open("wb") as file:
        np.savez(file, **result)


def _to_numpy(x: Tensor) -> Any:
    return x.detach().numpy()


if __name__ == "__main__":
    os.nice(NICENESS)
    torch.set_num_threads(1)
    try:
        tyro.cli(main, prog="python -m metarobot.deploy.adaptation_worker")
    except MetarobotError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
