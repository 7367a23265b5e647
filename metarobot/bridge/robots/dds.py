"""DDS on one network interface: participants, readers, writers, and who is at their other end.

DDS is the publish-subscribe protocol of ROS 2 and of Unitree's robots. This is the one file that
uses it, by the package ``cyclonedds``.
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

# Without IgnoreTypeInformation, participants of Fast DDS, which is ROS 2's default, are found but
# never matched.
_CONFIG = """<CycloneDDS><Domain Id="any">
  <General><Interfaces><NetworkInterface name="{interface}"/></Interfaces></General>
  <Discovery><ParticipantIndex>auto</ParticipantIndex>{peers}</Discovery>
  <Compatibility><IgnoreTypeInformation>1.15</IgnoreTypeInformation></Compatibility>
</Domain></CycloneDDS>"""
# The loopback interface carries no multicast, so participants there are looked for one by one.
_LOOPBACK_PEERS = '<Peers><Peer Address="127.0.0.1"/></Peers>'
LISTEN = 0.3
"""How long ``connect`` listens for another controller's commands, s: one of 10 Hz is noticed."""
POLL_S = 0.005
"""Interval at which a condition is polled, s."""
INTERFACE_UP_FLAG = 1
"""Bit of an interface's flags that is set if it is up (IFF_UP)."""

MessageT = TypeVar("MessageT")
StateT = TypeVar("StateT")
CommandT = TypeVar("CommandT")

_open_domains: dict[int, _OpenDomain] = {}


class _OpenDomain:
    """A DDS domain that this process has open.

    cyclonedds allows one of a number in a process, shared by all its participants.
    """

    def __init__(self, number: int, interface: str) -> None:
        self.number = number
        self.interface = interface
        self.users = 0
        peers = _LOOPBACK_PEERS if interface == "lo" else ""
        self.entity = Domain(number, _CONFIG.format(interface=interface, peers=peers))


class DdsReader(Generic[MessageT]):
    """The newest messages of a topic; older ones are overwritten unread."""

    def __init__(self, reader: DataReader[Any]) -> None:
        self._reader = reader

    def newest(self) -> MessageT | None:
        """Return the newest message if it was not returned before, else None; never wait.

        Raises:
            BridgeError: The bytes are no message of the topic's type.
        """
        try:
            samples = self._reader.take(1)
        except BridgeError:
            raise
        except Exception as error:  # decoding errors have many types
            raise BridgeError(
                f"a message on {self._reader.topic.name} cannot be read: {error}"
            ) from error
        if not samples or isinstance(samples[0], InvalidSample):
            return None
        message: MessageT = samples[0]
        return message

    @property
    def publishers(self) -> int:
        """How many publish on the topic; one that was killed is counted for 10 s more."""
        return int(self._reader.get_subscription_matched_status().current_count)


class DdsWriter(Generic[MessageT]):
    """Publish on a topic without waiting; a slow subscriber misses messages."""

    def __init__(self, writer: DataWriter[Any]) -> None:
        self._writer = writer

    def send(self, message: MessageT) -> None:
        """Send a message, from any thread.

        Raises:
            BridgeError: It cannot be written.
        """
        try:
            self._writer.write(message)
        except DDSException as error:
            raise BridgeError(f"cannot write to {self._writer.topic.name}: {error}") from error

    @property
    def listeners(self) -> int:
        """How many subscribe to the topic; one that was killed is counted for 10 s more."""
        return int(self._writer.get_publication_matched_status().current_count)


class DdsParticipant:
    """A participant of a DDS domain, on one network interface and no other.

    Args:
        interface: Name of the network interface.
        domain: Number of the domain.

    Raises:
        BridgeError: The interface is missing, down or cannot be opened; those that are up are
            listed.
    """

    def __init__(self, interface: str, domain: int) -> None:
        check_interface(interface)
        self.place = f"{interface}, domain {domain}"
        try:
            if domain not in _open_domains:
                _open_domains[domain] = _OpenDomain(domain, interface)
            open_domain = _open_domains[domain]
            if open_domain.interface != interface:
                raise BridgeError(
                    f"domain {domain} is open on {open_domain.interface}, so not on {interface} too"
                )
            self._participant = DomainParticipant(domain)
        except DDSException as error:
            raise BridgeError(
                f"cannot open DDS on {self.place}: {error} Interfaces up: {_interfaces_up()}"
            ) from error
        open_domain.users += 1
        self.close = weakref.finalize(self, _leave_domain, self._participant, open_domain)
        """Leave the domain, which the other participants are told; a second call does nothing."""

    def reader(
        self,
        topic: str,
        message_type: type[MessageT],
        foreign: bool = False,
        depth: int = 1,
        latched: bool = False,
    ) -> DdsReader[MessageT]:
        """Subscribe to a topic.

        Args:
            topic: Its name.
            message_type: Its type.
            foreign: Leave out what this participant publishes.
            depth: Messages that are kept until they are read, one at a time from the oldest.
            latched: Get the last message of before this reader was there.
        """
        policies = [Policy.History.KeepLast(depth)]
        if foreign:
            policies.append(Policy.IgnoreLocal.Participant)
        if latched:
            policies.append(Policy.Durability.TransientLocal)
            policies.append(Policy.Reliability.Reliable(duration(milliseconds=1)))
        dds_topic = Topic(self._participant, topic, message_type)
        return DdsReader(DataReader(self._participant, dds_topic, Qos(*policies)))

    def writer(
        self, topic: str, message_type: type[MessageT], latched: bool = False
    ) -> DdsWriter[MessageT]:
        """Publish on a topic, reliably, as subscribers to commands ask for.

        With ``latched``, whoever comes later gets the last message.
        """
        reliable = Policy.Reliability.Reliable(duration(milliseconds=1))
        policies = [reliable, Policy.History.KeepLast(1)]
        if latched:
            policies.append(Policy.Durability.TransientLocal)
        dds_topic = Topic(self._participant, topic, message_type)
        return DdsWriter(DataWriter(self._participant, dds_topic, Qos(*policies)))

    def wait(self, ready: Callable[[], bool], timeout: float, missing: Callable[[], str]) -> None:
        """Poll a condition until it is true.

        Raises:
            BridgeError: ``timeout`` seconds have passed; the message is that of ``missing``.
        """
        end = time.monotonic() + timeout
        while not ready():
            if time.monotonic() > end:
                raise BridgeError(f"{missing()} within {timeout:g} s on {self.place}")
            time.sleep(POLL_S)


