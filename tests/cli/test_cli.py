import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import run

from metarobot.cli.main import COMMANDS


def test_families_says_what_varies_over_which_ranges_and_splits(capsys) -> None:
    code, out, _ = run(capsys, "families")
    assert code == 0
    for expected in (
        "CheetahVel",
        "CheetahTerrain",
        "target_speed",
        "U[0, 3]",
        "payload kg",
        "extrapolate",
        "scale",
    ):
        assert expected in out


def test_agents_lists_kinds_and_the_box(capsys) -> None:
    code, out, _ = run(capsys, "agents")
    assert code == 0
    assert {"rl2", "ppo", "blind", "oracle"} <= set(re.findall(r"^(\S+):", out, re.MULTILINE))


def test_train_evaluate_plot_and_bench_from_end_to_end(capsys, tmp_path: Path) -> None:
    x = str(tmp_path / "x")
    small = ("--worlds", "4", "--minibatches", "2", "--epochs", "1", "--threads", "1")
    assert run(capsys, "train", "CheetahVel100", "--steps", "1e3", "--out", x, *small)[0] == 0
    report, picture = tmp_path / "e.json", tmp_path / "e.png"
    code, out, _ = run(
        capsys,
        "evaluate",
        x,
        "--split",
        "extrapolate",
        "--tasks",
        "3",
        "--episodes",
        "3",
        "--json",
        str(report),
        "--plot",
        str(picture),
    )
    assert code == 0
    assert "worst 10 %" in out
    data = json.loads(report.read_text())
    assert {"family", "split", "seeds", "tasks", "episodes"} <= set(data)
    assert len(data["episodes"]) == 3
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert run(capsys, "plot", x, "--out", str(tmp_path / "curve.svg"))[0] == 0
    assert "<svg" in (tmp_path / "curve.svg").read_text()


def test_bench_writes_the_agreed_keys(capsys, tmp_path: Path) -> None:
    target = tmp_path / "b.json"
    assert (
        run(
            capsys,
            "bench",
            "sim",
            "CheetahVel100",
            "--worlds",
            "8",
            "--seconds",
            "0.1",
            "--json",
            str(target),
        )[0]
        == 0
    )
    data = json.loads(target.read_text())
    assert {"steps_per_s", "engine_steps_per_s", "ratio"} <= set(data)
    assert 0 < data["ratio"] < 2


def test_bench_of_pearl_compares_it_with_bare_products_and_with_rl2(capsys, tmp_path: Path) -> None:
    target = tmp_path / "b.json"
    code, out, _ = run(
        capsys,
        "bench",
        "pearl",
        "CheetahVel100",
        "--worlds",
        "2",
        "--seconds",
        "0.1",
        "--threads",
        "1",
        "--json",
        str(target),
    )
    assert code == 0
    assert "gradient steps/s" in out
    data = json.loads(target.read_text())
    assert data["states_per_s"] == pytest.approx(512 * data["gradient_steps_per_s"])
    assert 0 < data["ratio"] < 2
    assert data["sampling_steps_per_s"] > 0 < data["sampling_ratio"]


def test_bench_of_maml_times_its_parts_with_and_without_a_loop_over_tasks(
    capsys, tmp_path: Path
) -> None:
    target = tmp_path / "b.json"
    code, out, _ = run(
        capsys, "bench", "maml", "--worlds", "40", "--seconds", "0.1", "--json", str(target)
    )
    assert code == 0
    assert "2 tasks x 20 rollouts x 100 steps" in out
    data = json.loads(target.read_text())
    for how in ("vmap", "loop"):
        parts = data[how]
        assert parts["total_s"] == pytest.approx(
            parts["sampling_s"] + parts["inner_step_s"] + parts["outer_update_s"]
        )
        assert 0 < parts["ratio"] < 2
    assert data["peak_memory_mb"] > 100


def test_sinusoid_draws_its_picture_and_writes_the_errors(capsys, tmp_path: Path) -> None:
    picture, errors = tmp_path / "s.png", tmp_path / "s.json"
    code, out, _ = run(
        capsys, "sinusoid", "--iterations", "30", "--out", str(picture), "--json", str(errors)
    )
    assert code == 0
    assert picture.stat().st_size > 10_000
    assert "MAML: mean squared error after 0, 1, … gradient steps" in out
    assert len(json.loads(errors.read_text())["errors"]["joint training"]) == 11


