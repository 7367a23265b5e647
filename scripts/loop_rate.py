"""Measure the control loop with a real policy: deadlines at a high rate, memory over many steps.

    python scripts/loop_rate.py POLICY [--hz 500] [--seconds 60] [--steps 180000] [--log PATH]

The robot is in this process and costs nothing. Reading, reward, observation, policy, limits,
sending and log are what they are on a real one.
"""

import argparse
import contextlib
import os
import resource
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from metarobot.bridge.controller import Controller
from metarobot.bridge.loop_timing import LoopClock, MonotonicClock, SteppedClock
from metarobot.bridge.policy.metadata import PolicyMetadata
from metarobot.bridge.policy.onnx_policy import OnnxPolicy
from metarobot.bridge.robots import lookup as robots
from metarobot.bridge.run_report import RunReport, RunSettings
from metarobot.bridge.safety.command_gate import GateWatchdog

FOOT_FORCE_N = 50.0
READING_NOISE = 0.01
FOLLOWING_SHARE = 0.2
"""How much of the way to its target a joint moves in a control period."""
STEPPED_HZ = 50.0
"""Control rate of the memory test, on a stepped clock."""


class FreeRobot:
    """A robot whose joints follow their targets, and that is always where an episode may begin."""

    name = "free"
    identity = "free"
    guarded = False

    def __init__(
        self, meta: PolicyMetadata, needed: tuple[str, ...], clock: LoopClock, hz: float
    ) -> None:
        self._clock = clock
        self._hz = hz
        self._count = 0
        self._targets: dict[str, float] = {}
        self._noise_rng = np.random.default_rng(0)
        self._reading = dict.fromkeys(needed, 0.0)
        for joint, angle in zip(meta.joint_names, meta.default_joint_pos, strict=True):
            self._reading[f"{joint}.pos"] = angle
        for key in needed:
            if key.endswith(".force"):
                self._reading[key] = FOOT_FORCE_N
        if "imu.quat.w" in needed:
            self._reading["imu.quat.w"] = 1.0

    def connect(self) -> None:
        """Do nothing."""

    def get_observation(self) -> dict[str, float]:
        """Return the state a control period later, with a little noise."""
        self._count += 1
        for key, target in self._targets.items():
            moved = FOLLOWING_SHARE * (target - self._reading[key])
            self._reading[key] += moved
            # The commands of a robot without joints are no positions
            if key.endswith(".pos"):
                self._reading[f"{key.removesuffix('.pos')}.vel"] = moved * self._hz
        noise = self._noise_rng.uniform(-READING_NOISE, READING_NOISE, len(self._reading)).tolist()
        pairs = zip(self._reading.items(), noise, strict=True)
        reading = {key: value + shift for (key, value), shift in pairs}
        return reading | {"stamp": self._clock.now(), "seq": float(self._count)}

    def send_action(self, action: Mapping[str, float]) -> dict[str, float]:
        """Move the joints towards their targets from now on."""
        self._targets = {key: value for key, value in action.items() if key in self._reading}
        return dict(action)

    def restart(self, episode: int) -> None:
        """Do nothing."""

    def damp(self) -> None:
        """Do nothing."""

    def disconnect(self) -> None:
        """Do nothing."""


def run_loop(
    folder: str,
    hz: float,
    seconds: float,
    clock: LoopClock,
    log: Path | None,
    show_status: Callable[[dict[str, Any]], None] = lambda status: None,
) -> RunReport:
    """Run the controller for so long."""
    policy = OnnxPolicy.load(folder)
    layout = robots.make_layout(policy.meta)
    controller = Controller(
        policy,
        FreeRobot(policy.meta, layout.needed(), clock, hz),
        layout,
        RunSettings(hz=hz, seconds=seconds, damp_s=0.1),
        clock=clock,
        log=log,
        show_status=show_status,
    )
    # The watchdog needs real time: on a stepped clock it would see none pass
    real_time = isinstance(clock, MonotonicClock)
    with GateWatchdog(controller.gate) if real_time else contextlib.nullcontext():
        return controller.run()


def resident_mb() -> float:
    """Return the resident memory of this process, MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    """Measure deadlines, then memory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("policy", help="policy folder")
    parser.add_argument("--hz", type=float, default=500.0, help="control rate")
    parser.add_argument("--seconds", type=float, default=60.0, help="duration; 0: skip")
    parser.add_argument("--steps", type=int, default=180_000, help="of the memory test; 0: skip")
    parser.add_argument("--log", type=Path, help="MCAP file to write")
    options = parser.parse_args()

    if options.seconds:
        report = run_loop(
            options.policy, options.hz, options.seconds, MonotonicClock(), options.log
        )
        timing = report.pace
        log_state = "off" if options.log is None else "on"
        print(f"{options.hz:g} Hz for {options.seconds:g} s: {report.reason}; log {log_state}")
        print("  " + "  ".join(f"{name} {value:.3g}" for name, value in timing.items()))
        print(
            f"  deadlines missed: {timing['missed_own']} by the loop, "
            f"{timing['missed_host']} by the host"
        )

    if options.steps:
        memory_mb: list[float] = []
        run_loop(
            options.policy,
            STEPPED_HZ,
            options.steps / STEPPED_HZ,
            SteppedClock(),
            options.log,
            lambda status: memory_mb.append(resident_mb()),
        )
        early_mb = memory_mb[len(memory_mb) // 20]
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        print(
            f"{options.steps:,} steps: {early_mb:.1f} MB after a twentieth, "
            f"{memory_mb[-1]:.1f} MB at the end, {peak_mb:.1f} MB at most"
        )


if __name__ == "__main__":
    main()
