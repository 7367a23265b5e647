"""Measure the controller's loop with a real policy: deadlines at a high rate, and memory over an
hour's steps.

``loop_rate.py POLICY [--hz 500] [--seconds 60] [--steps 180000] [--log PATH]``. The robot is in
this process and costs nothing; reading, reward, observation, policy, limits, sending and log are
what they are on a real one.
"""

import argparse
import contextlib
import os
import resource
from collections.abc import Mapping
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


class Easy:
    """A robot that goes where it is told and is always where an episode may begin."""

    name, identity, guarded = "easy", "easy", False

    def __init__(self, meta: PolicyMetadata, needed: tuple[str, ...], clock: LoopClock) -> None:
        self._clock, self._reading, self._count = clock, dict.fromkeys(needed, 0.0), 0
        self._noise = np.random.default_rng(0)
        pose = zip(meta.joint_names, meta.default_joint_pos, strict=True)
        self._reading |= {f"{joint}.pos": angle for joint, angle in pose}
        self._reading |= {key: 50.0 for key in needed if key.endswith(".force")}
        if "imu.quat.w" in needed:
            self._reading["imu.quat.w"] = 1.0

    def connect(self) -> None:
        """Be there."""

    def get_observation(self) -> dict[str, float]:
        """Say where the joints are, a bit shaken."""
        self._count += 1
        shaken = self._noise.uniform(-0.01, 0.01, len(self._reading)).tolist()
        reading = {k: v + s for (k, v), s in zip(self._reading.items(), shaken, strict=True)}
        return reading | {"stamp": self._clock.now(), "seq": float(self._count)}

    def send_action(self, action: Mapping[str, float]) -> dict[str, float]:
        """Be where the joints are told to be."""
        self._reading.update(action)
        return dict(action)

    def restart(self, episode: int) -> None:
        """Go on as before."""

    def damp(self) -> None:
        """Do nothing."""

    def disconnect(self) -> None:
        """Be gone."""


def live(
    folder: str, hz: float, seconds: float, clock: LoopClock, log: Path | None, show: Any = None
) -> RunReport:
    """Run the controller for so long."""
    policy = OnnxPolicy.load(folder)
    layout = robots.make_layout(policy.meta)
    robot: Any = Easy(policy.meta, layout.needed(), clock)
    settings = RunSettings(hz=hz, seconds=seconds, damp_s=0.1)
    told = {} if show is None else {"show_status": show}
    controller = Controller(policy, robot, layout, settings, clock=clock, log=log, **told)
    with (
        GateWatchdog(controller.gate)
        if isinstance(clock, MonotonicClock)
        else contextlib.nullcontext()
    ):
        return controller.run()


def resident() -> float:
    """Return the memory this process holds now, MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    """Measure both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("policy")
    parser.add_argument("--hz", type=float, default=500.0)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--steps", type=int, default=180_000)
    parser.add_argument("--log", type=Path)
    told = parser.parse_args()
    if told.seconds:
        report = live(told.policy, told.hz, told.seconds, MonotonicClock(), told.log)
        p = report.pace
        print(
            f"{told.hz:g} Hz for {told.seconds:g} s: {report.reason}; log {'off' if told.log is None else 'on'}"
        )
        print("  " + "  ".join(f"{name} {value:.3g}" for name, value in p.items()))
        print(f"  deadlines missed: {p['missed_own']} by the loop, {p['missed_host']} by the host")
    if told.steps:
        held: list[float] = []
        live(
            told.policy,
            50.0,
            told.steps / 50.0,
            SteppedClock(),
            told.log,
            lambda status: held.append(resident()),
        )
        a, b = held[len(held) // 20], held[-1]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        print(
            f"{told.steps:,} steps: {a:.1f} MB after a twentieth, {b:.1f} MB at the end, {peak:.1f} MB at most"
        )


if __name__ == "__main__":
    main()
