"""Run folders and checkpoints: safetensors and JSON, written atomically.

A run folder holds ``config.json`` (the settings), ``tasks.json`` (the task space),
``metrics.jsonl``, and ``checkpoint.json``, which names the weights file that belongs to it and its
SHA-256. ``checkpoint.json`` is replaced last, so at any moment the folder holds one complete
checkpoint. Loading a folder runs no code of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from metarobot.env.base import Env
from metarobot.files import FileError, atomic_path, read_json, write_json
from metarobot.learning.agent_interface import Dimensions, Learner, agents
from metarobot.tasks.family import Family, family_on
from metarobot.tasks.space import TaskSpace
from metarobot.training.config import TrainConfig, rollouts_of

FORMAT = 1
KIND = "metarobot-run"
"""What a run's ``config.json`` says it is."""
PRETRAINED_FOLDER = Path(str(resources.files("metarobot.agents"))) / "pretrained"

_MAX_ERROR_LENGTH = 200
_OTHER_ENTRIES = {"format", "kind", "agent_config", "versions", "machine"}
"""Entries of ``config.json`` that are no settings of a training."""

Settings = TypeVar("Settings")


class CheckpointError(FileError):
    """A run folder that is not one, is damaged, or cannot be written."""


@dataclass(frozen=True)
class Run:
    """A run folder that was checked when it was opened: readable, and its task space unchanged."""

    folder: Path
    train_config: TrainConfig
    """Settings of the training."""
    agent_config: Any
    """Settings of the agent, an instance of its configuration class."""
    family: Family
    config: Mapping[str, Any]
    """All of ``config.json`` as it stands: the settings, and what made the run."""

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.resolve().name

    @property
    def agent(self) -> str:
        """Name of the agent's kind."""
        return self.train_config.agent

    @property
    def rollouts(self) -> int:
        """Worlds of a task that the agent adapts to at once."""
        return rollouts_of(self.agent_config)

    @property
    def steps(self) -> int:
        """Environment steps collected until the checkpoint."""
        return collected_steps(self.folder)

    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Read the checkpoint: named tensors, and counters.

        Raises:
            CheckpointError: A file is missing or damaged.
        """
        counters = read_json(self.folder / "checkpoint.json")
        try:
            # Only the name: a damaged file must not lead out of the folder.
            weights = self.folder / Path(counters["weights"]).name
            data = weights.read_bytes()
            if hashlib.sha256(data).hexdigest() != counters["sha256"]:
                raise CheckpointError(
                    f"{weights} is damaged (not the SHA-256 of checkpoint.json): restore it or "
                    "train again"
                )
            return safetensors.torch.load(data), counters
        except OSError as e:
            raise CheckpointError(f"cannot read {weights}: {e.strerror or e}") from e
        except (KeyError, TypeError, AttributeError, safetensors.SafetensorError) as e:
            raise CheckpointError(f"{self.folder / 'checkpoint.json'} is damaged: {e!r}") from e

    def learner(self) -> Learner:
        """Build the untrained learner; the same seed gives the same initial weights."""
        return build_learner(self.agent, self.agent_config, self.family, self.train_config.seed)

    def load_agent(self) -> Any:
        """Build the trained agent, ready to act.

        Raises:
            CheckpointError: The checkpoint is damaged or belongs to another agent.
        """
        # A checkpoint holds the learner's optimiser and normalisers too: take the agent's tensors.
        agent = self.learner().agent
        tensors, _ = self.checkpoint()
        prefix = "agent."
        weights = {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        try:
            agent.load_state_dict(weights)
        except RuntimeError as e:
            raise CheckpointError(
                f"{self.folder} holds other weights than its config.json says: {one_line(e)}"
            ) from e
        return agent


def open_run(where: str | Path, robot: str = "") -> Run:
    """Open a run folder, or a trained agent in the box by its name.

    Args:
        where: The folder, or the name.
        robot: Another model of the robot than the run was trained on: a path to an MJCF, or
            ``menagerie:name``.

    Raises:
        CheckpointError: There is no such run, it is damaged, or its task space has changed.
    """
    # A folder of that name comes before an agent in the box.
    folder = Path(where)
    if not folder.exists() and (PRETRAINED_FOLDER / str(where)).is_dir():
        folder = PRETRAINED_FOLDER / str(where)
    if not folder.is_dir():
        existing = ", ".join(pretrained_names()) or "none"
        raise CheckpointError(
            f"no run folder {str(where)!r}, and no pretrained agent; there are: {existing}"
        )

    path = folder / "config.json"
    config = read_json(path)
    if not isinstance(config, dict) or config.get("kind") != KIND:
        raise CheckpointError(f"{folder} is not a metarobot run: its config.json does not say so")
    try:
        if config["format"] > FORMAT:
            raise CheckpointError(
                f"{folder} is of format {config['format']}, this metarobot reads up to {FORMAT}: "
                "upgrade metarobot"
            )
        family = family_on(config["family"], robot or config.get("robot", ""))
        kind = agents.get(config["agent"])
        agent_config = read_settings(path, kind.config, config["agent_config"])
    except KeyError as e:
        raise CheckpointError(f"{path} is damaged: it has no {e}") from e
    settings = {k: v for k, v in config.items() if k not in _OTHER_ENTRIES}
    # Runs of before there was a choice were simulated on the CPU.
    train_config = read_settings(path, TrainConfig, {"sim": "cpu", **settings})

    # The agent was trained on this task space: under another its results would mean nothing.
    space = TaskSpace.from_json(read_json(folder / "tasks.json"))
    if space.hash != family.space.hash:
        raise CheckpointError(
            f"{folder} was trained on task space {space.hash}, but {family.name}'s is "
            f"{family.space.hash} now"
        )
    return Run(folder, train_config, agent_config, family, config)


def read_settings(path: Path, kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Build a configuration from what a JSON file holds; what is missing has its default.

    Raises:
        CheckpointError: An entry that the configuration class does not have.
    """
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise CheckpointError(
            f"{path} has settings that this metarobot does not know: {', '.join(unknown)}; "
            f"it knows: {', '.join(known)}"
        )
    return kind(**values)


