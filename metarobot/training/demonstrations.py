"""Demonstrations: a family's expert, recorded and read as a Minari dataset.

Others can bring datasets of their own. Every episode holds observations ``(time + 1, obs)`` and the
actions ``(time, act)`` that the expert asked for, and in ``infos`` the task (``task``, its values)
and which variant of its episodes it is (``variant``), repeated at every step.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metarobot.env.base import Env
from metarobot.errors import MetarobotError
from metarobot.tasks.family import Family, families
from metarobot.tasks.space import Task
from metarobot.training.collect import ExpertAgent, collect
from metarobot.training.minari_folder import StoredEpisode, printable_line, read_minari_folder
from metarobot.training.run_folder import agent_dimensions
from metarobot.types import Rollout, Trials

MAX_WORLDS = 256
"""Episodes recorded side by side."""
MAX_ATTEMPTS = 10
"""How often the expert may try before a task is left out."""
MAX_LEFT_OUT = 1 / 20
"""Share of tasks that may be left out; one task always may."""
MAX_JITTER = 10.0
"""Standard deviation of the noise on the expert's actions."""

TaskValues = tuple[float, ...]
"""Values of a task's parameters, in the order of the task space."""


class DemosError(MetarobotError):
    """Demonstrations that cannot be recorded, read, or learned from."""


@dataclass(frozen=True, kw_only=True)
class Demonstrations:
    """Demonstrations of many tasks, equally many of every variant; shorter ones are padded.

    Shapes: obs ``(task, variant, shot, time, obs)``; action ``(task, variant, shot, time, act)``;
    valid ``(task, variant, shot, time)``.
    """

    family: Family
    split: str
    tasks: tuple[Task, ...]
    obs: Tensor
    action: Tensor
    valid: Tensor

    @property
    def shots(self) -> int:
        """Demonstrations of every variant of a task."""
        return self.obs.shape[2]

    def rollout(self, tasks: Sequence[int], shots: Tensor) -> Rollout:
        """Return chosen demonstrations of every variant as one episode.

        Args:
            tasks: Indices of the tasks.
            shots: Indices of the demonstrations of each variant, ``(task, shot)``.

        Returns:
            A rollout whose worlds are (task, variant, shot), the last one fastest.
        """
        task_index = torch.as_tensor(tasks)[:, None, None]
        variant_index = torch.arange(self.obs.shape[1])[None, :, None]
        shot_index = shots[:, None]

        def select(values: Tensor) -> Tensor:
            """Return ``(time, world, ...)``."""
            return values[task_index, variant_index, shot_index].flatten(0, 2).transpose(0, 1)

        return demonstration_rollout(select(self.obs), select(self.action), select(self.valid))

    def trials(self, tasks: int, shots: int, seed: Sequence[int]) -> Trials:
        """Draw tasks, and demonstrations of each: an episode to adapt to and one to imitate.

        Args:
            tasks: Number of tasks.
            shots: Demonstrations of every variant in an episode; no demonstration is in both.
            seed: Keys the draws.

        Raises:
            DemosError: There are too few demonstrations.
        """
        if 2 * shots > self.shots:
            raise DemosError(
                f"{shots} demonstrations to adapt to and {shots} to match need {2 * shots} of "
                f"every variant; there are {self.shots}"
            )
        rng = np.random.default_rng(list(seed))
        chosen = rng.integers(len(self.tasks), size=tasks).tolist()
        order = torch.from_numpy(np.stack([rng.permutation(self.shots) for _ in chosen]))
        support = self.rollout(chosen, order[:, :shots])
        query = self.rollout(chosen, order[:, shots : 2 * shots])

        worlds_per_task = support.valid.shape[1] // tasks
        encoded = self.family.space.encode([self.tasks[i] for i in chosen])
        task = encoded.repeat_interleave(worlds_per_task, 0)
        return Trials(episodes=(support, query), task=task)


def demonstration_rollout(obs: Tensor, action: Tensor, valid: Tensor) -> Rollout:
    """Return demonstrations, ``(time, world, ...)``, as the episode of worlds without reward."""
    never = torch.zeros(valid.shape, dtype=torch.bool)
    return Rollout(
        obs=obs,
        action=action,
        reward=torch.zeros(valid.shape),
        terminated=never,
        truncated=never,
        valid=valid,
        final_obs=obs[-1],
        critic_obs=torch.zeros(*valid.shape, 0),
        final_critic_obs=torch.zeros(valid.shape[1], 0),
        faulted=never[0],
        teacher_action=torch.zeros(*valid.shape, 0),
    )