class DdsConnection(Generic[StateT, CommandT]):
    """A robot's two topics: states in, and commands out by one controller alone.

    After ``damp`` no other command is sent.

    Args:
        participant: The participant that reads and writes.
        states: Name and message type of the topic of states.
        commands: Name and message type of the topic of commands.
        guard: Whether this is the guard process beside a controller, which damps the robot when the
            controller dies. A guard tolerates the controller's commands.
    """

    def __init__(
        self,
        participant: DdsParticipant,
        states: tuple[str, type[StateT]],
        commands: tuple[str, type[CommandT]],
        guard: bool,
    ) -> None:
        self.participant = participant
        self._states_topic = states[0]
        self._commands_topic = commands[0]
        self._reader = participant.reader(*states)
        self._writer = participant.writer(*commands)
        self._other_commands = None if guard else participant.reader(*commands, foreign=True)
        self._damping_command: CommandT | None = None
        self.newest = self._reader.newest
        """Return the newest state, as ``DdsReader.newest`` does."""
        self.close = participant.close
        """Leave the domain."""

    def wait(self, timeout: float) -> None:
        """Wait until the robot publishes and listens, and check that nobody else commands it.

        Raises:
            BridgeError: It does not within ``timeout`` seconds, or somebody else does.
        """
        self.participant.wait(
            lambda: self._reader.publishers > 0,
            timeout,
            lambda: f"nobody publishes {self._states_topic}",
        )
        self.participant.wait(
            lambda: self._writer.listeners > 0,
            timeout,
            lambda: f"nobody listens to {self._commands_topic}",
        )
        if self._other_commands:
            time.sleep(LISTEN)
        self.check()

    def check(self) -> None:
        """Check the connection.

        Raises:
            BridgeError: The robot has left, or somebody else commands it.
        """
        if self._somebody_else_commands():
            raise BridgeError(
                f"another controller publishes {self._commands_topic} on "
                f"{self.participant.place}; stop it first"
            )
        if not self._reader.publishers:
            raise BridgeError(f"link lost: nobody publishes {self._states_topic} any more")
        if not self._writer.listeners:
            raise BridgeError(f"link lost: nobody listens to {self._commands_topic} any more")

    def _somebody_else_commands(self) -> bool:
        if self._other_commands is None:
            return False
        try:
            return self._other_commands.newest() is not None
        except BridgeError:
            # What cannot be read was published all the same
            return True

    def send(self, command: CommandT) -> bool:
        """Send a command and return True; after ``damp``, send nothing and return False."""
        if self._damping_command is not None:
            return False
        self._writer.send(command)
        # damp may have been called meanwhile, from another thread: its command must be the last
        if self._damping_command is not None:
            self._writer.send(self._damping_command)
        return True

    def damp(self, command: CommandT) -> None:
        """Send a last command, from any thread, without a lock; ``send`` does nothing after it."""
        self._damping_command = command
        self._writer.send(command)


def _leave_domain(participant: DomainParticipant, open_domain: _OpenDomain) -> None:
    # explicit: the garbage collector does not delete an entity in a cycle in the DDS library
    participant.__del__()
    open_domain.users -= 1
    if not open_domain.users:
        _open_domains.pop(open_domain.number).entity.__del__()


def check_interface(interface: str) -> None:
    """Check that a network interface exists and is up.

    Raises:
        BridgeError: It does not, or is down.
    """
    names = [name for _, name in socket.if_nameindex()]
    if interface not in names:
        raise BridgeError(f"no network interface {interface!r}; there are {', '.join(names)}")
    if not _is_up(interface):
        raise BridgeError(f"the network interface {interface!r} is down; up are {_interfaces_up()}")


def _is_up(interface: str) -> bool:
    flags = int(Path(f"/sys/class/net/{interface}/flags").read_text(), 16)
    return bool(flags & INTERFACE_UP_FLAG)


def _interfaces_up() -> str:
    return ", ".join(name for _, name in socket.if_nameindex() if _is_up(name))
