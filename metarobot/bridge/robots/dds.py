"""DDS on one network interface: participants, topics and who is at their other end. The one file
that opens it.
"""

from __future__ import annotations

import socket
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from metarobot.bridge.errors import BridgeError

try:
    from cyclonedds.core import DDSException
    from cyclonedds.domain import Domain, DomainParticipant
    from cyclonedds.internal import InvalidSample
    from cyclonedds.pub import DataWriter
    from cyclonedds.qos import Policy, Qos
    from cyclonedds.sub import DataReader
    from cyclonedds.topic import Topic
    from cyclonedds.util import duration
except ImportError as missing:
    raise BridgeError(
        "robots on DDS need the package cyclonedds: pip install 'metarobot[deploy]'"
    ) from missing

# without IgnoreTypeInformation, Fast DDS, which is ROS 2's default, is heard but never matched; and
# the loopback
# interface carries no multicast, so participants there are looked for one by one
_CONFIG = """<CycloneDDS><Domain Id="any">
  <General><Interfaces><NetworkInterface name="{interface}"/></Interfaces></General>
  <Discovery><ParticipantIndex>auto</ParticipantIndex>{peers}</Discovery>
  <Compatibility><IgnoreTypeInformation>1.15</IgnoreTypeInformation></Compatibility>
</Domain></CycloneDDS>"""
_LOOPBACK_PEERS = '<Peers><Peer Address="127.0.0.1"/></Peers>'
LISTEN = 0.3
"""How long ``connect`` listens for another controller, s: one of 10 Hz is heard."""

T = TypeVar("T")
S = TypeVar("S")
C = TypeVar("C")

_domains: dict[int, _Domain] = {}


class _Domain:
    """A domain as this process has it open: cyclonedds allows one of a number, shared by all its
    participants.
    """

    def __init__(self, number: int, interface: str) -> None:
        self.number, self.interface, self.users = number, interface, 0
        peers = _LOOPBACK_PEERS if interface == "lo" else ""
        self.entity = Domain(number, _CONFIG.format(interface=interface, peers=peers))


class Inbox(Generic[T]):
    """The newest message of a topic; older ones are overwritten unread."""

    def __init__(self, reader: DataReader[Any]) -> None:
        self._reader = reader

    def newest(self) -> T | None:
        """Return the newest message not returned before, or None; never waits.

        Raises ``BridgeError`` for bytes that are no message of the topic's type.
        """
        try:
            samples = self._reader.take(1)
        except BridgeError:
            raise
        except Exception as error:
            raise BridgeError(
                f"a message on {self._reader.topic.name} cannot be read: {error}"
            ) from error
        return None if not samples or isinstance(samples[0], InvalidSample) else samples[0]

    @property
    def publishers(self) -> int:
        """How many publish here. One that is killed is counted for 10 s more; one that leaves, no
        longer.
        """
        return int(self._reader.get_subscription_matched_status().current_count)


class Outbox(Generic[T]):
    """The way out to a topic. Writing never waits: who has not taken a message when the next one
    comes, misses it.
    """

    def __init__(self, writer: DataWriter[Any]) -> None:
        self._writer = writer

    def send(self, message: T) -> None:
        """Send a message; from any thread."""
        try:
            self._writer.write(message)
        except DDSException as error:
            raise BridgeError(f"cannot write to {self._writer.topic.name}: {error}") from error

    @property
    def listeners(self) -> int:
        """How many subscribe here; as for ``Inbox.publishers``."""
        return int(self._writer.get_publication_matched_status().current_count)


