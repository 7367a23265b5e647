"""The log of a run: parts, a full disk, a writer that stops, and files from strangers."""

import os
import signal
import struct
import time
from pathlib import Path
from typing import Any

import bridging
import numpy as np
import pytest
import zstandard
from log_fuzzing import entries_of_a_run, fuzz_log, policy, write_entries

from metarobot.bridge.adaptation_client import DEFAULT_KL_BOUND
from metarobot.bridge.controller import Controller
from metarobot.bridge.errors import BridgeError
from metarobot.bridge.launch import exit_code, print_report
from metarobot.bridge.loop_timing import MonotonicClock
from metarobot.bridge.run_options import RunOptions
from metarobot.bridge.run_report import RunReport, RunSettings
from metarobot.bridge.tools import run_log
from metarobot.bridge.tools.log_format import TICK_TOPIC
from metarobot.bridge.tools.read_log import GAP, read_log, read_part
from metarobot.bridge.tools.replay_log import replay
from metarobot.bridge.tools.run_log import LogRow, RunLog


def open_log(path: Path, **sizes: float) -> tuple[RunLog, LogRow]:
    row = LogRow({"tick": ["time"], "obs": ["a"] * 50})
    return RunLog(path, row, {"policy": "p"}, **sizes), row


def write_ticks(log: RunLog, row: LogRow, count: int, pause_every: int = 0) -> None:
    rng = np.random.default_rng(0)
    for i in range(count):
        row["tick"][0] = i
        row["obs"][:] = rng.random(50)
        log.write_tick()
        if pause_every and i % pause_every == 0:
            time.sleep(0.01)


def ticks(path: Path) -> list[float]:
    return [content["time"] for topic, content in read_log(path) if topic == TICK_TOPIC]


def drive(log: Path, **settings: Any) -> tuple[RunReport, bridging.RecordingRobot]:
    about = bridging.meta()
    clock = MonotonicClock()
    robot = bridging.RecordingRobot(about, clock)
    wanted = {"hz": 50.0, "seconds": 10.0, "damp_s": 0.05, "ready_s": 0.05, "soft_s": 0.05}
    controller = Controller(
        bridging.WavePolicy(about),
        robot,
        bridging.PlainLayout(about),
        RunSettings(**wanted | settings),
        clock=clock,
        log=log,
    )
    return controller.run(), robot


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_ends_the_run_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = time.monotonic()
    report, robot = drive(Path("/dev/full"))
    assert time.monotonic() - started < 9.0
    assert report.reason == "the log full cannot be written: No space left on device"
    assert report.fault
    assert exit_code(report) == 1
    assert robot.order[-1] == "damp"
    assert "command" not in robot.order[robot.order.index("damp") :]
    print_report(report)
    printed = capsys.readouterr().out
    assert "No space left on device" in printed
    assert "slow" not in printed


def test_a_log_that_fails_at_its_end_is_a_fault_too(tmp_path: Path) -> None:
    log, row = open_log(tmp_path / "run.mcap")
    write_ticks(log, row, 5)
    log._writer.process.kill()
    log._writer.process.wait()
    log.close()
    assert log.failure == "the log run.mcap cannot be written: its process ended with -9"
    report = RunReport(reason="10 s are over", log_failure=log.failure)
    assert exit_code(report) == 1
    assert exit_code(RunReport(reason="10 s are over")) == 0


def test_a_stopped_writer_never_delays_the_end(tmp_path: Path) -> None:
    path = tmp_path / "run.mcap"
    log, row = open_log(path)
    write_ticks(log, row, 200, pause_every=10)
    os.kill(log._writer.process.pid, signal.SIGSTOP)
    write_ticks(log, row, 200)
    started = time.monotonic()
    log.close()
    assert time.monotonic() - started < 4.0
    assert log.failure == ""
    assert ticks(path) == [*range(200), *range(200)]


def test_a_writer_that_cannot_be_woken_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_log, "CLOSE_TIMEOUT_S", 0.3)
    log, row = open_log(tmp_path / "run.mcap")
    write_ticks(log, row, 5)
    os.kill(log._writer.process.pid, signal.SIGSTOP)
    send_signal = log._writer.process.send_signal
    monkeypatch.setattr(
        log._writer.process,
        "send_signal",
        lambda number: None if number == signal.SIGCONT else send_signal(number),
    )
    started = time.monotonic()
    log.close()
    assert time.monotonic() - started < 3.0
    assert "its process ended with -9" in log.failure


def test_a_log_with_many_missing_steps_says_so(tmp_path: Path) -> None:
    log, row = open_log(tmp_path / "run.mcap")
    os.kill(log._writer.process.pid, signal.SIGSTOP)
    write_ticks(log, row, 5000)
    log.close()
    assert log.dropped > 1000
    assert "steps are missing in the log run.mcap: its writer was stopped" in log.failure