# ---------------------------------------------------------------------------------------------
# Recording
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RecordedEpisode:
    """One successful demonstration."""

    task: Task
    variant: int
    obs: Tensor
    """``(time + 1, obs)``."""
    action: Tensor
    """What the expert asked for, ``(time, act)``."""


def record_demonstrations(
    family: Family,
    out: Path,
    *,
    split: str = "train",
    tasks: int = 100,
    shots: int = 2,
    seed: int = 0,
    jitter: float = 0.0,
    threads: int = 0,
    tick: Callable[[int], None] = lambda written: None,
) -> int:
    """Record successful demonstrations of a family's expert and return how many there are.

    The expert's actions are executed with noise, but recorded without it: whoever imitates it
    learns to come back (DART, Laskey et al. 2017).

    Args:
        family: A family with an expert.
        out: Folder to write the dataset to.
        split: Split that tasks are drawn from.
        tasks: Number of tasks.
        shots: Demonstrations of every variant of a task.
        seed: Draws tasks, starts and noise.
        jitter: Standard deviation of the normal noise on the expert's actions.
        threads: Physics threads; 0 takes all there are.
        tick: Called with the number of episodes recorded so far.

    Raises:
        DemosError: A number out of range, a place that is taken, or an expert that keeps failing.
    """
    _import_minari()
    if out.exists():
        raise DemosError(f"{out} is there already; choose another place")
    if tasks < 1 or shots < 1 or not 0 <= jitter < MAX_JITTER:
        raise DemosError(
            f"tasks and shots must be at least 1 and jitter between 0 and {MAX_JITTER:g}: "
            f"{tasks}, {shots}, {jitter:g}"
        )

    chosen = family.space.sample(split, tasks, seed)
    tasks_at_once = max(1, MAX_WORLDS // (family.interaction.variants * shots))
    recorded: list[RecordedEpisode] = []
    for first in range(0, tasks, tasks_at_once):
        group = chosen[first : first + tasks_at_once]
        recorded += _record_tasks(family, group, shots, [seed, first], jitter, threads)
        tick(len(recorded))
    if not recorded:
        raise _expert_fails(family, chosen[0])

    try:
        _write_dataset(family, split, out, recorded)
    except OSError as e:
        raise DemosError(f"cannot write {out}: {e.strerror or e}") from e
    return len(recorded)


def _expert_fails(family: Family, task: Task) -> DemosError:
    return DemosError(f"the expert fails again and again in {family.name}: {task.describe()}")


def _record_tasks(
    family: Family,
    tasks: Sequence[Task],
    shots: int,
    seed: Sequence[int],
    jitter: float,
    threads: int,
) -> list[RecordedEpisode]:
    """Record ``shots`` successes in every variant of every task, trying again after failures.

    Raises:
        DemosError: The expert keeps failing in more tasks than may be left out.
    """
    # What is still to be recorded: (index of the task, variant), once for each shot.
    missing = [
        (task, variant)
        for task in range(len(tasks))
        for variant in range(family.interaction.variants)
        for _ in range(shots)
    ]
    recorded: list[RecordedEpisode] = []
    for attempt in range(MAX_ATTEMPTS):
        if not missing:
            break
        key = int(np.random.SeedSequence([*seed, attempt]).generate_state(1)[0])
        world_tasks = [tasks[task] for task, _ in missing]
        variants = torch.tensor([variant for _, variant in missing])
        env = Env(family, world_tasks, threads=threads)
        rollout = _demonstrate(env, world_tasks, variants, key, jitter)

        if "success" in rollout.terms:
            succeeded = (rollout.terms["success"] > 0).tolist()
        else:
            succeeded = [True] * len(missing)
        still_missing = []
        for world, (task, variant) in enumerate(missing):
            if succeeded[world]:
                recorded.append(_cut_out(rollout, world, tasks[task], variant))
            else:
                still_missing.append((task, variant))
        missing = still_missing

    left_out = {tasks[task] for task, _ in missing}
    if len(left_out) > max(1, int(len(tasks) * MAX_LEFT_OUT)):
        raise _expert_fails(family, tasks[missing[0][0]])
    return [episode for episode in recorded if episode.task not in left_out]


def _demonstrate(
    env: Env, tasks: Sequence[Task], variant: Tensor, seed: int, jitter: float
) -> Rollout:
    """Let the expert act one episode; the rollout's actions are those it asked for."""
    expert = ExpertAgent(env, jitter)
    episode = collect(expert, env, tasks, episodes=1, seed=seed, variant=variant).episodes[0]
    return replace(episode, action=torch.stack(expert.asked))


def _cut_out(rollout: Rollout, world: int, task: Task, variant: int) -> RecordedEpisode:
    """Return one world's episode without its padding."""
    steps = int(rollout.valid[:, world].sum())
    final_obs = rollout.final_obs[world : world + 1]
    return RecordedEpisode(
        task=task,
        variant=variant,
        obs=torch.cat([rollout.obs[:steps, world], final_obs]),
        action=rollout.action[:steps, world],
    )


def _write_dataset(
    family: Family, split: str, out: Path, episodes: Sequence[RecordedEpisode]
) -> None:
    """Write a Minari dataset beside its place, and move it there when it is whole."""
    minari = _import_minari()
    observation_space, action_space = _spaces(family.name)
    buffers = [_episode_buffer(minari, i, episode) for i, episode in enumerate(episodes)]
    description = {
        "family": family.name,
        "split": split,
        "space": family.space.hash,
        "parameters": family.space.names,
    }

    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=out.parent.resolve(), prefix=".demos-") as folder,
        _minari_root(folder),
        warnings.catch_warnings(),
    ):
        # Minari warns that the dataset names no author and no Gymnasium id.
        warnings.filterwarnings("ignore", category=UserWarning, module="minari")
        minari.create_dataset_from_buffers(
            "demos-v0",
            buffers,
            observation_space=observation_space,
            action_space=action_space,
            description=json.dumps(description),
        )
        shutil.move(Path(folder) / "demos-v0", out)


