"""What robots on a wire have in common: how the wire is opened, awaited and closed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

from metarobot.bridge.errors import BridgeError

if TYPE_CHECKING:
    from metarobot.bridge.robots.dds import Wire

S = TypeVar("S")
C = TypeVar("C")


class Wired(Generic[S, C]):
    """A robot that is one wire, states in and commands out, and holds the last command when no more
    come.
    """

    name: str
    guarded = True

    def __init__(self, interface: str, domain: int, timeout: float) -> None:
        self._place, self._timeout = (interface, domain), timeout
        self._wire: Wire[S, C] | None = None

    def connect(self) -> None:
        """Open the wire; wait for the robot, a while for anybody else who commands it, and for
        readings.
        """
        self._wire = wire = self._open()
        try:
            wire.wait(self._timeout)
            self._await(wire)
        except BridgeError:
            self.disconnect()
            raise

    def disconnect(self) -> None:
        """Close the wire."""
        if self._wire is not None:
            self._wire.close()
        self._wire = None

    def _open(self) -> Wire[S, C]:
        raise NotImplementedError

    def _await(self, wire: Wire[S, C]) -> None:
        raise NotImplementedError

    def _connected(self) -> Wire[S, C]:
        if self._wire is None:
            raise BridgeError(f"{self.name} is not connected")
        return self._wire