class Link:
    """A participant in a DDS domain, on one network interface and no other.

    Raises ``BridgeError`` that lists the interfaces there are, if this one is missing, down or
    cannot be opened.
    """

    def __init__(self, interface: str, domain: int) -> None:
        check_interface(interface)
        self.place = f"{interface}, domain {domain}"
        try:
            home = _domains.get(domain) or _domains.setdefault(domain, _Domain(domain, interface))
            if home.interface != interface:
                raise BridgeError(
                    f"domain {domain} is open on {home.interface}, so not on {interface} too"
                )
            self._participant = DomainParticipant(domain)
        except DDSException as error:
            raise BridgeError(
                f"cannot open DDS on {self.place}: {error} Interfaces up: {_up()}"
            ) from error
        home.users += 1
        self.close = weakref.finalize(self, _leave, self._participant, home)
        """Leave the domain; everybody there is told. A second time does nothing."""

    def reader(self, topic: str, kind: type[T], foreign: bool = False) -> Inbox[T]:
        """Subscribe to a topic; ``foreign`` leaves out what this link itself publishes."""
        policies = [
            Policy.History.KeepLast(1),
            *([Policy.IgnoreLocal.Participant] if foreign else []),
        ]
        return Inbox(
            DataReader(self._participant, Topic(self._participant, topic, kind), Qos(*policies))
        )

    def writer(self, topic: str, kind: type[T]) -> Outbox[T]:
        """Publish a topic, reliably, as those ask who listen for commands."""
        qos = Qos(Policy.Reliability.Reliable(duration(milliseconds=1)), Policy.History.KeepLast(1))
        return Outbox(DataWriter(self._participant, Topic(self._participant, topic, kind), qos))

    def wait(self, ready: Callable[[], bool], timeout: float, missing: Callable[[], str]) -> None:
        """Poll until something is so; ``missing`` says what was not there within ``timeout``
        seconds.
        """
        end = time.monotonic() + timeout
        while not ready():
            if time.monotonic() > end:
                raise BridgeError(f"{missing()} within {timeout:g} s on {self.place}")
            time.sleep(0.005)


class Wire(Generic[S, C]):
    """A robot's two topics: states in, commands out, by one controller alone and never again after
    damping.

    A ``guard`` stands beside a controller, to damp when that one dies, and does not mind it.
    """

    def __init__(
        self, link: Link, states: tuple[str, type[S]], commands: tuple[str, type[C]], guard: bool
    ) -> None:
        self.link, self._topics = link, (states[0], commands[0])
        self._in, self._out = link.reader(*states), link.writer(*commands)
        self._others = None if guard else link.reader(*commands, foreign=True)
        self._damping: C | None = None
        self.newest, self.close = self._in.newest, link.close

    def wait(self, timeout: float) -> None:
        """Wait until the robot is at both ends, and then a while for another controller's
        commands.
        """
        states, commands = self._topics
        self.link.wait(
            lambda: self._in.publishers > 0, timeout, lambda: f"nobody publishes {states}"
        )
        self.link.wait(
            lambda: self._out.listeners > 0, timeout, lambda: f"nobody listens to {commands}"
        )
        if self._others:
            time.sleep(LISTEN)
        self.check()

    def check(self) -> None:
        """Raise ``BridgeError`` if the robot has left, or somebody else commands it."""
        states, commands = self._topics
        if self._others and self._others.newest() is not None:
            raise BridgeError(
                f"another controller publishes {commands} on {self.link.place}; stop it first"
            )
        if not self._in.publishers:
            raise BridgeError(f"link lost: nobody publishes {states} any more")
        if not self._out.listeners:
            raise BridgeError(f"link lost: nobody listens to {commands} any more")

    def send(self, command: C) -> bool:
        """Send a command and return True; once ``damp`` was called, send nothing."""
        if self._damping is not None:
            return False
        self._out.send(command)
        # damp may have come in between, from another thread: its command must be the last
        if self._damping is not None:
            self._out.send(self._damping)
        return True

    def damp(self, command: C) -> None:
        """Send a last command; only ``damp`` sends from now on. From any thread, without a lock."""
        self._damping = command
        self._out.send(command)


def _leave(participant: DomainParticipant, home: _Domain) -> None:
    # __del__ by hand: left to the garbage collector, an entity in a cycle is not deleted in the
    # library
    participant.__del__()
    home.users -= 1
    if not home.users:
        _domains.pop(home.number).entity.__del__()


def check_interface(interface: str) -> None:
    """Raise ``BridgeError`` if a network interface is not there or is down."""
    names = [name for _, name in socket.if_nameindex()]
    if interface not in names:
        raise BridgeError(f"no network interface {interface!r}; there are {', '.join(names)}")
    if not _is_up(interface):
        raise BridgeError(f"the network interface {interface!r} is down; up are {_up()}")


def _is_up(interface: str) -> bool:
    # bit 0 is IFF_UP
    return bool(int(Path(f"/sys/class/net/{interface}/flags").read_text(), 16) & 1)


def _up() -> str:
    return ", ".join(name for _, name in socket.if_nameindex() if _is_up(name))
