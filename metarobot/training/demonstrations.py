"""Demonstrations: what a family's expert does, recorded and read as a Minari dataset, so that
others can bring theirs.

Every episode holds observations ``(time + 1, obs)`` and the actions ``(time, act)`` that the expert
asked for, and in ``infos`` the task it was shown in (``task``, its values) and which variant of its
episodes it is (``variant``).
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
from metarobot.training.run_folder import agent_dimensions
from metarobot.types import Rollout, Trials

AT_ONCE, ATTEMPTS = 256, 10
"""Episodes recorded side by side, and how often the expert may try before a task is left out."""


class DemosError(MetarobotError):
    """Demonstrations that cannot be recorded, read, or learned from."""


@dataclass(frozen=True, kw_only=True)
class Demonstrations:
    """Demonstrations of many tasks, as many of every variant of every task; shorter ones padded at
    the end.

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
        """Return the demonstrations ``shots`` ``(task, shot)`` of each variant as an episode.

        A task's worlds stand together, variant by variant.
        """
        rows = torch.as_tensor(tasks)[:, None, None]
        variants = torch.arange(self.obs.shape[1])[None, :, None]
        picked = (
            x[rows, variants, shots[:, None]].flatten(0, 2)
            for x in (self.obs, self.action, self.valid)
        )
        obs, action, valid = (x.transpose(0, 1) for x in picked)
        return demonstrated(obs, action, valid)

    def trials(self, tasks: int, shots: int, seed: Sequence[int]) -> Trials:
        """Draw tasks, and for each ``shots`` demonstrations of every variant to adapt to and as
        many to match.
        """
        if 2 * shots > self.shots:
            raise DemosError(
                f"{shots} demonstrations to adapt to and {shots} to match need {2 * shots} of every variant; "
                f"there are {self.shots}"
            )
        rng = np.random.default_rng(list(seed))
        chosen = rng.integers(len(self.tasks), size=tasks).tolist()
        order = torch.from_numpy(np.stack([rng.permutation(self.shots) for _ in chosen]))
        episodes = tuple(
            self.rollout(chosen, order[:, i * shots : (i + 1) * shots]) for i in range(2)
        )
        worlds = len(episodes[0].valid[0]) // tasks
        code = self.family.space.encode([self.tasks[i] for i in chosen])
        return Trials(episodes=episodes, task=code.repeat_interleave(worlds, 0))


