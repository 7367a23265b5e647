import json
import os
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import minari
import numpy as np
import pytest
import torch
from dataset_fuzzing import fuzz_datasets
from gymnasium.spaces import Box
from minari.data_collector import EpisodeBuffer
from torch import Tensor

from metarobot.env.base import Env
from metarobot.errors import MetarobotError
from metarobot.tasks.family import WorldState, families
from metarobot.training import demonstrations as module
from metarobot.training.demonstrations import DemosError, read_demonstrations, record_demonstrations
from metarobot.types import Trials

PLACEMENT = families.get("Placement")
TASKS, VARIANTS, SHOTS, JITTER = 3, 4, 2, 0.1
META = {"family": "Placement", "split": "extrapolate"}


@dataclass
class Made:
    """A recorded dataset, and how it came about: every attempt's tasks, settings and trials."""

    path: Path
    count: int = 0
    lived: list[tuple[Any, dict[str, Any], Trials]] = field(default_factory=list)
    asked: list[Tensor] = field(default_factory=list)


def made(path: Path, **settings: Any) -> Made:
    """Record, and watch it being done."""
    one, real = Made(path), module.collect

    def watched(agent: Any, env: Env, tasks: Any, **how: Any) -> Trials:
        one.lived.append((tasks, how, real(agent, env, tasks, **how)))
        return one.lived[-1][2]

    def program(state: WorldState) -> Tensor:
        one.asked.append(PLACEMENT.teaching.expert(state))
        return one.asked[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "collect", watched)
        usual = {"tasks": TASKS, "shots": SHOTS, "seed": 4, "threads": 1}
        one.count = record_demonstrations(
            PLACEMENT.replace(expert=program), path, **usual | settings
        )
    return one


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return made(tmp_path_factory.mktemp("demos") / "some" / "where" / "calm")