def _episode_buffer(minari: Any, i: int, episode: RecordedEpisode) -> Any:
    """Return an episode as Minari stores it."""
    steps = len(episode.action)
    task_values = [value for _, value in episode.task.values]
    return minari.data_collector.EpisodeBuffer(
        id=i,
        observations=episode.obs.numpy(),
        actions=episode.action.numpy(),
        rewards=np.zeros(steps),
        terminations=np.arange(steps) == steps - 1,
        truncations=np.zeros(steps, dtype=bool),
        infos={
            "task": np.repeat([task_values], steps + 1, 0),
            "variant": np.full(steps + 1, episode.variant),
        },
    )


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------


def read_demonstrations(path: Path, family: Family | None = None) -> Demonstrations:
    """Read a Minari dataset of demonstrations, which a stranger may have made.

    Args:
        path: Folder of the dataset.
        family: The family they must be of; the one that the dataset names if not given.

    Raises:
        DemosError: There is no dataset, it is damaged, of another family, or incomplete.
    """
    minari = _import_minari()
    if not (path / "data").is_dir():
        raise DemosError(f"{path} holds no Minari dataset: it has no folder called data")
    try:
        description, episodes = read_minari_folder(path, minari.supported_dataset_versions)
    except Exception as e:  # whatever a damaged file makes HDF5 raise
        raise DemosError(f"{path} is no dataset that Minari reads: {printable_line(e)}") from e

    family_name = str(description.get("family", ""))
    if family is None:
        family = families.get(family_name)
    if family_name not in ("", family.name):
        raise DemosError(f"{path} holds demonstrations of {family_name}, not of {family.name}")
    if not episodes:
        raise DemosError(f"{path} holds no demonstrations")

    groups: dict[tuple[TaskValues, int], list[StoredEpisode]] = defaultdict(list)
    for episode in episodes:
        groups[_check_episode(path, episode, family)].append(episode)
    return _stack_episodes(path, family, str(description.get("split", "")), groups)


