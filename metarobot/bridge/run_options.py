"""Options of a run, as they are given on the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from metarobot.bridge.errors import BridgeError


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The arguments of ``metarobot run`` and of ``python -m metarobot.bridge``.

    The text under each field is its help on both command lines.
    """

    robot: str = "sim"
    """Robot: sim, ros2, unitree, or module:Class of your own."""
    set: tuple[str, ...] = ()
    """Settings of the robot, name=value; name.part=value for a setting with several parts."""
    hz: float = 0.0
    """Control rate; by default the policy's own."""
    any_rate: bool = False
    """Allow a control rate that the policy was not trained for."""
    seconds: float = 60.0
    """Stop after this time."""
    trials: int = 0
    """Stop after this many trials; 0: no limit but the time."""
    episodes: int = 0
    """Episodes per trial; 0: as many as the policy was trained for."""
    command: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """For walking robots: forward and sideways velocity, m/s, and turn rate, rad/s."""
    log: Path | None = None
    """MCAP file to which every step is written."""
    log_part_mb: float = 64.0
    """Size at which the log goes on in another file: run.mcap, run.part2.mcap, ..."""
    log_max_mb: float = 2000.0
    """Size of all these files at which the oldest but the first are deleted."""
    adapt: bool = False
    """Let an agent that adapts between episodes do so, in a second process, which needs torch."""
    rollouts: int = 0
    """Episodes to collect before each adaptation; 0: as many as the agent was trained with."""
    kl: float = 60.0
    """Largest KL divergence of the adapted policy from the old one; a larger one is rejected."""
    run: str = ""
    """Run folder of the agent that adapts; by default the one the policy was exported from."""
    ready_s: float = 2.0
    """Seconds that the robot takes to move to the pose an episode begins with."""
    soft_s: float = 1.0
    """Seconds over which the policy's commands are blended in at an episode's start."""
    rate: float = 2.0
    """Fastest motion of a joint's target, as a multiple of the joint's speed limit."""
    seed: int = 0
    """Seed of the noise of agents that explore."""
    plain: bool = False
    """Print status lines instead of a panel."""

    def check(self) -> None:
        """Raise ``BridgeError`` for values that make no sense."""
        positive = {"seconds": self.seconds, "rate": self.rate, "log_part_mb": self.log_part_mb}
        for name, value in positive.items():
            if not 0 < value < math.inf:
                raise BridgeError(f"{name} must be above 0, not {value:g}")

        not_negative = {
            "trials": self.trials,
            "episodes": self.episodes,
            "rollouts": self.rollouts,
            "ready_s": self.ready_s,
            "soft_s": self.soft_s,
            "seed": self.seed,
        }
        for name, value in not_negative.items():
            if not 0 <= value < math.inf:
                raise BridgeError(f"{name} must be at least 0, not {value:g}")

        if not 3 * self.log_part_mb <= self.log_max_mb < math.inf:
            raise BridgeError(
                f"log_max_mb must be at least three times log_part_mb, which is "
                f"{self.log_part_mb:g}, not {self.log_max_mb:g}"
            )

        if not all(map(math.isfinite, self.command)):
            raise BridgeError(f"command must be three numbers, not {self.command}")
