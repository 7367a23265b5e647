"""Where a controller stands, and where it may go from there."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from metarobot.bridge.errors import BridgeError


class State(Enum):
    """What the controller is doing."""

    IDLE = "idle"
    """Nothing has been sent."""
    READY = "ready"
    """Moving to the pose an episode begins with, or holding it."""
    RUNNING = "running"
    """The policy acts."""
    DAMPING = "damping"
    """The robot is limp; there is no way back."""
    STOPPED = "stopped"
    """Nothing is sent any more."""


ALLOWED = {
    State.IDLE: (State.READY, State.DAMPING),
    State.READY: (State.RUNNING, State.DAMPING),
    State.RUNNING: (State.READY, State.DAMPING),
    State.DAMPING: (State.STOPPED,),
    State.STOPPED: (),
}
"""State -> the states that may follow it. Every way to ``STOPPED`` leads through ``DAMPING``."""


class Machine:
    """The state, and nothing but allowed changes of it; ``tell`` hears of each, with the reason."""

    def __init__(self, tell: Callable[[State, str], None] = lambda state, why: None) -> None:
        self.state, self._tell = State.IDLE, tell

    def to(self, state: State, why: str = "") -> None:
        """Change the state; raise ``BridgeError`` if there is no such way."""
        if state not in ALLOWED[self.state]:
            ways = ", ".join(s.value for s in ALLOWED[self.state]) or "nowhere"
            raise BridgeError(
                f"from {self.state.value} there is no way to {state.value}; it leads to: {ways}"
            )
        self.state = state
        self._tell(state, why)