def test_maml_trains_evaluates_beside_fine_tuning_and_is_filmed(
    capsys, runs, tmp_path: Path, gl: None
) -> None:
    code, out, _ = run(
        capsys,
        "evaluate",
        str(runs["maml"].folder),
        "--tasks",
        "2",
        "--episodes",
        "3",
        "--finetune",
        str(runs["blind"].folder),
        "--plot",
        str(tmp_path / "a.png"),
        "--threads",
        "1",
    )
    assert code == 0
    assert "2, from scratch" in out
    assert "direction -1: " in out
    assert (tmp_path / "a.png").stat().st_size > 10_000
    film = tmp_path / "a.mp4"
    assert (
        run(capsys, "render", str(runs["maml"].folder), "--out", str(film), "--size", "64", "64")[0]
        == 0
    )
    assert film.stat().st_size > 1000


def test_help_shows_the_chosen_agents_own_settings(capsys) -> None:
    assert "--memory" in run(capsys, "train", "--help")[1]
    out = run(capsys, "train", "--agent", "oracle", "--help")[1]
    assert "--memory" not in out
    assert "--lr" in out


def test_help_is_a_short_table_of_all_commands_and_imports_none(capsys) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    listed = re.findall(r"^  (\S+) +\S", out, re.MULTILINE)
    assert listed == list(COMMANDS)
    assert all(len(line) <= 100 for line in out.splitlines())
    heavy = "{'torch', 'mujoco', 'tyro', 'rich'} & set(sys.modules)"
    script = f"import sys; from metarobot.cli.main import main; main(['--help']); print({heavy})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys) -> None:
    code, out, _ = run(capsys, name, "--help")
    assert code == 0
    assert f"usage: metarobot {name} " in out