@pytest.fixture(scope="module")
def shaken(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return made(tmp_path_factory.mktemp("demos") / "shaken", jitter=JITTER)


def won(one: Made) -> dict[Any, list[tuple[Tensor, Tensor, Tensor]]]:
    """What was lived with success by (task, variant), in order: observations, the last one, and
    what was executed."""
    found = defaultdict(list)
    for tasks, how, trials in one.lived:
        (episode,) = trials.episodes
        for i, (task, variant) in enumerate(zip(tasks, how["variant"].tolist(), strict=True)):
            if episode.terms["success"][i] == 1:
                valid = episode.valid[:, i]
                found[task, variant].append(
                    (episode.obs[valid, i], episode.final_obs[i], episode.action[valid, i])
                )
    return found


def test_what_was_recorded_is_read_back_to_the_bit(calm: Made) -> None:
    demos, lived = read_demonstrations(calm.path), won(calm)
    assert calm.count == TASKS * VARIANTS * SHOTS
    assert (demos.family, demos.split, demos.shots) == (PLACEMENT, "train", SHOTS)
    assert list(demos.tasks) == PLACEMENT.space.sample("train", TASKS, 4)
    assert (
        demos.obs.shape[:3]
        == demos.action.shape[:3]
        == demos.valid.shape[:3]
        == (TASKS, VARIANTS, SHOTS)
    )
    for t, task in enumerate(demos.tasks):
        for v in range(VARIANTS):
            assert len(lived[task, v]) == SHOTS
            for s, (obs, _, action) in enumerate(lived[task, v]):
                valid, n = demos.valid[t, v, s], len(action)
                assert valid.tolist() == [True] * n + [False] * (len(valid) - n)
                assert torch.equal(demos.obs[t, v, s, :n], obs)
                assert torch.equal(demos.action[t, v, s, :n], action)
                assert not demos.obs[t, v, s, n:].any()
                assert not demos.action[t, v, s, n:].any()
    assert demos.valid.any(0).flatten(0, 1).all(1).any()


def test_minari_itself_reads_the_dataset(calm: Made) -> None:
    dataset, demos, lived = (
        minari.MinariDataset(calm.path / "data"),
        read_demonstrations(calm.path),
        won(calm),
    )
    assert dataset.total_episodes == calm.count
    assert dataset.total_steps == int(demos.valid.sum())
    assert dataset.observation_space.shape == (len(PLACEMENT.observations),)
    assert dataset.action_space.shape == (6,)
    seen = defaultdict(int)
    for episode in dataset.iterate_episodes():
        task = PLACEMENT.space.coerce(
            dict(zip(PLACEMENT.space.names, episode.infos["task"][0], strict=True))
        )
        variant = int(episode.infos["variant"][0])
        obs, last, action = lived[task, variant][seen[task, variant]]
        seen[task, variant] += 1
        n = len(action)
        assert len(episode) == len(episode.rewards) == n
        assert np.array_equal(episode.actions, action)
        assert np.array_equal(episode.observations, torch.cat([obs, last[None]]))
        assert episode.terminations.tolist() == [False] * (n - 1) + [True]
        assert not episode.truncations.any()
        assert (episode.infos["task"] == episode.infos["task"][0]).all()
        assert len(episode.infos["task"]) == len(episode.infos["variant"]) == n + 1
        assert (episode.infos["variant"] == variant).all()
    assert set(seen.values()) == {SHOTS}
    assert len(seen) == TASKS * VARIANTS


def test_recorded_actions_done_again_succeed_as_they_did(calm: Made) -> None:
    (tasks, how, _), *more = calm.lived
    assert not more
    env, demos = Env(PLACEMENT, tasks, threads=1), read_demonstrations(calm.path)
    env.reset(how["seed"])
    obs, alive = env.set_variant(how["variant"]), torch.ones(len(tasks), dtype=torch.bool)
    done = torch.zeros(len(tasks)).double()
    shown = demos.rollout(range(TASKS), torch.arange(SHOTS).expand(TASKS, SHOTS))
    for k in range(len(shown.valid)):
        assert torch.equal(shown.valid[k], alive)
        assert torch.equal(obs[alive], shown.obs[k, alive])
        step = env.step(shown.action[k], alive)
        done += step.terms["success"] * alive
        obs, alive = step.obs, alive & ~(step.terminated | step.truncated)
    assert not alive.any()
    assert (done == 1).all()


def test_with_jitter_what_was_asked_for_is_recorded_and_not_what_was_done(
    shaken: Made, calm: Made
) -> None:
    demos, still, lived = (
        read_demonstrations(shaken.path),
        read_demonstrations(calm.path),
        won(shaken),
    )
    assert demos.tasks == still.tasks
    off = [
        executed - demos.action[t, v, s, : len(executed)]
        for t, task in enumerate(demos.tasks)
        for v in range(VARIANTS)
        for s, (_, _, executed) in enumerate(lived[task, v])
    ]
    assert len(off) == TASKS * VARIANTS * SHOTS
    assert float(torch.cat(off).std()) == pytest.approx(JITTER, rel=0.05)
    assert torch.cat(off).mean(0).abs().max() < 0.05
    asked = {tuple(x) for x in torch.cat(shaken.asked).float().tolist()}
    assert asked.issuperset(tuple(x) for x in demos.action[demos.valid].tolist())
    assert demos.action[demos.valid][:, 4].unique().tolist() == [-1, 1]
    first = [shaken.lived[0][2].episodes[0], calm.lived[0][2].episodes[0]]
    assert torch.equal(first[0].obs[0], first[1].obs[0])
    assert torch.equal(shaken.asked[0], calm.asked[0])
    assert not torch.equal(first[0].obs[1], first[1].obs[1])


def test_the_same_seed_gives_the_same_dataset(calm: Made, tmp_path: Path) -> None:
    again = read_demonstrations(made(tmp_path / "again", threads=2).path)
    first = read_demonstrations(calm.path)
    assert again.tasks == first.tasks
    for name in ("obs", "action", "valid"):
        assert torch.equal(getattr(again, name), getattr(first, name)), name
    assert set(
        read_demonstrations(made(tmp_path / "other", seed=5, tasks=1, shots=1).path).tasks
    ).isdisjoint(first.tasks)


def test_many_tasks_of_a_split_are_recorded_group_by_group(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "MAX_WORLDS", VARIANTS)
    said: list[int] = []
    one = made(tmp_path / "x", split="extrapolate", shots=1, tick=said.append)
    assert said == [4, 8, 12]
    assert len({how["seed"] for _, how, _ in one.lived}) == len(one.lived) >= TASKS
    demos = read_demonstrations(one.path)
    assert demos.split == "extrapolate"
    assert list(demos.tasks) == PLACEMENT.space.sample("extrapolate", TASKS, 4)


def failing(where: Callable[[WorldState], Tensor]) -> Any:
    """Placement with an expert that does nothing in some worlds."""
    return PLACEMENT.replace(
        expert=lambda state: PLACEMENT.teaching.expert(state) * ~where(state)[:, None]
    )


def test_where_the_expert_fails_it_tries_again_from_another_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seeds, real = [], module.collect
    monkeypatch.setattr(
        module, "collect", lambda *x, **how: (seeds.append(how["seed"]), real(*x, **how))[1]
    )
    family = failing(lambda state: (state.variant < 2) & (len(seeds) == 1))
    assert (
        record_demonstrations(family, tmp_path / "x", tasks=1, shots=2, threads=1) == 2 * VARIANTS
    )
    assert len(set(seeds)) == len(seeds) == 2
    first = read_demonstrations(tmp_path / "x").obs[0, :, :, 0]
    assert len(first.flatten(0, 1).unique(dim=0)) == 2 * VARIANTS


def test_a_task_in_which_the_expert_always_fails_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "MAX_ATTEMPTS", 2)
    tasks = PLACEMENT.space.sample("train", 3, 0)
    family = failing(lambda state: state.task["order"] == tasks[1]["order"])
    assert (
        record_demonstrations(family, tmp_path / "x", tasks=3, shots=1, threads=1) == 2 * VARIANTS
    )
    assert list(read_demonstrations(tmp_path / "x").tasks) == [tasks[0], tasks[2]]


