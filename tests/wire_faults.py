"""One fault on the wire: drive, break something, and measure when damping arrives."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bridging import ABOUT, LIMIT, sealed
from udp_robot import DAMP, DAMPING_FAILURES, FAULTS, UdpPeer

from metarobot.bridge.safety.command_gate import damping_bounds_s
from metarobot.bridge.safety.guard_process import GUARD_SILENCE_S
from metarobot.bridge.safety.plausibility_checks import FROZEN_S

TESTS_FOLDER = Path(__file__).parent
SIGNALS = {
    "kill -9": signal.SIGKILL,
    "SIGSTOP": signal.SIGSTOP,
    "SIGTERM": signal.SIGTERM,
    "SIGINT": signal.SIGINT,
}
GUARD_SIGNALS = {"guard kill -9": signal.SIGKILL, "guard SIGSTOP": signal.SIGSTOP}
"""Signals to the guard process: the controller must notice."""
CONTROLLER_FAULTS = ("policy hangs", "policy nan", "damping raises")
ALL_FAULTS = (*FAULTS, *SIGNALS, *GUARD_SIGNALS, *CONTROLLER_FAULTS)
NOTICED_AFTER_S = {
    "frozen values": FROZEN_S,
    "guard SIGSTOP": GUARD_SILENCE_S,
    # Each failure is followed by another attempt, within a control period at most
    "damping raises": DAMPING_FAILURES * 0.02,
}
"""Fault -> how long it takes in addition to the gate's bound."""
PERIOD_S = 0.02
SLACK_S = 1.0
"""How late a busy machine may make what is timed; ``scripts/fuzz_wire.py`` reports how late."""


@dataclass
class WireFaultResult:
    """What the robot's end saw of a fault."""

    after_reading_s: float
    """From the last good reading's departure to damping's arrival."""
    after_command_s: float
    """From the last command's arrival to damping's."""
    after_fault_s: float
    """From a signal to damping's arrival; NaN for other faults."""
    exit_code: int
    """Of the controller process."""
    output: str


def write_policy_folder(path: Path) -> Path:
    """Write the metadata of the robot's policy; return the folder."""
    (path / "policy.json").write_text(json.dumps(sealed(ABOUT)))
    return path


def start_controller(folder: Path, port: int, fault: str = "") -> subprocess.Popen[str]:
    """Start a controller process."""
    script = str(TESTS_FOLDER / "udp_robot.py")
    command = [sys.executable, script, str(folder), str(port), fault]
    environment = {**os.environ, "PYTHONPATH": str(TESTS_FOLDER)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def guard_of(controller: int) -> int:
    """Return the process number of a controller's guard, its only child."""
    children = Path(f"/proc/{controller}/task/{controller}/children").read_text().split()
    assert len(children) == 1
    return int(children[0])


def drive_and_break(folder: Path, fault: str, after_s: float = 0.5) -> WireFaultResult:
    """Let a controller drive for a while, break something, and wait for damping."""
    with UdpPeer() as peer:
        controller_fault = fault if fault in CONTROLLER_FAULTS else ""
        process = start_controller(folder, peer.port, controller_fault)
        assert process.stdout is not None
        assert process.stdout.readline() == "driving\n"
        time.sleep(after_s)

        since = 0.0
        if fault in FAULTS:
            peer.fault = fault
        elif fault in SIGNALS:
            since = time.monotonic()
            process.send_signal(SIGNALS[fault])
        elif fault in GUARD_SIGNALS:
            since = time.monotonic()
            os.kill(guard_of(process.pid), GUARD_SIGNALS[fault])

        end = time.monotonic() + 20.0
        while np.isnan(damped_at := peer.first_damping_at(since)) and time.monotonic() < end:
            time.sleep(0.005)

        # Anything that comes after damping must have time to arrive
        time.sleep(0.7)
        if fault == "SIGSTOP":
            process.send_signal(signal.SIGCONT)
        output = process.communicate(timeout=30)[0]
        check_received(peer, damped_at)

        last_command_at = peer.commands()[-1].time
        last_reading_at = peer.last_good_at
        if fault not in FAULTS:
            # The readings went on: the last one before the last command counts
            sent_at = [reading.time for reading in peer.readings.values()]
            last_reading_at = max(t for t in sent_at if t <= last_command_at)
        return WireFaultResult(
            after_reading_s=damped_at - last_reading_at,
            after_command_s=damped_at - last_command_at,
            after_fault_s=damped_at - since if since else float("nan"),
            exit_code=process.returncode,
            output=output.strip(),
        )


def check_received(peer: UdpPeer, damped_at: float) -> None:
    """Raise ``AssertionError`` if anything that arrived was not safe."""
    assert not np.isnan(damped_at)
    commands = peer.commands()
    assert len(commands) > 3
    after_reading_s, _ = damping_bounds_s(PERIOD_S)
    for command in commands:
        assert command.time < damped_at
        reading = peer.readings[command.answered]
        assert np.isfinite(command.targets).all()
        assert (np.abs(command.targets) <= LIMIT["high"]).all()
        # τ = kp (target − q) − kd q̇
        torque = 40 * (command.targets - reading.pos) - reading.vel
        assert (np.abs(torque) <= LIMIT["torque"] + 1e-9).all()
        assert command.time - reading.time <= after_reading_s + SLACK_S
    assert peer.received[-1].kind == DAMP
