"""The controller's states, and the transitions allowed between them."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from metarobot.bridge.errors import BridgeError


class ControllerState(Enum):
    """What the controller is doing."""

    IDLE = "idle"
    """Nothing has been sent."""
    READY = "ready"
    """Moving the robot to the pose an episode begins with, or holding it there."""
    RUNNING = "running"
    """The policy acts."""
    DAMPING = "damping"
    """The robot is damped; there is no transition back."""
    STOPPED = "stopped"
    """Nothing is sent any more."""


ALLOWED_TRANSITIONS = {
    ControllerState.IDLE: (ControllerState.READY, ControllerState.DAMPING),
    ControllerState.READY: (ControllerState.RUNNING, ControllerState.DAMPING),
    ControllerState.RUNNING: (ControllerState.READY, ControllerState.DAMPING),
    ControllerState.DAMPING: (ControllerState.STOPPED,),
    ControllerState.STOPPED: (),
}
"""State -> states that may follow it. Every path to ``STOPPED`` leads through ``DAMPING``."""


class ControllerStateMachine:
    """The current state, and allowed transitions only.

    Args:
        on_change: Called after each transition with the new state and the reason.
    """

    def __init__(
        self,
        on_change: Callable[[ControllerState, str], None] = lambda state, reason: None,
    ) -> None:
        self.state = ControllerState.IDLE
        self._on_change = on_change

    def enter(self, state: ControllerState, reason: str = "") -> None:
        """Change to a state.

        Raises:
            BridgeError: the transition is not allowed; the state stays what it was.
        """
        allowed = ALLOWED_TRANSITIONS[self.state]
        if state not in allowed:
            names = ", ".join(s.value for s in allowed) or "none"
            raise BridgeError(
                f"no transition from {self.state.value} to {state.value}; allowed: {names}"
            )
        self.state = state
        self._on_change(state, reason)