def demonstrated(obs: Tensor, action: Tensor, valid: Tensor) -> Rollout:
    """Return demonstrations, ``(time, world, ...)``, as the episode of worlds that earn nothing."""
    none = torch.zeros(valid.shape, dtype=torch.bool)
    return Rollout(
        obs=obs,
        action=action,
        reward=torch.zeros(valid.shape),
        terminated=none,
        truncated=none,
        valid=valid,
        final_obs=obs[-1],
        critic_obs=torch.zeros(*valid.shape, 0),
        final_critic_obs=torch.zeros(valid.shape[1], 0),
        faulted=none[0],
        teacher_action=torch.zeros(*valid.shape, 0),
    )


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
    tick: Callable[[int], None] = lambda _: None,
) -> int:
    """Record the expert in tasks of a split, ``shots`` successful demonstrations of every variant;
    return how many.

    What is done is the expert's action with normal noise of deviation ``jitter``, what is recorded
    is the action it asked for: whoever imitates it sees how to come back (DART, Laskey et al.
    2017). ``tick`` is called with the number of episodes written so far.
    """
    _minari()
    if out.exists():
        raise DemosError(f"{out} is there already; choose another place")
    if tasks < 1 or shots < 1 or not 0 <= jitter < 10:
        raise DemosError(
            f"tasks and shots must be at least 1 and jitter between 0 and 10: {tasks}, {shots}, {jitter:g}"
        )
    wanted = family.space.sample(split, tasks, seed)
    each, buffers = family.interaction.variants * shots, []
    group = max(1, AT_ONCE // each)
    for first in range(0, tasks, group):
        buffers += _recorded(
            family, wanted[first : first + group], shots, [seed, first], jitter, threads
        )
        tick(len(buffers))
    if not buffers:
        raise DemosError(
            f"the expert fails again and again in {family.name}: {wanted[0].describe()}"
        )
    try:
        _write(family, split, out, buffers)
    except OSError as e:
        raise DemosError(f"cannot write {out}: {e.strerror or e}") from e
    return len(buffers)


def _recorded(
    family: Family,
    tasks: Sequence[Task],
    shots: int,
    seed: Sequence[int],
    jitter: float,
    threads: int,
) -> list[dict[str, Any]]:
    """Let the expert succeed ``shots`` times in every variant of every task; try again where it
    failed.

    Tasks in which it never does are left out; more than a few of them are an error.
    """
    missing = [
        (t, v)
        for t in range(len(tasks))
        for v in range(family.interaction.variants)
        for _ in range(shots)
    ]
    done: list[dict[str, Any]] = []
    for attempt in range(ATTEMPTS):
        if not missing:
            break
        key = int(np.random.SeedSequence([*seed, attempt]).generate_state(1)[0])
        worlds = [tasks[t] for t, _ in missing]
        env = Env(family, worlds, threads=threads)
        rollout = _demonstrate(env, worlds, torch.tensor([v for _, v in missing]), key, jitter)
        won = (
            rollout.terms["success"] > 0
            if "success" in rollout.terms
            else torch.ones(len(worlds), dtype=torch.bool)
        )
        for i, (t, v) in enumerate(missing):
            if won[i]:
                steps = int(rollout.valid[:, i].sum())
                obs = torch.cat([rollout.obs[:steps, i], rollout.final_obs[i : i + 1]])
                shown = {"obs": obs.numpy(), "action": rollout.action[:steps, i].numpy()}
                done.append(
                    {
                        **shown,
                        "name": tasks[t],
                        "task": [x for _, x in tasks[t].values],
                        "variant": v,
                    }
                )
        missing = [m for m, ok in zip(missing, won.tolist(), strict=True) if not ok]
    failed = {tasks[t] for t, _ in missing}
    if len(failed) > max(1, len(tasks) // 20):
        raise DemosError(
            f"the expert fails again and again in {family.name}: {tasks[missing[0][0]].describe()}"
        )
    return [d for d in done if d["name"] not in failed]


def _demonstrate(
    env: Env, tasks: Sequence[Task], variant: Tensor, seed: int, jitter: float
) -> Rollout:
    """Let the expert live one episode of these variants; the rollout's actions are those it asked
    for.
    """
    expert = ExpertAgent(env, jitter)
    episode = collect(expert, env, tasks, episodes=1, seed=seed, variant=variant).episodes[0]
    return replace(episode, action=torch.stack(expert.asked))


def _write(family: Family, split: str, out: Path, demos: Sequence[dict[str, Any]]) -> None:
    """Write a Minari dataset beside its place and move it there when it is whole."""
    minari, spaces = _minari(), _spaces(family.name)
    buffer = [
        minari.data_collector.EpisodeBuffer(
            id=i,
            observations=d["obs"],
            actions=d["action"],
            rewards=np.zeros(len(d["action"])),
            terminations=np.arange(len(d["action"])) == len(d["action"]) - 1,
            truncations=np.zeros(len(d["action"]), dtype=bool),
            infos={
                "task": np.repeat([d["task"]], len(d["obs"]), 0),
                "variant": np.full(len(d["obs"]), d["variant"]),
            },
        )
        for i, d in enumerate(demos)
    ]
    meta = {
        "family": family.name,
        "split": split,
        "space": family.space.hash,
        "parameters": family.space.names,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=out.parent.resolve(), prefix=".demos-") as folder,
        _root(folder),
    ):
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", category=UserWarning, module="minari"
            )  # no author, no Gymnasium id
            minari.create_dataset_from_buffers(
                "demos-v0",
                buffer,
                observation_space=spaces[0],
                action_space=spaces[1],
                description=json.dumps(meta),
            )
        shutil.move(Path(folder) / "demos-v0", out)


def read_demonstrations(path: Path, family: Family | None = None) -> Demonstrations:
    """Read a Minari dataset of demonstrations; ``family``, if given, is the one they must be of."""
    minari = _minari()
    if not (path / "data").is_dir():
        raise DemosError(f"{path} holds no Minari dataset: it has no folder called data")
    try:
        dataset = minari.MinariDataset(path / "data")
        meta = _meta(dataset.storage.metadata.get("description"))
        episodes = list(dataset.iterate_episodes())
    except Exception as e:  # whatever a damaged file makes HDF5 raise
        raise DemosError(
            f"{path} is no dataset that Minari reads: {' '.join(str(e).split())[:200]}"
        ) from e
    said = str(meta.get("family", ""))
    if family is None:
        family = families.get(said)
    if said not in ("", family.name):
        raise DemosError(f"{path} holds demonstrations of {said}, not of {family.name}")
    if not episodes:
        raise DemosError(f"{path} holds no demonstrations")
    groups: dict[tuple[tuple[float, ...], int], list[Any]] = defaultdict(list)
    for episode in episodes:
        groups[_checked(path, episode, family)].append(episode)
    return _gather(path, family, str(meta.get("split", "")), groups)


