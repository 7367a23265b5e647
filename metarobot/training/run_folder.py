"""Run folders and checkpoints: safetensors and JSON, written atomically, loaded without running any
code.

A run folder holds ``config.json`` (what was asked), ``tasks.json`` (the task space),
``metrics.jsonl``, and ``checkpoint.json``, which names the weights file that belongs to it and its
SHA-256. The JSON is replaced last, so at any moment the folder holds one complete checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from metarobot.env.base import Env
from metarobot.files import FileError, atomic_path, read_json, write_json
from metarobot.learning.agent_interface import Dimensions, Learner, agents
from metarobot.tasks.family import Family, family_on
from metarobot.tasks.space import TaskSpace

FORMAT = 1
PRETRAINED_FOLDER = Path(str(resources.files("metarobot.agents"))) / "pretrained"


class CheckpointError(FileError):
    """A run folder that is not one, is damaged, or cannot be written."""


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], counters: dict[str, Any]) -> None:
    """Write a checkpoint: named tensors, and the counters that training continues from."""
    data = safetensors.torch.save({k: v.contiguous().cpu() for k, v in tensors.items()})
    digest = hashlib.sha256(data).hexdigest()
    weights = folder / f"checkpoint-{digest[:12]}.safetensors"
    with atomic_path(weights) as temporary:
        temporary.write_bytes(data)
    write_json(folder / "checkpoint.json", {**counters, "weights": weights.name, "sha256": digest})
    for old in folder.glob("checkpoint-*.safetensors"):
        if old != weights:
            with suppress(OSError):
                old.unlink()


@dataclass(frozen=True)
class Run:
    """A run folder that has been checked: it is ours, readable, and its family still is what it
    was.
    """

    folder: Path
    config: dict[str, Any]
    family: Family

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.resolve().name

    @property
    def agent(self) -> str:
        """Name of the agent's kind."""
        return str(self.config["agent"])

    @property
    def rollouts(self) -> int:
        """Rollouts of a task that the agent adapts to at once."""
        return int(self.config["agent_config"].get("rollouts", 1))

    @property
    def steps(self) -> int:
        """Environment steps that the checkpoint has lived."""
        return collected_steps(self.folder)

    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Read tensors and counters, checking that they are whole."""
        counters = read_json(self.folder / "checkpoint.json")
        try:
            weights = self.folder / Path(counters["weights"]).name
            data = weights.read_bytes()
            if hashlib.sha256(data).hexdigest() != counters["sha256"]:
                raise CheckpointError(
                    f"{weights} is damaged (not the SHA-256 of checkpoint.json): restore it or train again"
                )
            return safetensors.torch.load(data), counters
        except OSError as e:
            raise CheckpointError(f"cannot read {weights}: {e.strerror or e}") from e
        except (KeyError, TypeError, AttributeError, safetensors.SafetensorError) as e:
            raise CheckpointError(f"{self.folder / 'checkpoint.json'} is damaged: {e!r}") from e

    def learner(self) -> Learner:
        """Build the untrained learner this run configures; the same seed gives the same initial
        weights.
        """
        try:
            config = agents.get(self.agent).config(**self.config["agent_config"])
        except TypeError as e:
            raise CheckpointError(
                f"{self.folder / 'config.json'} does not fit agent {self.agent!r}: {e}"
            ) from e
        return build_learner(self.agent, config, self.family, int(self.config["seed"]))

    def load_agent(self) -> Any:
        """Build the trained agent, ready to act."""
        agent, (tensors, _) = self.learner().agent, self.checkpoint()
        weights = {
            k.removeprefix("agent."): v for k, v in tensors.items() if k.startswith("agent.")
        }
        try:
            agent.load_state_dict(weights)
        except RuntimeError as e:
            raise CheckpointError(
                f"{self.folder} holds other weights than its config.json says: {_line(e)}"
            ) from e
        return agent


def build_learner(agent: str, config: Any, family: Family, seed: int) -> Learner:
    """Build an untrained learner for a family; torch's global generator is left as it was."""
    shapes = agent_dimensions(family, config.episodes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return agents.get(agent).build(config, shapes)


def agent_dimensions(family: Family, episodes: int) -> Dimensions:
    """Return the sizes of what an agent of this family sees and does."""
    env = Env(family, family.space.sample("train", 1), threads=1)
    return Dimensions(
        obs=env.obs_dim,
        act=env.act_dim,
        task=family.space.width,
        episodes=episodes,
        critic=env.critic_obs().shape[1],
        horizon=family.horizon,
        low=tuple(env.action_low.tolist()),
        high=tuple(env.action_high.tolist()),
    )


def create_run(folder: Path, config: dict[str, Any]) -> Run:
    """Start a run folder, which must not hold a run yet."""
    if (folder / "config.json").exists():
        raise CheckpointError(
            f"{folder} holds a run already: continue it with --resume, or choose another --out"
        )
    family = family_on(config["family"], config.get("robot", ""))
    write_json(folder / "tasks.json", family.space.to_json())
    write_json(folder / "config.json", {"format": FORMAT, "kind": "metarobot-run", **config})
    return open_run(folder)


def extend_run(run: Run, settings: Mapping[str, Any]) -> Run:
    """Let a run go on with other settings than it was started with, such as more steps."""
    write_json(run.folder / "config.json", {**run.config, **settings})
    return open_run(run.folder)


def collected_steps(folder: Path) -> int:
    """Return the environment steps that a run folder's checkpoint has lived; none if there is no
    checkpoint yet.
    """
    path = folder / "checkpoint.json"
    return int(read_json(path)["steps"]) if path.exists() else 0


def open_run(where: str | Path, robot: str = "") -> Run:
    """Open a run folder, or a pretrained agent by its name; ``robot`` puts it on another robot than
    its own.
    """
    folder = Path(where)
    if not folder.exists() and (PRETRAINED_FOLDER / str(where)).is_dir():
        folder = PRETRAINED_FOLDER / str(where)
    if not folder.is_dir():
        raise CheckpointError(
            f"no run folder {str(where)!r}, and no pretrained agent; there are: {_listing()}"
        )
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or config.get("kind") != "metarobot-run":
        raise CheckpointError(f"{folder} is not a metarobot run: its config.json does not say so")
    if config["format"] > FORMAT:
        raise CheckpointError(
            f"{folder} is of format {config['format']}, this metarobot reads up to {FORMAT}: upgrade metarobot"
        )
    try:
        family = family_on(config["family"], robot or config.get("robot", ""))
        agents.get(config["agent"])
    except KeyError as e:
        raise CheckpointError(f"{folder / 'config.json'} is damaged: it has no {e}") from e
    space = TaskSpace.from_json(read_json(folder / "tasks.json"))
    if space.hash != family.space.hash:
        raise CheckpointError(
            f"{folder} was trained on task space {space.hash}, but {family.name}'s is {family.space.hash} now"
        )
    return Run(folder, config, family)


def pretrained_names() -> list[str]:
    """Name the agents in the box."""
    return sorted(p.name for p in PRETRAINED_FOLDER.glob("*") if (p / "config.json").exists())


def publish_agent(run: Run, folder: Path, card: dict[str, Any]) -> None:
    """Copy a run's agent without its optimiser, with a card of how it was made: a pretrained
    agent.
    """
    tensors, counters = run.checkpoint()
    save_checkpoint(folder, {k: v for k, v in tensors.items() if k.startswith("agent.")}, counters)
    for name in ("config.json", "tasks.json"):
        write_json(folder / name, read_json(run.folder / name))
    write_json(folder / "card.json", card)


def _listing() -> str:
    return ", ".join(pretrained_names()) or "none"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