def create_run(
    folder: Path, config: TrainConfig, agent_config: Any, about: Mapping[str, Any]
) -> Run:
    """Write the run folder of a new training; ``about`` says what made it, as JSON data.

    Raises:
        CheckpointError: The folder holds a run already.
    """
    check_unused(folder)
    family = family_on(config.family, config.robot)
    write_json(folder / "tasks.json", family.space.to_json())
    write_json(
        folder / "config.json",
        {
            "format": FORMAT,
            "kind": KIND,
            **asdict(config),
            "agent_config": asdict(agent_config),
            **about,
        },
    )
    return open_run(folder)


def check_unused(folder: Path) -> None:
    """Check that a folder holds no run yet.

    Raises:
        CheckpointError: It does.
    """
    if (folder / "config.json").exists():
        raise CheckpointError(
            f"{folder} holds a run already: continue it with --resume, or choose another --out"
        )


def change_run(run: Run, changes: Mapping[str, Any]) -> Run:
    """Write new values of training settings, such as more steps, into a run's ``config.json``."""
    write_json(run.folder / "config.json", {**run.config, **changes})
    return open_run(run.folder)


def collected_steps(folder: Path) -> int:
    """Return the environment steps of a run folder's checkpoint; 0 if there is none yet."""
    path = folder / "checkpoint.json"
    return int(read_json(path)["steps"]) if path.exists() else 0


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], counters: dict[str, Any]) -> None:
    """Write a checkpoint: named tensors, and the counters that training continues from.

    Raises:
        FileError: The operating system refuses to write; the checkpoint before stays whole.
    """
    data = safetensors.torch.save({k: v.contiguous().cpu() for k, v in tensors.items()})
    # Weights of another content have another name, so those of the last checkpoint stay whole.
    digest = hashlib.sha256(data).hexdigest()
    weights = folder / f"checkpoint-{digest[:12]}.safetensors"
    with atomic_path(weights) as temporary:
        temporary.write_bytes(data)
    # From here on the new checkpoint is the run's.
    write_json(folder / "checkpoint.json", {**counters, "weights": weights.name, "sha256": digest})

    for old in folder.glob("checkpoint-*.safetensors"):
        if old != weights:
            with suppress(OSError):
                old.unlink()


def build_learner(
    agent: str, agent_config: Any, family: Family, seed: int, env: Env | None = None
) -> Learner:
    """Build an untrained learner; torch's global generator is left as it was.

    Args:
        agent: Kind of agent.
        agent_config: Its settings.
        family: The task family it learns in.
        seed: Draws the initial weights.
        env: An environment of the family to read sizes from; one world is built if not given.
    """
    dimensions = agent_dimensions(family, agent_config.episodes, env)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return agents.get(agent).build(agent_config, dimensions)


def agent_dimensions(family: Family, episodes: int, env: Env | None = None) -> Dimensions:
    """Return the sizes of what an agent of this family receives and does.

    Args:
        family: The task family.
        episodes: Episodes of a trial.
        env: An environment of the family to read the sizes from; one world is built if not given.
    """
    if env is None:
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


def pretrained_names() -> list[str]:
    """Return the names of the trained agents in the box."""
    return sorted(p.name for p in PRETRAINED_FOLDER.glob("*") if (p / "config.json").exists())


def publish_agent(run: Run, folder: Path, card: dict[str, Any]) -> None:
    """Copy a run's agent without its optimiser, with a card that says how it was made."""
    tensors, counters = run.checkpoint()
    agent_tensors = {k: v for k, v in tensors.items() if k.startswith("agent.")}
    save_checkpoint(folder, agent_tensors, counters)
    for name in ("config.json", "tasks.json"):
        write_json(folder / name, read_json(run.folder / name))
    write_json(folder / "card.json", card)


def one_line(error: Exception) -> str:
    """Return an error's message on one line, cut to a readable length."""
    return " ".join(str(error).split())[:_MAX_ERROR_LENGTH]
