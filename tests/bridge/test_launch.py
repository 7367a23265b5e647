import io
import json
import math
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from bridging import RecordingRobot, meta
from helpers import run as command

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.policy.onnx_policy import OnnxPolicy
from metarobot.bridge.robots import lookup as robots
from metarobot.bridge.tools import terminal_panel as panel
from metarobot.bridge.tools.child_process import ChildProcess
from metarobot.bridge.tools.read_log import read_log
from metarobot.bridge.tools.replay_log import replay
from metarobot.bridge.tools.run_log import LogRow, RunLog
from metarobot.training.run_folder import Run

TESTS_FOLDER = Path(__file__).parents[1]
Exported = Callable[[str], tuple[Run, Path]]


def test_a_robot_is_made_by_name_and_its_settings_are_checked():
    assert robots.make_robot("bridging:RecordingRobot", meta()).name == "recorder"
    made = robots.make_robot("bridging:Slider", meta(), lacks="x")
    assert made.lacks == "x"
    for spec, settings, message in [
        ("spot", {}, "there is no robot 'spot'; robots: sim, ros2, unitree, or module:Class"),
        ("nowhere:Robot", {}, "cannot load nowhere:Robot"),
        ("bridging:Nobody", {}, "cannot load bridging:Nobody"),
        (
            "bridging:Slider",
            {"lack": "x"},
            "robot bridging:Slider has no setting 'lack'; it has: lacks, twice",
        ),
        ("sim", {"task": 3}, "robot sim does not take these settings"),
    ]:
        with pytest.raises(BridgeError, match=re.escape(message)):
            robots.make_robot(spec, meta(), **settings)


def test_settings_from_a_command_line_get_their_types():
    words = {
        "port": "7",
        "gain": "0.5",
        "lockstep": "true",
        "name": "lo",
        "task.friction": "0.4",
        "task.slope": "2",
    }
    assert robots.parse_settings(words) == {
        "port": 7,
        "gain": 0.5,
        "lockstep": True,
        "name": "lo",
        "task": {"friction": 0.4, "slope": 2},
    }


def test_a_rate_that_the_policy_was_not_trained_for_must_be_wanted():
    assert robots.control_rate_hz(meta(), 0.0, False) == 50.0
    assert robots.control_rate_hz(meta(), 50.0, False) == 50.0
    assert robots.control_rate_hz(meta(), 100.0, True) == 100.0
    with pytest.raises(
        BridgeError, match="trained at 50 Hz, not 100; leave out --hz, or say --any-rate"
    ):
        robots.control_rate_hz(meta(), 100.0, False)
    for hz in (-1.0, math.nan, math.inf, 1e6):
        with pytest.raises(BridgeError, match="hz must be above 0 and at most 10000"):
            robots.control_rate_hz(meta(), hz, True)


def test_one_controller_at_a_time_has_a_robot():
    with robots.exclusive_control("robot of this test"):
        with (
            pytest.raises(BridgeError, match=f"has a controller already: process {os.getpid()}"),
            robots.exclusive_control("robot of this test"),
        ):
            pass
        with robots.exclusive_control("another robot"):
            pass
    with robots.exclusive_control("robot of this test"):
        pass


def test_what_a_robot_does_not_give_is_named():
    robot = RecordingRobot(meta())
    robots.check_robot_readings(meta(), ("hip.pos", "knee.vel"), robot)
    with pytest.raises(
        BridgeError, match=r"needs FL_hip.pos, which recorder does not give; it gives stamp, seq, "
    ):
        robots.check_robot_readings(meta(), ("hip.pos", "FL_hip.pos"), robot)