def _meta(description: Any) -> dict[str, Any]:
    """Return what we wrote of a dataset; others describe theirs in words, which say nothing to
    us.
    """
    try:
        meta = json.loads(description or "{}")
    except ValueError:
        return {}
    return meta if isinstance(meta, dict) else {}


def _checked(path: Path, episode: Any, family: Family) -> tuple[tuple[float, ...], int]:
    """Return an episode's task values and variant, or say what is wrong with it."""
    where, env = f"{path}, episode {episode.id}", _spaces(family.name)
    obs, action, infos = episode.observations, episode.actions, episode.infos or {}
    for name, array, space in (("observations", obs, env[0]), ("actions", action, env[1])):
        if not isinstance(array, np.ndarray) or array.ndim != 2 or array.shape[1] != space.shape[0]:
            shape = getattr(array, "shape", type(array).__name__)
            raise DemosError(
                f"{where}: {name} of {family.name} have {space.shape[0]} columns, these are {shape}"
            )
        if not np.isfinite(array).all():
            raise DemosError(f"{where}: not all {name} are finite numbers")
    if len(action) < 2 or len(obs) < len(action):
        raise DemosError(
            f"{where} has {len(obs)} observations and {len(action)} actions; it takes at least 2 steps"
        )
    for key in ("task", "variant"):
        if key not in infos:
            raise DemosError(
                f"{where}: infos lack {key!r}; they have: {', '.join(infos) or 'nothing'}"
            )
    task, variant = np.asarray(infos["task"]), np.asarray(infos["variant"])
    if task.ndim != 2 or variant.ndim != 1 or not len(task) or not len(variant):
        raise DemosError(
            f"{where}: infos hold a task and a variant a step, these are {task.shape} and {variant.shape}"
        )
    if task.shape[1] != len(family.space.names):
        raise DemosError(
            f"{where}: {task.shape[1]} task values, but {family.name} has {len(family.space.names)}"
        )
    if variant[0] not in range(family.interaction.variants):
        raise DemosError(
            f"{where}: variant {variant[0]}, but {family.name} has 0 to {family.interaction.variants - 1}"
        )
    return tuple(float(x) for x in task[0]), int(variant[0])


def _gather(path: Path, family: Family, split: str, groups: dict[Any, list[Any]]) -> Demonstrations:
    """Stack demonstrations by task and variant."""
    tasks, variants = list(dict.fromkeys(t for t, _ in groups)), family.interaction.variants
    shots = min(len(groups.get((t, v), ())) for t in tasks for v in range(variants))
    if shots < 1:
        raise DemosError(
            f"{path}: some tasks lack demonstrations of some of the {variants} variants"
        )
    longest = max(len(e.actions) for group in groups.values() for e in group)
    shape = (len(tasks), variants, shots, longest)
    obs = torch.zeros(*shape, groups[tasks[0], 0][0].observations.shape[1])
    action = torch.zeros(*shape, groups[tasks[0], 0][0].actions.shape[1])
    valid = torch.zeros(*shape, dtype=torch.bool)
    for t, task in enumerate(tasks):
        for v in range(variants):
            for s, e in enumerate(groups[task, v][:shots]):
                n = len(e.actions)
                obs[t, v, s, :n] = torch.from_numpy(e.observations[:n])
                action[t, v, s, :n] = torch.from_numpy(e.actions)
                valid[t, v, s, :n] = True
    named = tuple(family.space.coerce(dict(zip(family.space.names, t, strict=True))) for t in tasks)
    return Demonstrations(
        family=family, split=split, tasks=named, obs=obs, action=action, valid=valid
    )


@cache
def _spaces(family: str) -> tuple[Any, Any]:
    """Return the spaces of observations and of actions as the expert asks for them."""
    from gymnasium.spaces import Box

    shapes = agent_dimensions(families.get(family), 1)
    return Box(-np.inf, np.inf, (shapes.obs,), np.float32), Box(
        -np.inf, np.inf, (shapes.act,), np.float32
    )


@contextmanager
def _root(folder: str) -> Iterator[None]:
    """Let Minari write into a folder."""
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = folder
    try:
        yield
    finally:
        if before is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = before


def _minari() -> Any:
    try:
        import minari
        import minari.data_collector
    except ImportError as e:
        raise DemosError("demonstrations need packages: pip install 'metarobot[demos]'") from e
    return minari
