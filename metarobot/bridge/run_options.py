"""What a run is told on the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from metarobot.bridge.errors import BridgeError


@dataclass(frozen=True, kw_only=True)
class Options:
    """The arguments of ``metarobot run``, and of ``python -m metarobot.bridge``."""

    robot: str = "sim"
    """Robot: sim, ros2, unitree, or module:Class of your own."""
    set: tuple[str, ...] = ()
    """Settings of the robot, name=value; name.part=value where there are several."""
    hz: float = 0.0
    """Control rate; the policy's own if not given."""
    any_rate: bool = False
    """Run at a rate that the policy was not trained for."""
    seconds: float = 60.0
    """When to stop."""
    trials: int = 0
    """When to stop, too: after so many trials; 0 is as many as there is time for."""
    episodes: int = 0
    """Episodes a trial; 0 is as many as the policy was trained for."""
    command: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """For walkers: forward and sideways velocity, m/s, and turn, rad/s."""
    log: Path | None = None
    """MCAP file to write every step to."""
    adapt: bool = False
    """Let an agent that adapts between episodes do so, in a process beside this one that has
    torch."""
    rollouts: int = 0
    """Episodes to live before each adaptation; 0 is as many as the agent was trained with."""
    kl: float = 100.0
    """How far an adaptation may move the policy, KL divergence; what moves it further is
    refused."""
    run: str = ""
    """Run folder that adapts; the one the policy was exported from if not given."""
    ready_s: float = 2.0
    """How long the robot takes to the pose that an episode begins with."""
    soft_s: float = 1.0
    """How long the policy's commands are blended in at an episode's start."""
    rate: float = 2.0
    """How fast a target may move, as a multiple of the joint's speed limit."""
    seed: int = 0
    """Draws the noise of agents that explore."""
    plain: bool = False
    """Show lines, not a panel."""

    def check(self) -> None:
        """Raise ``BridgeError`` for what makes no sense."""
        for name in ("seconds", "rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise BridgeError(f"{name} must be above 0, not {getattr(self, name):g}")
        for name in ("trials", "episodes", "rollouts", "ready_s", "soft_s", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise BridgeError(f"{name} must be at least 0, not {getattr(self, name):g}")
        if not all(map(math.isfinite, self.command)):
            raise BridgeError(f"command must be three numbers, not {self.command}")