def _check_episode(path: Path, episode: StoredEpisode, family: Family) -> tuple[TaskValues, int]:
    """Return an episode's task values and variant.

    Raises:
        DemosError: Something is missing, or has another shape than the family's.
    """
    where = f"{path}, episode {episode.id}"
    observation_space, action_space = _spaces(family.name)
    obs = episode.observations
    action = episode.actions
    infos = episode.infos

    columns = (("observations", obs, observation_space), ("actions", action, action_space))
    for name, array, space in columns:
        width = space.shape[0]
        if array.ndim != 2 or array.shape[1] != width:
            raise DemosError(
                f"{where}: {name} of {family.name} have {width} columns, these are {array.shape}"
            )
        if not np.isfinite(array).all():
            raise DemosError(f"{where}: not all {name} are finite numbers")
    if len(action) < 2 or len(obs) < len(action):
        raise DemosError(
            f"{where} has {len(obs)} observations and {len(action)} actions; "
            "it takes at least 2 steps"
        )

    for key in ("task", "variant"):
        if key not in infos:
            existing = printable_line(", ".join(episode.info_names)) or "nothing"
            raise DemosError(f"{where}: infos lack {key!r}; they have: {existing}")
    task = infos["task"]
    variant = infos["variant"]
    if task.ndim != 2 or variant.ndim != 1 or not len(task) or not len(variant):
        raise DemosError(
            f"{where}: infos hold a task and a variant a step, these are {task.shape} and "
            f"{variant.shape}"
        )
    if task.shape[1] != len(family.space.names):
        raise DemosError(
            f"{where}: {task.shape[1]} task values, but {family.name} has {len(family.space.names)}"
        )
    variants = family.interaction.variants
    if variant[0] not in range(variants):
        raise DemosError(
            f"{where}: variant {variant[0]}, but {family.name} has 0 to {variants - 1}"
        )
    return tuple(float(value) for value in task[0]), int(variant[0])


def _stack_episodes(
    path: Path,
    family: Family,
    split: str,
    groups: dict[tuple[TaskValues, int], list[StoredEpisode]],
) -> Demonstrations:
    """Stack episodes by task and variant, as many of each as the rarest has.

    Raises:
        DemosError: A variant of a task has none.
    """
    tasks = list(dict.fromkeys(task for task, _ in groups))  # each once, in this order
    variants = family.interaction.variants
    shots = min(len(groups.get((t, v), ())) for t in tasks for v in range(variants))
    if shots < 1:
        raise DemosError(
            f"{path}: some tasks lack demonstrations of some of the {variants} variants"
        )

    longest = max(len(episode.actions) for group in groups.values() for episode in group)
    shape = (len(tasks), variants, shots, longest)
    example = groups[tasks[0], 0][0]
    obs = torch.zeros(*shape, example.observations.shape[1])
    action = torch.zeros(*shape, example.actions.shape[1])
    valid = torch.zeros(*shape, dtype=torch.bool)
    for t, task in enumerate(tasks):
        for v in range(variants):
            for s, episode in enumerate(groups[task, v][:shots]):
                steps = len(episode.actions)
                obs[t, v, s, :steps] = torch.from_numpy(episode.observations[:steps])
                action[t, v, s, :steps] = torch.from_numpy(episode.actions)
                valid[t, v, s, :steps] = True

    names = family.space.names
    named_tasks = tuple(
        family.space.coerce(dict(zip(names, values, strict=True))) for values in tasks
    )
    return Demonstrations(
        family=family, split=split, tasks=named_tasks, obs=obs, action=action, valid=valid
    )


@cache
def _spaces(family: str) -> tuple[Any, Any]:
    """Return the spaces of a family's observations, and of its actions before any clip."""
    from gymnasium.spaces import Box

    dimensions = agent_dimensions(families.get(family), 1)
    observation_space = Box(-np.inf, np.inf, (dimensions.obs,), np.float32)
    action_space = Box(-np.inf, np.inf, (dimensions.act,), np.float32)
    return observation_space, action_space


@contextmanager
def _minari_root(folder: str) -> Iterator[None]:
    """Let Minari write into a folder."""
    variable = "MINARI_DATASETS_PATH"
    before = os.environ.get(variable)
    os.environ[variable] = folder
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def _import_minari() -> Any:
    try:
        import minari
        import minari.data_collector
    except ImportError as e:
        raise DemosError("demonstrations need packages: pip install 'metarobot[demos]'") from e
    return minari