def test_a_long_log_goes_on_in_other_files(tmp_path: Path) -> None:
    path = tmp_path / "run.mcap"
    (tmp_path / "run.part7.mcap").write_bytes(b"of an earlier run")
    (tmp_path / "run.part2.mcap.bak").write_bytes(b"of somebody else")
    log, row = open_log(path, part_mb=0.1)
    write_ticks(log, row, 2000, pause_every=20)
    log.close()
    assert log.failure == ""
    parts = sorted(p.name for p in tmp_path.glob("run.part*.mcap"))
    assert len(parts) >= 5
    assert not (tmp_path / "run.part7.mcap.bak").exists()
    assert (tmp_path / "run.part2.mcap.bak").exists()
    assert ticks(path) == list(range(2000))
    # Each part is a whole file, with the policy that made it
    assert ("policy", {"policy": "p"}) in list(read_part(tmp_path / "run.part3.mcap"))


def test_the_oldest_parts_but_the_first_are_deleted(tmp_path: Path) -> None:
    path = tmp_path / "run.mcap"
    log, row = open_log(path, part_mb=0.1, max_mb=0.4)
    write_ticks(log, row, 4000, pause_every=20)
    log.close()
    size = sum(p.stat().st_size for p in tmp_path.glob("run*.mcap"))
    # A part is complete only with its indexes, and a chunk of 64 kB is what it may be too large
    assert size < 0.7e6
    found = ticks(path)
    assert found[:50] == list(range(50))
    assert found[-50:] == list(range(3950, 4000))
    assert [topic for topic, _ in read_log(path)].count(GAP) == 1
    with pytest.raises(BridgeError, match="log_max_mb must be at least three times log_part_mb"):
        RunOptions(log_part_mb=1.0, log_max_mb=2.0).check()


def test_the_command_lines_defaults_are_those_of_the_parts_behind_it() -> None:
    options = RunOptions()
    settings = RunSettings(hz=50.0)
    assert options.kl == DEFAULT_KL_BOUND
    for name, value in (
        ("log_part_mb", run_log.DEFAULT_PART_MB),
        ("log_max_mb", run_log.DEFAULT_MAX_MB),
    ):
        assert vars(options)[name] == vars(settings)[name] == value


def test_a_replay_leaves_out_the_trial_of_which_a_part_is_missing(tmp_path: Path) -> None:
    entries = entries_of_a_run()
    path = tmp_path / "run.mcap"
    path.write_bytes(write_entries(entries[:11]))
    # Ten steps of the first trial, a part is gone, its end, and the whole second trial
    (tmp_path / "run.part3.mcap").write_bytes(write_entries(entries[20:]))
    result = replay(path, policy())
    assert (result.difference, result.steps) == (0.0, 10 + 30)


def chunk(packed: bytes, size: int, compression: bytes = b"zstd") -> bytes:
    body = struct.pack("<QQQII", 0, 0, size, 0, len(compression)) + compression
    body += struct.pack("<Q", len(packed)) + packed
    return struct.pack("<BQ", 6, len(body)) + body


MAGIC = b"\x89MCAP0\r\n"
CHANNEL = struct.pack("<BQ", 4, 20) + struct.pack("<HHI", 1, 1, 5) + b"/tick" + bytes(7)


def message(content: bytes) -> bytes:
    body = struct.pack("<HIQQ", 1, 0, 0, 0) + content
    return struct.pack("<BQ", 5, len(body)) + body


ZEROS = zstandard.compress(bytes(200 << 20))
HOSTILE = {
    "a chunk that unpacks to 200 MB": (chunk(ZEROS, 200 << 20), "a chunk of 209,715,200 bytes"),
    "a chunk that lies about it": (chunk(ZEROS, 100), "a chunk is not as large as it says"),
    "a chunk of 16 TB": (chunk(b"", 1 << 44), "a chunk of 17,592,186,044,416 bytes"),
    "a record of 4 EB": (struct.pack("<BQ", 5, 1 << 62) + MAGIC, "a record of 4,611"),
    "lz4": (chunk(b"", 0, b"lz4"), "compressed by b'lz4'"),
    "deep JSON": (message(b"[" * 100_000), "nested too deeply"),
    "a list": (message(b"[]"), "JSON that is no object"),
    "NaN": (message(b'{"obs": [NaN]}'), "NaN is not a number of JSON"),
    "no JSON": (message(b"\xff"), "it holds what is no JSON"),
    "no tick": (message(b"{}"), "holds what no run writes: /tick: 'action'"),
    "1e999": (message(b'{"action": [1e999]}'), "holds what no run writes"),
    "an unnamed topic": (message(b"{}").replace(b"\x01\0", b"\x09\0", 1), "does not name"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_strangers_log_is_one_line(name: str, tmp_path: Path) -> None:
    data, expected = HOSTILE[name]
    path = tmp_path / "run.mcap"
    path.write_bytes(MAGIC + CHANNEL + data)
    started = time.monotonic()
    with pytest.raises(BridgeError) as caught:
        replay(path, policy())
    assert time.monotonic() - started < 2.0
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_log_must_be_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero"), tmp_path):
        with pytest.raises(BridgeError, match=r"no regular file|Is a directory"):
            list(read_log(path))
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(2 << 30)
    with pytest.raises(BridgeError, match=r"at most 1,073,741,824 bytes"):
        list(read_log(tmp_path / "huge"))
    with pytest.raises(BridgeError, match="No such file"):
        list(read_log(tmp_path / "none"))


def test_damage_to_a_log_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    table = fuzz_log(tmp_path, 200, seed=0)
    assert table.broken == []
    assert sum(table.refused.values()) > 50
