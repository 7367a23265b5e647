import json
from pathlib import Path

import pytest
import torch
from helpers import run, tiny_run

from metarobot.evaluation.task_recognition import (
    RecognitionConfig,
    RecognitionError,
    evenly_spaced_tasks,
    recognise,
)
from metarobot.tasks.family import families
from metarobot.tasks.space import TaskSpace
from metarobot.training.run_folder import Run

FAMILY = "CheetahDir100"


@pytest.fixture(scope="module")
def recognising(tmp_path_factory: pytest.TempPathFactory) -> Run:
    torch.set_num_threads(1)
    return tiny_run(
        tmp_path_factory.mktemp("likeness") / "prototype", agent="prototype", family=FAMILY
    )


def quiz(**settings: object) -> RecognitionConfig:
    return RecognitionConfig(
        **{"tasks": 4, "transitions": 20, "neighbours": 3, "support": 1, "queries": 2, "threads": 1}
        | settings
    )


def test_the_report_holds_support_set_prototypes_and_neighbours_with_distances(
    recognising: Run,
) -> None:
    ticks: list[None] = []
    report = json.loads(json.dumps(recognise(recognising, quiz(), lambda: ticks.append(None))))
    bank = recognising.load_agent().bank
    assert len(ticks) == 3
    assert len(report["prototypes"]) == len(bank) == 8
    for p, task, lived in zip(report["prototypes"], bank.task, bank.lived, strict=False):
        assert p["task"] == {"direction": float(task)}
        assert p["transitions"] == int(lived.sum())
        assert p["within"] > 0
    assert [r["task"]["direction"] for r in report["held_out"]] == [1.0, -1.0, 1.0, -1.0]
    for r in report["held_out"]:
        distances = [n["distance"] for n in r["neighbours"]]
        assert len(distances) == 3
        assert distances == sorted(distances)
        assert r["new"] == (distances[0] > report["threshold"])
    assert report["chance"] == 0.5
    assert 0 <= report["recognised"]["mean"] <= 1
    low, high = report["recognised"]["ci95"]
    assert low <= report["recognised"]["mean"] <= high


def test_a_report_is_a_function_of_run_and_quiz(recognising: Run) -> None:
    report = recognise(recognising, quiz())
    assert recognise(recognising, quiz()) == report
    assert recognise(recognising, quiz(seed=1))["held_out"] != report["held_out"]


def test_tasks_may_be_spaced_evenly_where_there_is_one_parameter(recognising: Run) -> None:
    speeds = [
        t.as_dict()["target_speed"]
        for t in evenly_spaced_tasks(families.get("CheetahVel").space, 6)
    ]
    assert speeds == pytest.approx([0.25, 0.75, 1.25, 1.75, 2.25, 2.75])
    with pytest.raises(
        RecognitionError, match="CheetahTerrain is not one parameter drawn uniformly"
    ):
        evenly_spaced_tasks(families.get("CheetahTerrain").space, 6)
    with pytest.raises(RecognitionError, match="no even spacing"):
        recognise(recognising, quiz(even=True))


def test_an_encoder_that_reads_the_task_recognises_all_and_finds_far_ones_new(
    recognising: Run,
) -> None:
    """The target speed is in the reward: an encoder that hands on −(reward + speed) knows it to a
    few cm/s."""

    class Knowing(torch.nn.Module):
        def begin(self, tasks: int) -> torch.Tensor:
            return torch.zeros(tasks, 2)

        def evidence(self, x: torch.Tensor) -> torch.Tensor:
            speed, effort = (
                x[..., 8] + 0.5 * x[..., 32],
                0.05 * x[..., 17:23].clamp(-1, 1).square().sum(-1),
            )
            return torch.stack([speed - x[..., 23] - effort, torch.ones_like(speed)], -1)

        def forward(self, evidence: torch.Tensor) -> torch.Tensor:
            z = evidence[..., :1] / evidence[..., 1:].clamp_min(1) / 1.5 - 1.0
            return torch.nn.functional.pad(z, (0, 7))

    made = tiny_run(
        recognising.folder.parent / "knowing", agent="prototype", family="CheetahVel", steps=9600
    )
    agent = made.load_agent()
    agent.encoder = Knowing()
    agent.refresh()
    known = type("Known", (Run,), {"load_agent": lambda self: agent})(**vars(made))
    near, far = (
        recognise(known, quiz(split=s, tasks=6, neighbours=1)) for s in ("test", "extrapolate")
    )
    assert near["recognised"]["mean"] > 0.9
    assert near["rank_correlation"]["held_out"] > 0.95
    assert far["new"]["mean"] > near["new"]["mean"]
    for r in near["held_out"]:
        gap = {
            p["task"]["target_speed"]: abs(p["task"]["target_speed"] - r["task"]["target_speed"])
            for p in near["prototypes"]
        }
        assert gap[r["neighbours"][0]["task"]["target_speed"]] < min(gap.values()) + 0.2


@pytest.mark.parametrize("family", ["CheetahTerrain", "CheetahVel", "QuadrupedTerrain"])
def test_decoding_gives_the_values_that_were_encoded(family: str) -> None:
    space: TaskSpace = families.get(family).space
    tasks = [*space.sample("train", 5), *space.sample("extrapolate", 5)]
    wanted = [p.name for p in space.params if not p.nuisance]
    for task, values in zip(tasks, space.decode(space.encode(tasks)), strict=True):
        assert list(values) == wanted
        assert values == pytest.approx({k: task[k] for k in wanted}, rel=1e-5, abs=1e-5)


def test_the_command_lists_writes_and_draws(
    recognising: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = tmp_path / "r.json", tmp_path / "r.png"
    few = [
        "--tasks",
        "2",
        "--transitions",
        "20",
        "--queries",
        "1",
        "--support",
        "1",
        "--threads",
        "1",
    ]
    argv = [
        str(recognising.folder),
        *few,
        "--prototypes",
        "--json",
        str(out),
        "--plot",
        str(picture),
    ]
    code, said, _ = run(capsys, "recognise", *argv)
    assert code == 0
    for words in (
        "support set",
        "is most like",
        "direction -1",
        "judged unknown",
        "rank correlation",
        "8 prototypes",
    ):
        assert words in said
    assert json.loads(out.read_text())["transitions"] == 20
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (
            ["--transitions", "101"],
            "direction 1: the episode ended after 100 transitions; ask for fewer",
        ),
        (["--transitions", "0"], "transitions must be at least 1, not 0"),
        (["--neighbours", "9"], "keeps 8 prototypes, fewer than 9 neighbours"),
        (
            ["--split", "interpolate"],
            "CheetahDir100 has no split 'interpolate'; it has: train, test",
        ),
        (["--colour", "speed"], "CheetahDir100 has no parameter 'speed'; it has: direction"),
        (["--plot", "x.txt"], "its name must end in one of .png, .svg, .pdf"),
    ],
)
def test_what_cannot_be_asked_is_one_line(
    recognising: Run, argv: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(
        capsys, "recognise", str(recognising.folder), "--tasks", "1", "--threads", "1", *argv
    )
    assert code == 2
    assert says in err
    assert len(err.strip().splitlines()) == 1


def test_an_agent_without_prototypes_recognises_nothing(tmp_path: Path) -> None:
    blind = tiny_run(tmp_path / "blind", agent="blind")
    with pytest.raises(
        RecognitionError, match="keeps no prototypes: its agent is 'blind'; train one as prototype"
    ):
        recognise(blind, quiz())
