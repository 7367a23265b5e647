"""Run folders: what a training writes, and what trained agents are loaded from.

A run folder holds ``config.json`` (the settings), ``tasks.json`` (the task space),
``metrics.jsonl``, and checkpoints (see ``metarobot.training.checkpoints``). Loading a folder runs
no code of it, and believes nothing in it unchecked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metarobot.env.base import Env
from metarobot.files import write_json
from metarobot.learning.agent_interface import Dimensions, Learner, agents
from metarobot.learning.finite_check import check_finite_weights
from metarobot.privacy import public_settings, without_folders
from metarobot.tasks.distributions import TaskError
from metarobot.tasks.family import Family, family_on
from metarobot.tasks.space import TaskSpace
from metarobot.training.checkpoints import (
    AGENT_PREFIX,
    check_weights,
    latest_entry,
    read_checkpoint,
    save_only_checkpoint,
)
from metarobot.training.config import TrainConfig, rollouts_of
from metarobot.training.run_files import (
    CheckpointError,
    check_config,
    checkpoint_data,
    one_line,
    read_sealed,
    read_settings,
    setting_entries,
    write_sealed,
)
from metarobot.training.run_lock import RunLock

FORMAT = 2
"""Format 1 had one checkpoint, and no hashes but that of its weights."""
KIND = "metarobot-run"
"""What a run's ``config.json`` says it is."""
PATH_SETTINGS = ("robot", "demos", "init")
"""Settings of a training that may be paths; a published agent has their last names."""
PRETRAINED_FOLDER = Path(str(resources.files("metarobot.agents"))) / "pretrained"


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

    @property
    def weights_sha256(self) -> str:
        """SHA-256 of the weights file that ``load_agent`` reads."""
        return read_checkpoint(self.folder).entry.sha256

    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Read the newest sound checkpoint: named tensors, and counters.

        Raises:
            CheckpointError: All are missing or damaged.
        """
        stored = read_checkpoint(self.folder)
        return stored.tensors(), checkpoint_data(stored.entry)

    def learner(self) -> Learner:
        """Build the untrained learner; the same seed gives the same initial weights."""
        return build_learner(self.agent, self.agent_config, self.family, self.train_config.seed)

    def load_agent(self) -> Any:
        """Build the trained agent, ready to act.

        Raises:
            CheckpointError: The checkpoint is damaged or belongs to another agent.
            DivergedError: It holds weights that are not finite.
        """
        agent = self.learner().agent
        stored = read_checkpoint(self.folder)
        try:
            check_weights(stored.data, agent.state_dict())
            # A checkpoint holds the learner's optimiser and normalisers too.
            weights = {
                name.removeprefix(AGENT_PREFIX): tensor
                for name, tensor in stored.tensors().items()
                if name.startswith(AGENT_PREFIX)
            }
            check_finite_weights(str(self.folder), weights)
            agent.load_state_dict(weights)
        except (CheckpointError, RuntimeError) as e:
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
    folder = find_folder(where)
    path = folder / "config.json"
    config = read_config(folder)
    try:
        family = family_on(config["family"], robot or config.get("robot", ""))
    except OSError as e:  # a path that no file can have
        raise CheckpointError(f"cannot read the robot of {folder}: {e.strerror or e}") from e
    kind = agents.get(config["agent"])
    agent_config = read_settings(path, kind.config, config["agent_config"])
    train_config = read_train_config(folder)
    _check_task_space(folder, family)
    return Run(folder, train_config, agent_config, family, config)


def find_folder(where: str | Path) -> Path:
    """Return a run folder, or that of a trained agent in the box by its name.

    Raises:
        CheckpointError: There is neither.
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
    return folder


def read_train_config(where: str | Path) -> TrainConfig:
    """Read the settings of a run's training alone, without its robot.

    Raises:
        CheckpointError: There is no such run, or it is damaged.
    """
    folder = find_folder(where)
    settings = setting_entries(read_config(folder))
    # Runs of before there was a choice were simulated on the CPU.
    return read_settings(folder / "config.json", TrainConfig, {"sim": "cpu", **settings})


def read_config(folder: Path) -> dict[str, Any]:
    """Read the ``config.json`` of a run folder; its settings are checked by ``read_settings``.

    Raises:
        CheckpointError: It is missing, damaged, or of something else than a run.
    """
    path = folder / "config.json"
    config = read_sealed(path)
    if config.get("kind") != KIND:
        raise CheckpointError(f"{folder} is not a metarobot run: its config.json does not say so")
    check_config(path, config)
    if config["format"] > FORMAT:
        raise CheckpointError(
            f"{folder} is of format {config['format']}, this metarobot reads up to {FORMAT}: "
            "upgrade metarobot"
        )
    return config


def _check_task_space(folder: Path, family: Family) -> None:
    """Check that a run was trained on the family's task space of today.

    Under another one its results would mean nothing.
    """
    path = folder / "tasks.json"
    try:
        data = read_sealed(path)
        space_hash = TaskSpace.from_json(data).hash
    except TaskError as e:
        raise CheckpointError(f"{path} is damaged: {one_line(e)}") from e
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} is damaged: it is no task space") from e
    if space_hash != family.space.hash:
        raise CheckpointError(
            f"{folder} was trained on task space {space_hash}, but {family.name}'s is "
            f"{family.space.hash} now"
        )


def create_run(
    folder: Path, config: TrainConfig, agent_config: Any, about: Mapping[str, Any]
) -> Run:
    """Write the run folder of a new training; ``about`` says what made it, as JSON data.

    The caller holds the folder's lock.

    Raises:
        CheckpointError: The folder holds a run already.
    """
    check_unused(folder)
    family = family_on(config.family, config.robot)
    write_json(folder / "tasks.json", family.space.to_json())
    write_sealed(
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
    """Write new values, such as more steps, into a run's ``config.json``.

    The caller holds the folder's lock.
    """
    write_sealed(run.folder / "config.json", {**run.config, **changes, "format": FORMAT})
    return open_run(run.folder)


def collected_steps(folder: Path) -> int:
    """Return the environment steps of a run folder's newest checkpoint; 0 if there is none yet."""
    entry = latest_entry(folder)
    return 0 if entry is None else entry.steps


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
    """Copy a run's agent without its optimiser, with a card that says how it was made.

    Raises:
        CheckpointError: A training is writing the folder.
    """
    if folder.resolve() == run.folder.resolve():
        raise CheckpointError(f"{folder} is the run itself: publish into another folder")
    tensors, counters = run.checkpoint()
    agent_tensors = {k: v for k, v in tensors.items() if k.startswith(AGENT_PREFIX)}
    with RunLock(folder):
        save_only_checkpoint(folder, agent_tensors, counters)
        write_sealed(folder / "config.json", public_settings(run.config, PATH_SETTINGS))
        write_json(folder / "tasks.json", run.family.space.to_json())
        write_sealed(folder / "card.json", _public_card(card))


def _public_card(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return a card whose texts hold no absolute path."""
    return {
        name: without_folders(value) if isinstance(value, str) else value
        for name, value in card.items()
    }