@pytest.mark.parametrize("tasks", [1, 2])
def test_an_expert_that_always_fails_is_an_error_and_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tasks: int
) -> None:
    monkeypatch.setattr(module, "MAX_ATTEMPTS", 1)
    with pytest.raises(
        DemosError, match=r"the expert fails again and again in Placement: class_0 .*, order \d"
    ):
        record_demonstrations(
            failing(lambda state: state.variant == 2),
            tmp_path / "x",
            tasks=tasks,
            shots=1,
            threads=1,
        )
    assert not list(tmp_path.iterdir())


def refused(call: Callable[[], Any], message: str, kind: type[MetarobotError] = DemosError) -> None:
    with pytest.raises(kind, match=re.escape(message)) as e:
        call()
    assert "\n" not in str(e.value)


RANGES = "tasks and shots must be at least 1 and jitter between 0 and 10: "
REFUSED = [
    ({"tasks": 0}, RANGES + "0, 1, 0"),
    ({"shots": 0}, RANGES + "1, 0, 0"),
    ({"jitter": -0.1}, RANGES + "1, 1, -0.1"),
    ({"jitter": float("nan")}, RANGES + "1, 1, nan"),
    ({"split": "dev"}, "Placement has no split 'dev'; it has: train, test, extrapolate"),
    ({"seed": -1}, "a seed must be at least 0, not -1"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_settings_that_cannot_work_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    settings = {"tasks": 1, "shots": 1, "threads": 1} | change
    refused(
        lambda: record_demonstrations(PLACEMENT, tmp_path / "x", **settings),
        message,
        MetarobotError,
    )
    assert not list(tmp_path.iterdir())


def test_a_place_that_is_taken_is_left_alone(tmp_path: Path) -> None:
    refused(
        lambda: record_demonstrations(PLACEMENT, tmp_path),
        f"{tmp_path} is there already; choose another place",
    )
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_to_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "x"
    refused(
        lambda: record_demonstrations(PLACEMENT, out, tasks=1, shots=1, threads=1),
        f"cannot write {out}",
        MetarobotError,
    )


def test_a_family_without_an_expert_has_no_demonstrations(tmp_path: Path) -> None:
    family, message = families.get("CheetahVel"), "CheetahVel has no scripted expert"
    refused(lambda: record_demonstrations(family, tmp_path / "x"), message, MetarobotError)
    assert not list(tmp_path.iterdir())


def test_without_minari_it_says_what_to_install_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, calm: Made
) -> None:
    monkeypatch.setitem(sys.modules, "minari", None)
    monkeypatch.setattr(
        module, "collect", lambda *_, **__: pytest.fail("it recorded what it cannot write")
    )
    for call in (
        lambda: read_demonstrations(calm.path),
        lambda: record_demonstrations(PLACEMENT, tmp_path / "x", tasks=1, threads=1),
    ):
        refused(call, "demonstrations need packages: pip install 'metarobot[demos]'")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_write_that_is_interrupted_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: type[BaseException]
) -> None:
    real, begun = minari.create_dataset_from_buffers, []

    def cut(*arguments: Any, **settings: Any) -> None:
        real(*arguments, **settings)
        begun.extend(tmp_path.rglob("*.hdf5"))
        raise error

    monkeypatch.setattr(minari, "create_dataset_from_buffers", cut)
    monkeypatch.setenv("MINARI_DATASETS_PATH", "elsewhere")
    with pytest.raises(error):
        made(tmp_path / "x", tasks=1, shots=1)
    assert begun
    assert not list(tmp_path.iterdir())
    assert os.environ["MINARI_DATASETS_PATH"] == "elsewhere"


