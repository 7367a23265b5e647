"""Adaptation on the robot, for agents that adapt between episodes: a process beside the controller,
with torch in it.

``python -m metarobot.deploy.adaptation_worker RUN LOG.npz OUT.npz`` reads the rollouts that a robot
has lived and the context they were lived with, lets the run's agent adapt to them as it does in
evaluation, and writes the new context, or why it must not be used.
``metarobot.bridge.adaptation_client`` is the controller's end, and says what the files hold.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor
from tyro.conf import Positional

from metarobot.bridge.adaptation_client import CONTEXT, FAR, KL, REASON
from metarobot.errors import MetarobotError
from metarobot.files import atomic_path
from metarobot.learning.agent_interface import Context, agents
from metarobot.training.run_folder import open_run
from metarobot.types import Percept, Rollout


class AdaptingError(MetarobotError):
    """A log that does not fit the agent, or a change that is too large to trust."""


def rollout(log: Mapping[str, Any]) -> Rollout:
    """Make an episode of what a robot lived, its rollouts side by side."""
    got: dict[str, Any] = {
        k: torch.from_numpy(np.asarray(log[k])) for k in ("obs", "action", "reward", "final_obs")
    }
    flags: dict[str, Any] = {
        k: torch.from_numpy(np.asarray(log[k])).bool() for k in ("terminated", "truncated", "valid")
    }
    time, worlds = got["reward"].shape
    nothing = torch.zeros(time, worlds, 0)
    return Rollout(
        **got,
        **flags,
        critic_obs=nothing,
        final_critic_obs=nothing[0],
        faulted=torch.zeros(worlds, dtype=torch.bool),
        teacher_action=nothing,
    )


@torch.no_grad()
def divergence(agent: Any, old: Context, new: Context, episode: Rollout) -> float:
    """Return the mean KL divergence of the new policy from the old one, on the states of an
    episode.

    Of agents that do not know it themselves: half the squared change of the action at an episode's
    first step, when they take in what they adapted to, as if they acted with noise of deviation 1.
    """
    if hasattr(agent, "divergence"):
        return float(agent.divergence(new[0][0], _only(agent.batch(old[0], episode))))
    rows = episode.valid.nonzero(as_tuple=True)
    obs = episode.obs[rows]
    zeros = torch.zeros(len(obs))
    percept = Percept(obs, torch.zeros_like(episode.action[rows]), zeros, zeros + 1, zeros)
    before, after = (
        agent.act(percept, tuple(x.expand(len(obs), *x.shape[1:]) for x in c))[0]
        for c in (old, new)
    )
    return float(0.5 * (after - before).square().sum(-1).mean())


def _only(batch: Any) -> Any:
    """Return the batch of the only task."""
    return type(batch)(*(x[0] for x in batch))


def adapt(run: str, log: Mapping[str, Any], bound: float) -> tuple[Context, float]:
    """Return the context that the run's agent comes to, and how far it is from the old one; refuse
    what is too far.
    """
    opened = open_run(run)
    if agents.get(opened.agent).imitates:
        raise AdaptingError(f"{opened.agent} adapts to demonstrations, not to what it lived itself")
    agent = opened.load_agent()
    old = tuple(
        torch.from_numpy(np.asarray(log[f"{CONTEXT}{i}"])) for i in range(len(agent.begin(1)))
    )
    episode = rollout(log)
    _check(agent, old, episode)
    new = agent.adapt(old, episode)
    if not all(bool(x.isfinite().all()) for x in new):
        raise AdaptingError("adapting diverged: the new context is not finite")
    if all(torch.equal(a, b) for a, b in zip(new, old, strict=True)):
        raise AdaptingError(
            "there was nothing to learn from: no rollout is whole and finite, or its step diverged"
        )
    kl = divergence(agent, old, new, episode)
    if not kl <= bound:
        raise AdaptingError(
            f"the new policy is a KL divergence of {kl:.3g} from the old one, more than {bound:g}"
        )
    return new, kl


def _check(agent: Any, old: Context, episode: Rollout) -> None:
    """Refuse a log of another agent."""
    begin = agent.begin(1)
    shapes = [(tuple(x.shape), tuple(y.shape)) for x, y in zip(old, begin, strict=True)]
    if any(given != wanted for given, wanted in shapes):
        raise AdaptingError(
            f"the log's context is of shapes {[a for a, _ in shapes]}, not {[b for _, b in shapes]}"
        )


def main(
    run: Positional[str], log: Positional[Path], out: Positional[Path], /, kl: float = FAR
) -> None:
    """Adapt a run's agent to what a robot has lived.

    Args:
        run: Run folder, or trained agent in the box.
        log: Rollouts and context, as the controller wrote them.
        out: Where to write the new context, or why there is none.
        kl: Largest mean KL divergence of the new policy from the old one.
    """
    if not (kl > 0 and math.isfinite(kl)):
        raise AdaptingError(f"kl must be a positive number, not {kl:g}")
    try:
        with np.load(log, allow_pickle=False) as archive:
            arrays = dict(archive)
        new, far = adapt(run, arrays, kl)
        result: dict[str, Any] = {f"{CONTEXT}{i}": _plain(x) for i, x in enumerate(new)} | {
            KL: np.float64(far)
        }
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as e:
        result = {
            REASON: np.array(f"the log is not one to adapt to: {' '.join(repr(e).split())[:200]}")
        }
    except MetarobotError as e:
        result = {REASON: np.array(str(e))}
    with atomic_path(out) as temporary, temporary.open("wb") as file:
        np.savez(file, **result)


def _plain(x: Tensor) -> Any:
    return x.detach().numpy()


if __name__ == "__main__":
    os.nice(10)  # the controller comes first
    torch.set_num_threads(1)
    try:
        tyro.cli(main, prog="python -m metarobot.deploy.adaptation_worker")
    except MetarobotError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
