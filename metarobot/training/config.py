"""What to train, and where: the configuration of a training run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from metarobot.env.factory import SIMS
from metarobot.errors import MetarobotError
from metarobot.learning.agent_interface import agents
from metarobot.tasks.family import family_on


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What to train, and where; an agent's own settings are its configuration's."""

    family: str
    agent: str = "rl2"
    robot: str = ""
    """Another model of the family's robot: a path to an MJCF, or ``menagerie:name``; empty is its
    own."""
    init: str = ""
    """A policy without memory to begin as: the run folder or name of an agent trained as ppo or
    blind."""
    demos: str = ""
    """A Minari dataset of demonstrations, for an agent that imitates."""
    steps: int = 2_000_000
    """Environment steps to train for."""
    seed: int = 0
    """The same seed, settings and thread count give the same weights."""
    device: str = "cpu"
    """Where learning happens, and physics too if it can: cpu or cuda."""
    sim: str = ""
    """What simulates: cpu, or warp, on whichever device; if empty, warp on cuda where it can, else
    cpu."""
    pool: int = 0
    """On Warp, how many training tasks there are if each has a model of its own; 0 is 4,096. On the
    CPU no end."""
    threads: int = 0
    """CPU threads; 0 takes all there are."""
    save_every: int = 20
    """Iterations between checkpoints."""


def check_config(config: TrainConfig) -> None:
    """Raise for settings that cannot work."""
    family_on(config.family, config.robot)
    agents.get(config.agent)
    for name, least in (("steps", 1), ("seed", 0), ("threads", 0), ("save_every", 1), ("pool", 0)):
        if getattr(config, name) < least:
            raise MetarobotError(f"{name} must be at least {least}, not {getattr(config, name)}")
    imitates = agents.get(config.agent).imitates
    if imitates and not config.demos:
        raise MetarobotError(
            f"agent {config.agent!r} needs --demos, a dataset that metarobot record makes"
        )
    if config.demos and not imitates:
        raise MetarobotError(
            f"agent {config.agent!r} learns from its own trials; leave --demos out"
        )
    if config.device not in ("cpu", "cuda"):
        raise MetarobotError(f"no device called {config.device!r}; there are: cpu, cuda")
    if config.device != "cpu" and agents.get(config.agent).fit is not None:
        raise MetarobotError(f"agent {config.agent!r} learns on the CPU; leave --device out")
    if config.sim == "warp" and (imitates or agents.get(config.agent).fit is not None):
        raise MetarobotError(
            f"agent {config.agent!r} does not collect trials on Warp; leave --sim out"
        )
    if config.sim not in ("", *SIMS):
        raise MetarobotError(f"no simulator called {config.sim!r}; there are: {', '.join(SIMS)}")
    if config.device == "cuda" and not torch.cuda.is_available():
        why = (
            "torch finds no CUDA device here"
            if torch.version.cuda
            else "this torch is built without CUDA"
        )
        raise MetarobotError(f"--device cuda was asked for, but {why}; use --device cpu")


CHANGEABLE_ON_RESUME = ("device", "sim")
"""Settings of a run that may change when it is continued: where it lives and learns."""