def episode(variant: int, steps: int = 5, task: int = 0, **changes: float) -> dict[str, Any]:
    values = list({**PLACEMENT.space.sample("train", 2, 0)[task].as_dict(), **changes}.values())
    rng = np.random.default_rng([variant, task])
    obs, action = (
        rng.standard_normal((n, w)).astype(np.float32) for n, w in ((steps + 1, 35), (steps, 6))
    )
    infos = {"task": np.repeat([values], steps + 1, 0), "variant": np.full(steps + 1, variant)}
    return {"observations": obs, "actions": action, "infos": infos}


def foreign(
    root: Path, episodes: list[dict[str, Any]], description: str | None = json.dumps(META)
) -> Path:
    """A dataset as others make them, with Minari alone."""
    buffers = [
        EpisodeBuffer(
            id=i,
            **e,
            **{k: np.zeros(len(e["actions"])) for k in ("rewards", "terminations", "truncations")},
        )
        for i, e in enumerate(episodes)
    ]
    spaces = {
        f"{k}_space": Box(-np.inf, np.inf, (n,), np.float32)
        for k, n in (("observation", 35), ("action", 6))
    }
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no author, no Gymnasium id
        patch.setenv("MINARI_DATASETS_PATH", str(root))
        minari.create_dataset_from_buffers("others-v0", buffers, description=description, **spaces)
    return root / "others-v0"


GOOD = [episode(v) for v in range(VARIANTS)]


def four(key: str, change: Callable[[Any], Any]) -> list[dict[str, Any]]:
    """One demonstration of every variant, the third with a change."""
    return [*GOOD[:2], GOOD[2] | {key: change(GOOD[2][key])}, GOOD[3]]


@pytest.mark.parametrize("description", [json.dumps(META), None, "made by hand", "5"])
def test_others_can_bring_their_own(tmp_path: Path, description: str | None) -> None:
    episodes = [
        *(episode(v, 5 + v) for v in range(VARIANTS)),
        *(episode(v, 3, 1) for v in (3, 1, 0, 2)),
        episode(2),
    ]
    demos = read_demonstrations(foreign(tmp_path, episodes, description), PLACEMENT)
    assert demos.tasks == tuple(PLACEMENT.space.sample("train", 2, 0))
    assert demos.split == (META["split"] if description == json.dumps(META) else "")
    assert demos.shots == 1
    assert demos.valid.sum(-1)[..., 0].tolist() == [[5, 6, 7, 8], [3] * 4]
    assert np.array_equal(demos.action[0, 3, 0], episodes[3]["actions"])
    assert np.array_equal(demos.obs[1, 1, 0, :3], episodes[5]["observations"][:3])