def test_a_log_whose_writer_is_killed_is_readable_up_to_its_last_chunk(tmp_path: Path):
    row = LogRow({"tick": ["time"], "reading": ["a"], "obs": ["a"] * 50, "action": ["x"]})
    log = RunLog(tmp_path / "cut.mcap", row, {"policy": "p"})
    for i in range(3000):
        row["tick"][0] = i
        row["obs"][:] = i / 3
        row["reading"][0] = math.nan
        log.write_tick()
    end = time.monotonic() + 20
    while (tmp_path / "cut.mcap").stat().st_size < 30_000 and time.monotonic() < end:
        time.sleep(0.01)
    log._writer.process.kill()
    log.close()
    ticks = [c for topic, c in read_log(tmp_path / "cut.mcap") if topic == "/tick"]
    assert len(ticks) > 50
    assert [t["time"] for t in ticks] == list(range(len(ticks)))
    assert ticks[7]["obs"] == [7 / 3] * 50
    assert ticks[7]["reading"] == {"a": None}
    whole = (tmp_path / "cut.mcap").read_bytes()
    (tmp_path / "shorter.mcap").write_bytes(whole[: len(whole) // 2 + 7])
    fewer = [c for topic, c in read_log(tmp_path / "shorter.mcap") if topic == "/tick"]
    assert 0 < len(fewer) < len(ticks)
    (tmp_path / "none.mcap").write_bytes(b"nothing of the kind")
    with pytest.raises(BridgeError, match="is no log"):
        list(read_log(tmp_path / "none.mcap"))


def test_a_child_that_does_not_listen_never_holds_the_loop_up():
    child = ChildProcess("tools.run_log", "99")  # it dies at once: there is no such file
    frame = b"x" * 5000
    began = time.monotonic()
    taken = sum(child.send(b"T", frame) for _ in range(2000))
    assert time.monotonic() - began < 5.0
    assert taken + child.dropped == 2000
    assert child.dropped > 1500
    child.close(1.0)


def test_run_and_replay_from_the_command_line(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    _, policy = exported("rl2")
    log = tmp_path / "run.mcap"
    words = [str(policy), "--set", "lockstep=true", "--trials", "1", "--log", str(log), "--plain"]
    code, out, _ = command(capsys, "run", *words)
    assert code == 0
    assert "stopped: 1 trials are over; damping was sent" in out
    assert re.search(r"trial 1: return -?[\d.]+ → -?[\d.]+", out)
    again = replay(log, OnnxPolicy.load(policy))
    assert (again.difference, again.differing, again.same) == (0.0, 0, True)
    assert again.steps == 2 * OnnxPolicy.load(policy).meta.trial.horizon
    code, out, err = command(capsys, "replay", str(log), str(policy))
    assert (code, err) == (0, "")
    assert "steps of this policy: actions differ by 0 at most" in out
    code, out, _ = command(capsys, "replay", str(log), str(exported("blind")[1]))
    assert code == 1
    assert "steps of another policy" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hz", "100"], "the policy was trained at"),
        (["--robot", "spot"], "there is no robot 'spot'"),
        (["--set", "lockstep"], "'lockstep' is not name=value"),
        (["--set", "colour=3"], "robot sim has no setting 'colour'"),
        (["--seconds", "0"], "seconds must be above 0"),
        (["--episodes", "-1"], "episodes must be at least 0"),
        (["--robot", "bridging:Slider", "--set", "lacks=speed_x"], "the policy, for"),
        (["--robot", "bridging:Slider", "--log", "/proc/no/log.mcap"], "cannot write"),
        (["--robot", "bridging:Slider", "--adapt"], "does not adapt between episodes"),
    ],
)
def test_what_does_not_fit_is_a_line_and_nothing_is_sent(
    exported: Exported, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    from metarobot.bridge.__main__ import main

    _, policy = exported("rl2")
    words = [w.replace("speed_x", OnnxPolicy.load(policy).meta.observation_names[0]) for w in words]
    with pytest.raises(SystemExit) as caught:
        main([str(policy), "--plain", *words])
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert message in said
    assert said.splitlines()[-1].startswith("error: ")


def test_a_key_stops_the_run_and_the_terminal_is_what_it_was(exported: Exported):
    import termios

    _, policy = exported("rl2")
    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    words = [sys.executable, "-m", "metarobot.bridge", str(policy)]
    words += ["--robot", "bridging:Slider", "--plain"]
    environment = {**os.environ, "PYTHONPATH": str(TESTS_FOLDER)}
    process = subprocess.Popen(
        words,
        stdin=slave,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stderr is not None
    while "any key" not in (line := process.stderr.readline()):
        assert line, process.stderr.read()
    os.write(master, b" ")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "stopped: a key was pressed; damping was sent" in out
    assert termios.tcgetattr(slave) == before


def test_the_panel_draws_every_state():
    status = {
        "state": "running",
        "reason": "",
        "trial": 1,
        "episode": 0,
        "step": 12,
        "return": 3.25,
        "left_s": 41.0,
        "returns": [[10.0, 12.5], []],
        "pace": dict.fromkeys(("late", "work"), 0.0)
        | {"hz": 50.0, "ticks": 812, "missed_own": 0, "missed_host": 2},
        "limited": {f"joint_{i}": {"torque": 5 * i + 1, "rate": 2} for i in range(9)},
        "adapted": ["kept the old weights: too far"],
        "adapting": True,
        "dropped": 3,
        "readings": {"repeated": 4, "disordered": 1},
    }
    status["pace"] |= {f"{k}_{q}_ms": 0.1 for k in ("late", "work") for q in ("p50", "p99", "max")}
    from rich.console import Console

    for state in panel.STATE_COLOURS:
        console = Console(width=100, record=True, file=io.StringIO())
        reason = "why" if state == "damping" else ""
        console.print(panel.draw_panel("TwoJoints", status | {"state": state, "reason": reason}))
        text = console.export_text()
        for piece in (
            state.upper(),
            "0 by the loop, 2 by the host",
            "10.0 → 12.5",
            "3.2",
            "joint_8",
            "and 3 more joints",
        ):
            assert piece in text
    assert "trial 2 episode 1 step 12" in panel.status_line(status)
    json.dumps(status)
