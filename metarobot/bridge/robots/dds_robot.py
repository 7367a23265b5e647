"""Base class of the robots on DDS (ROS 2 and Unitree): open, wait for and close the connection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

from metarobot.bridge.errors import BridgeError

if TYPE_CHECKING:
    from metarobot.bridge.robots.dds import DdsConnection

StateT = TypeVar("StateT")
CommandT = TypeVar("CommandT")


class DdsRobot(Generic[StateT, CommandT]):
    """A robot with a topic of states and a topic of commands, which holds the last command.

    Args:
        interface: Network interface.
        domain: DDS domain.
        timeout: How long ``connect`` waits for each thing it needs, s.
    """

    name: str
    guarded = True

    def __init__(self, interface: str, domain: int, timeout: float) -> None:
        self._interface = interface
        self._domain = domain
        self._timeout = timeout
        self._connection: DdsConnection[StateT, CommandT] | None = None

    def connect(self) -> None:
        """Open the connection, and wait for the robot and its first readings.

        Raises:
            BridgeError: The robot does not answer, or another controller commands it.
        """
        self._connection = self._open()
        try:
            self._connection.wait(self._timeout)
            self._await_readings(self._connection)
        except BridgeError:
            self.disconnect()
            raise

    def disconnect(self) -> None:
        """Close the connection; a second call does nothing."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def _open(self) -> DdsConnection[StateT, CommandT]:
        """Open the connection, without waiting for anything."""
        raise NotImplementedError

    def _await_readings(self, connection: DdsConnection[StateT, CommandT]) -> None:
        """Wait until there is a complete reading."""
        raise NotImplementedError

    def _connected(self) -> DdsConnection[StateT, CommandT]:
        """Return the connection; raise ``BridgeError`` if there is none."""
        if self._connection is None:
            raise BridgeError(f"{self.name} is not connected")
        return self._connection