STEPS = "episode 2 has 2 observations and 1 actions; it takes at least 2 steps"
LESS = "episode 2 has 4 observations and 5 actions"
MOOD = "episode 2: infos lack 'variant'; they have: mood, task"
LACK = "some tasks lack demonstrations of some of the 4 variants"
OBS = "episode 2: observations of Placement have 35 columns, these are (6, 9)"
ACT = "episode 2: actions of Placement have 6 columns, these are (5,)"
HIGH = "order = 77 is outside its bounds: {0, 1, 2, "
DAMAGED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "no episodes": ([], "holds no demonstrations"),
    "a single step": ([*GOOD[:2], episode(2, 1)], STEPS),
    "lost observations": (four("observations", lambda x: x[:4]), LESS),
    "no infos": (four("infos", lambda _: None), "episode 2: infos lack 'task'; they have: nothing"),
    "no variant": (four("infos", lambda x: {"task": x["task"], "mood": x["variant"]}), MOOD),
    "other tasks": (
        four("infos", lambda x: {**x, "task": x["task"][:, :3]}),
        "3 task values, but Placement has 1",
    ),
    "a task of one number": (
        four("infos", lambda x: {**x, "task": x["task"][:, 0]}),
        "episode 2: ",
    ),
    "an impossible task": ([episode(v, order=77.0) for v in range(VARIANTS)], HIGH),
    "a nan action": (
        four("actions", lambda x: np.where(x == x[3, 1], np.nan, x)),
        "episode 2: not all actions are",
    ),
    "an infinite view": (
        four("observations", lambda x: np.where(x > 1, np.inf, x)),
        "episode 2: not all observations",
    ),
    "a lacking variant": (GOOD[:3], LACK),
    "a task that lacks variants": ([*GOOD, episode(1, task=1)], LACK),
    "a variant that does not exist": ([*GOOD, episode(4)], "episode 4"),
    "other observations": (four("observations", lambda x: x[:, :9]), OBS),
    "other actions": (four("actions", lambda x: x[:, 0]), ACT),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_demonstrations_that_nobody_can_learn_from_are_refused(tmp_path: Path, case: str) -> None:
    episodes, message = DAMAGED[case]
    refused(lambda: read_demonstrations(foreign(tmp_path, episodes)), message, MetarobotError)


@pytest.mark.parametrize(("family", "columns"), [("CheetahVel", 17), ("GraspShapes", 19)])
def test_demonstrations_of_another_robot_are_refused(
    tmp_path: Path, family: str, columns: int
) -> None:
    path, message = (
        foreign(tmp_path, GOOD, None),
        f"observations of {family} have {columns} columns, these are (6, 35)",
    )
    refused(lambda: read_demonstrations(path, families.get(family)), message)


def test_demonstrations_that_say_they_are_of_another_family_are_refused(tmp_path: Path) -> None:
    path = foreign(tmp_path, GOOD)
    assert read_demonstrations(path).family is PLACEMENT
    refused(lambda: read_demonstrations(path, families.get("PlacementShown")), "PlacementShown")


def test_demonstrations_that_do_not_say_of_which_family_they_are_need_to_be_told(
    tmp_path: Path,
) -> None:
    path = foreign(tmp_path, GOOD, None)
    refused(
        lambda: read_demonstrations(path), "no family called ''; there are: AntDir", MetarobotError
    )


@pytest.mark.parametrize("size", [0, 100, 0.5, 0.9])
def test_a_damaged_file_is_one_line(tmp_path: Path, size: float) -> None:
    path = foreign(tmp_path, GOOD)
    data = path / "data" / "main_data.hdf5"
    os.truncate(data, int(size if size > 1 else size * data.stat().st_size))
    refused(lambda: read_demonstrations(path), f"{path} is no dataset that Minari reads: ")


def test_damaged_metadata_are_one_line(tmp_path: Path, edit_json: Any) -> None:
    path = foreign(tmp_path, GOOD)
    edit_json(path / "data" / "metadata.json", "minari_version", "99.0")
    refused(
        lambda: read_demonstrations(path),
        f"{path} is no dataset that Minari reads: The installed Minari version",
    )
    (path / "data" / "metadata.json").write_text("{")
    refused(lambda: read_demonstrations(path), f"{path} is no dataset that Minari reads: ")


def test_where_there_is_no_dataset_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file", tmp_path / "nowhere"):
        refused(
            lambda path=path: read_demonstrations(path),
            f"{path} holds no Minari dataset: it has no folder called data",
        )


# Datasets from strangers


def edited(path: Path, **changes: Any) -> Path:
    """Change a dataset's metadata."""
    file = path / "data" / "metadata.json"
    metadata = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in metadata.items() if v is not None}))
    return path


def data_of(path: Path) -> h5py.File:
    """Open a dataset's HDF5 file to change it."""
    return h5py.File(path / "data" / "main_data.hdf5", "a")


SPEC = {
    "id": "Planted-v0",
    "entry_point": "planted_module:Env",
    "reward_threshold": None,
    "nondeterministic": False,
    "max_episode_steps": 5,
    "order_enforce": True,
    "disable_env_checker": False,
    "kwargs": {},
    "additional_wrappers": [],
    "vector_entry_point": None,
}