def test_the_package_runs_as_a_module() -> None:
    argv = [sys.executable, "-m", "metarobot", "dance"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no command called 'dance'; there are: families, agents")


BAD = {
    "no command": (
        "",
        "no command given; there are: families, agents",
    ),
    "unknown family": (
        "train CheetahFly --out {tmp}/a",
        "no family called 'CheetahFly'; there are: AntDir",
    ),
    "unknown agent": (
        "train CheetahVel --agent dqn --out {tmp}/a",
        "no agent called 'dqn'; there are:",
    ),
    "unknown memory": (
        "train CheetahVel --memory tape --out {tmp}/a",
        "no memory called 'tape'; there are:",
    ),
    "unknown split": (
        "evaluate {run} --split dev",
        "has no split 'dev'; it has: train, test",
    ),
    "no interpolation": (
        "evaluate {run} --split interpolate",
        "has no split 'interpolate'; it has:",
    ),
    "unknown run": (
        "evaluate {tmp}/nowhere",
        "no run folder",
    ),
    "zero steps": (
        "train CheetahVel --steps 0 --out {tmp}/a",
        "steps must be at least 1, not 0",
    ),
    "negative steps": (
        "train CheetahVel --steps -5 --out {tmp}/a",
        "steps must be at least 1",
    ),
    "nan steps": (
        "train CheetahVel --steps nan --out {tmp}/a",
        "steps must be at least 1",
    ),
    "zero worlds": (
        "train CheetahVel --worlds 0 --out {tmp}/a",
        "worlds must be at least 1, not 0",
    ),
    "nan rate": (
        "train CheetahVel --lr nan --out {tmp}/a",
        "lr must be a finite number",
    ),
    "odd minibatches": (
        "train CheetahVel --worlds 9 --out {tmp}/a",
        "not a multiple of minibatches",
    ),
    "zero tasks": (
        "evaluate {run} --tasks 0",
        "tasks must be at least 1, not 0",
    ),
    "negative episodes": (
        "render {run} --episodes -1 --out {tmp}/v.mp4",
        "episodes must be at least 1",
    ),
    "negative seed": (
        "evaluate {run} --seed -1",
        "seed must be at least 0, not -1",
    ),
    "bench of maml with odd worlds": (
        "bench maml --worlds 30",
        "worlds must be a multiple of 20, the rollouts a task, not 30",
    ),
    "inner rate out of range": (
        "train CheetahDir100 --agent maml --inner-lr 0 --out {tmp}/a",
        "inner_lr must be between 1e-06 and 100, not 0",
    ),
    "too many inner steps": (
        "train CheetahDir100 --agent promp --inner-steps 1000 --out {tmp}/a",
        "inner_steps must be between 1 and 100, not 1000",
    ),
    "no query episode": (
        "train CheetahDir100 --agent maml --episodes 1 --out {tmp}/a",
        "episodes must be at least 2, one to adapt to and one to show it, not 1",
    ),
    "worlds that are no whole tasks": (
        "train CheetahDir100 --agent maml --worlds 30 --out {tmp}/a",
        "worlds = 30 is not a multiple of rollouts = 20",
    ),
    "fine-tuning for an agent without gradient steps": (
        "evaluate {run} --finetune {blind}",
        "agent 'rl2' has no gradient steps to fine-tune with",
    ),
    "sinusoid without iterations": (
        "sinusoid --iterations 0",
        "iterations must be at least 1, not 0",
    ),
    "bench of no worlds": (
        "bench sim CheetahVel --worlds 0",
        "must be positive",
    ),
    "memory of no cuda": (
        "bench memory CheetahVel --sim warp --device cuda",
        "Warp finds no CUDA device",
    ),
    "no cuda": (
        "train CheetahVel --device cuda --out {tmp}/a",
        "--device cuda was asked for, but",
    ),
    "unwritable": (
        "train CheetahVel --out /proc/x",
        "cannot write /proc/x",
    ),
    "unwritable json": (
        "evaluate {run} --tasks 2 --json /proc/x.json",
        "cannot write /proc/x.json",
    ),
    "unknown plot": (
        "evaluate {run} --plot {tmp}/x.bmp",
        "must end in one of .png, .svg, .pdf",
    ),
    "unknown video": (
        "render {run} --out {tmp}/x.avi",
        ".mp4",
    ),
    "unknown parameter": (
        "render {run} --task speed=1 --out {tmp}/v.mp4",
        "has no parameter 'speed'; it has: direction",
    ),
    "out of bounds": (
        "render {run} --task direction=7 --out {tmp}/v.mp4",
        "direction = 7 is outside its bounds: {1, -1}",
    ),
    "nan task": (
        "render {run} --task direction=nan --out {tmp}/v.mp4",
        "direction = nan is not a finite number",
    ),
    "not a value": (
        "render {run} --task direction --out {tmp}/v.mp4",
        "'direction' is not name=value",
    ),
    "used folder": (
        "train CheetahDir100 --out {run}",
        "holds a run already: continue it with --resume",
    ),
    "resume nothing": (
        "train CheetahVel --out {tmp}/none --resume",
        "no run folder",
    ),
    "resume another family": (
        "train CheetahVel --out {run} --resume",
        "with family 'CheetahVel': it was trained with 'CheetahDir100'",
    ),
    "resume another agent": (
        "train CheetahDir100 --agent oracle --out {run} --resume",
        "with agent 'oracle': it was trained with 'rl2'",
    ),
    "resume another seed": (
        "train CheetahDir100 --seed 5 --out {run} --resume",
        "with seed 5: it was trained with 0",
    ),
    "resume with fewer steps": (
        "train CheetahDir100 --steps 900 --out {run} --resume",
        "with steps 900: it was trained with 1600",
    ),
    "resume another width": (
        "train CheetahDir100 --width 64 --out {run} --resume",
        "with width 64: it was trained with 128",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line_and_exit_code_two(case: str, capsys, runs, tmp_path: Path) -> None:
    argv, message = BAD[case]
    places = {"tmp": tmp_path, "run": runs["rl2"].folder, "blind": runs["blind"].folder}
    words = [w.format(**places) for w in argv.split()]
    before = sorted(p.name for p in tmp_path.iterdir())
    code, _, err = run(capsys, *words)
    assert code == 2
    assert message in err
    assert err.startswith("error: ")
    assert err.strip().count("\n") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def small_files_only() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_disk_that_takes_no_more_is_one_line_and_nothing_half_written(tmp_path: Path) -> None:
    """The kernel refuses to let a file grow past 100 kB, which a checkpoint does."""
    argv = [
        sys.executable,
        "-m",
        "metarobot.cli.main",
        "train",
        "CheetahVel100",
        "--steps",
        "1e3",
        "--worlds",
        "4",
        "--minibatches",
        "2",
        "--out",
        str(tmp_path / "x"),
    ]
    done = subprocess.run(argv, capture_output=True, text=True, preexec_fn=small_files_only)
    assert done.returncode == 2
    assert re.search(r"error: cannot write .*safetensors: File too large", done.stderr)
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "x").glob("*.safetensors"))
    assert not list((tmp_path / "x").glob(".*"))


def test_a_gl_backend_that_does_not_exist_is_one_line() -> None:
    argv = [sys.executable, "-m", "metarobot.cli.main", "families"]
    done = subprocess.run(
        argv, capture_output=True, text=True, env={**os.environ, "MUJOCO_GL": "bogus"}
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: MUJOCO_GL=bogus does not work here")
