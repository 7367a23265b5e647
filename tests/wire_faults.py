"""One fault on the wire: drive, break something, and see when damping arrives and what came
before."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bridging import ABOUT, LIMIT
from udp_robot import FAULTS, Peer

from metarobot.bridge.safety.command_gate import damping_bounds_s

HERE = Path(__file__).parent
SIGNALS = {
    "kill -9": signal.SIGKILL,
    "SIGSTOP": signal.SIGSTOP,
    "SIGTERM": signal.SIGTERM,
    "SIGINT": signal.SIGINT,
}
ALL = (*FAULTS, *SIGNALS, "policy hangs", "policy nan")
PERIOD = 0.02


@dataclass
class Outcome:
    """What the peer saw."""

    after_reading: float
    """From the last good reading's leaving to damping's arrival, s."""
    after_command: float
    """From the last command's arrival to damping's, s."""
    code: int
    said: str


def folder(path: Path) -> Path:
    """Write the metadata of the robot's policy."""
    (path / "policy.json").write_text(json.dumps(ABOUT))
    return path


def start(about: Path, port: int, how: str = "") -> subprocess.Popen[str]:
    """Start a controller process."""
    command = [sys.executable, str(HERE / "udp_robot.py"), str(about), str(port), how]
    here = {**os.environ, "PYTHONPATH": str(HERE)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=here)


def strike(about: Path, fault: str, at: float = 0.5) -> Outcome:
    """Let a controller drive for a while, break something, and wait for damping."""
    with Peer() as peer:
        process = start(about, peer.port, fault if fault.startswith("policy") else "")
        assert process.stdout is not None
        assert process.stdout.readline() == "driving\n"
        time.sleep(at)
        since = 0.0
        if fault in FAULTS:
            peer.fault = fault
        elif fault in SIGNALS:
            since = time.monotonic()
            process.send_signal(SIGNALS[fault])
        end = time.monotonic() + 20.0
        while np.isnan(damped := peer.damped(since)) and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(0.7)
        if fault == "SIGSTOP":
            process.send_signal(signal.SIGCONT)
        said = process.communicate(timeout=30)[0]
        check(peer, damped)
        commands = [t for t, *_ in peer.commands()]
        good = (
            peer.good
            if fault in FAULTS
            else max(t for t, _, _ in peer.readings.values() if t <= commands[-1])
        )
        return Outcome(damped - good, damped - commands[-1], process.returncode, said.strip())


def check(peer: Peer, damped: float) -> None:
    """Raise ``AssertionError`` if anything that arrived was not safe."""
    assert not np.isnan(damped)
    assert len(peer.commands()) > 3
    for when, _, answered, target in peer.commands():
        assert when < damped
        left, pos, vel = peer.readings[answered]
        assert np.isfinite(target).all()
        assert (np.abs(target) <= LIMIT["high"]).all()
        assert (np.abs(40 * (target - pos) - vel) <= LIMIT["torque"] + 1e-9).all()
        assert when - left <= damping_bounds_s(PERIOD)[0] + SLACK
    assert peer.heard[-1][1] == b"D"


SLACK = 1.0
"""How late a busy machine may make what is timed, s; ``scripts/fuzz_wire.py`` says how late it
was."""