def test_no_module_that_a_dataset_names_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "planted_module.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    path = edited(
        foreign(tmp_path, GOOD),
        env_spec=json.dumps(SPEC),
        eval_env_spec=json.dumps(SPEC),
        observation_space=None,
        action_space=None,
        dataset_id="../../planted_module:x-v0",
    )
    # Minari itself runs it: the attack is a real one
    with pytest.raises(Exception, match="planted_module"):
        minari.MinariDataset(path / "data")
    assert (tmp_path / "ran").exists()
    (tmp_path / "ran").unlink()
    sys.modules.pop("planted_module")

    assert len(read_demonstrations(path).tasks) == 1
    assert not (tmp_path / "ran").exists()
    assert "planted_module" not in sys.modules


@pytest.mark.parametrize("where", ["observations", "infos", "infos/task", ""])
@pytest.mark.parametrize("link", [h5py.ExternalLink("other.h5", "/x"), h5py.SoftLink("/other")])
def test_links_in_a_dataset_are_not_followed(tmp_path: Path, where: str, link: Any) -> None:
    path = foreign(tmp_path, GOOD)
    with h5py.File(path / "data" / "other.h5", "w") as other:
        other["x"] = np.zeros((6, 35))
    with data_of(path) as file:
        place = f"episode_2/{where}".rstrip("/")
        file.move(place, "other")
        file[place] = link
    refused(lambda: read_demonstrations(path), "links are not followed")


def external(group: h5py.Group) -> None:
    group.create_dataset("actions", (5, 6), "f4", external=[("/etc/passwd", 0, 120)])


def virtual(group: h5py.Group) -> None:
    layout = h5py.VirtualLayout((5, 6), "f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (5, 6), "f4")
    group.create_virtual_dataset("actions", layout)


def with_filter(number: int) -> Callable[[h5py.Group], None]:
    def create(group: h5py.Group) -> None:
        settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        settings.set_chunk((5, 6))
        settings.set_filter(number, h5py.h5z.FLAG_OPTIONAL, ())
        space = h5py.h5s.create_simple((5, 6))
        h5py.h5d.create(group.id, b"actions", h5py.h5t.IEEE_F32LE, space, settings)

    return create


def strings(group: h5py.Group) -> None:
    group["actions"] = ["a", "b"]


def references(group: h5py.Group) -> None:
    group.create_dataset("actions", (5, 6), h5py.ref_dtype)


def bomb(group: h5py.Group) -> None:
    group.create_dataset("actions", (10**12, 6), "f4", chunks=(1000, 6), compression="gzip")


def wide(group: h5py.Group) -> None:
    group.create_dataset("actions", (5, 10**12), "f4", chunks=(5, 1000))


def unwritten(group: h5py.Group) -> None:
    group.create_dataset("actions", (20, 90_000), "f8", chunks=(1, 1000))
    group.file.attrs["x"] = 1


def large_chunk(group: h5py.Group) -> None:
    group.create_dataset("actions", (5, 6), "f4", chunks=(10**7, 6), maxshape=(None, 6))


def long(group: h5py.Group) -> None:
    group.create_dataset("actions", (30, 6), "f4")


def deep(group: h5py.Group) -> None:
    group.create_dataset("actions", (1,) * 30, "f4")


ODD_ARRAYS: dict[str, tuple[Callable[[h5py.Group], None], str]] = {
    "external": (external, "episode_2/actions has its data in other files"),
    "virtual": (virtual, "episode_2/actions has its data in other files"),
    "bzip2's filter": (with_filter(307), "stored with the filter 307; allowed are: gzip"),
    "strings": (strings, "episode_2/actions holds no numbers"),
    "references": (references, "episode_2/actions holds no numbers"),
    "a trillion rows": (bomb, "episode_2/actions has the shape (1000000000000, 6)"),
    "a trillion columns": (wide, "episode_2/actions has the shape (5, 1000000000000)"),
    "more steps than stated": (long, "at most 10 rows"),
    "larger than the file": (unwritten, "episode_2/actions has the shape"),
    "a chunk of 240 MB": (large_chunk, "its arrays are far larger than the file"),
    "thirty dimensions": (deep, "it takes rows of numbers"),
    "nothing": (lambda group: None, "main_data.hdf5 lacks episode_2/actions"),
    "a group": (
        lambda group: group.create_group("actions"),
        "episode_2/actions is a Group, not a Dataset",
    ),
}


@pytest.mark.parametrize("case", ODD_ARRAYS)
def test_only_plain_arrays_of_a_fitting_size_are_read(tmp_path: Path, case: str) -> None:
    create, message = ODD_ARRAYS[case]
    path = foreign(tmp_path, GOOD)
    with data_of(path) as file:
        del file["episode_2/actions"]
        create(file["episode_2"])
    refused(lambda: read_demonstrations(path), message)


@pytest.mark.parametrize("dtype", [">f4", "f8", "f2", "i8"])
def test_other_numbers_are_read_as_numbers(tmp_path: Path, dtype: str) -> None:
    path = foreign(tmp_path, GOOD)
    with data_of(path) as file:
        for i in range(len(GOOD)):
            array = file[f"episode_{i}/actions"][()]
            del file[f"episode_{i}/actions"]
            file[f"episode_{i}/actions"] = array.astype(dtype)
    expected = GOOD[1]["actions"].astype(dtype).astype(np.float32)
    assert np.array_equal(read_demonstrations(path).action[0, 1, 0], expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total_episodes": -1}, "its total_episodes must be from 0 to"),
        ({"total_episodes": 10**30}, "its total_episodes must be from 0 to"),
        ({"total_episodes": "4"}, "its total_episodes must be from 0 to"),
        ({"total_episodes": 5}, "lacks episode_4"),
        ({"total_steps": 7}, "at most 2 rows"),
        ({"total_steps": None}, "its total_steps must be from 0 to"),
        ({"data_format": "arrow"}, "its data_format is 'arrow'; it must be 'hdf5'"),
        ({"data_format": "a\nb"}, "its data_format is"),
        ({"minari_version": ["0.5.4"]}, "The installed Minari version"),
    ],
)
def test_odd_metadata_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = edited(foreign(tmp_path, GOOD), **changes)
    refused(lambda: read_demonstrations(path), message)


@pytest.mark.parametrize("text", ["[" * 100_000, "5", "", "\0", "1e999", '{"a":' * 100_000])
def test_metadata_that_are_no_object_are_refused(tmp_path: Path, text: str) -> None:
    path = foreign(tmp_path, GOOD)
    (path / "data" / "metadata.json").write_text(text)
    refused(lambda: read_demonstrations(path), f"{path} is no dataset that Minari reads: ")


def test_a_deep_description_is_plain_words(tmp_path: Path) -> None:
    path = edited(foreign(tmp_path, GOOD), description="[" * 100_000)
    assert read_demonstrations(path, PLACEMENT).split == ""


@pytest.mark.parametrize("name", ["metadata.json", "main_data.hdf5"])
def test_the_files_of_a_dataset_are_regular_files_within_it(tmp_path: Path, name: str) -> None:
    path = foreign(tmp_path, GOOD)
    file = path / "data" / name
    file.rename(tmp_path / "outside")
    refused(lambda: read_demonstrations(path), f"{name}: No such file")
    file.symlink_to(tmp_path / "outside")
    refused(lambda: read_demonstrations(path), f"{name} is a link out of the folder")
    file.unlink()
    os.mkfifo(file)
    refused(lambda: read_demonstrations(path), f"{name} is no regular file")


def test_a_number_too_large_for_float32_is_not_finite(tmp_path: Path) -> None:
    path = foreign(tmp_path, GOOD)
    with data_of(path) as file:
        del file["episode_2/actions"]
        file["episode_2/actions"] = np.full((5, 6), 1e300)
    refused(lambda: read_demonstrations(path), "episode 2: not all actions are finite")


def test_names_from_a_dataset_are_printed_on_one_line(tmp_path: Path) -> None:
    path = foreign(tmp_path, GOOD)
    with data_of(path) as file:
        del file["episode_2/infos/task"]
        file["episode_2/infos/\x1b[31mred\nalert"] = np.zeros(3)
    with pytest.raises(DemosError, match="they have: ") as caught:
        read_demonstrations(path)
    assert str(caught.value).isprintable()


def test_damaged_datasets_are_refused_in_one_line(tmp_path: Path) -> None:
    happened, broken = fuzz_datasets(foreign(tmp_path, GOOD), tmp_path, 60, seed=0)
    assert happened["refused"] > 10
    assert not broken
