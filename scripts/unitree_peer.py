"""A Go2 at the other end of DDS, made of Unitree's own SDK: its message types and its checksum.

Its motors jump to the angles of ``rt/lowcmd``; ``rt/lowstate`` is published at a fixed rate. It
ends on SIGTERM or SIGINT, and then prints what it received as JSON. It needs the SDK:
scripts/unitree_peer.sh installs it.
"""

import argparse
import json
import signal
import sys
import time

from unitree_sdk2py.core import channel
from unitree_sdk2py.idl.default import unitree_go_msg_dds__LowState_
from unitree_sdk2py.idl.unitree_go.msg.dds_ import LowCmd_, LowState_
from unitree_sdk2py.utils.crc import CRC

# The SDK's own configuration, and where to look for other participants: the loopback interface
# carries no multicast.
LOOPBACK_CONFIG = """<CycloneDDS><Domain Id="any">
<General><Interfaces><NetworkInterface name="$__IF_NAME__$"/></Interfaces></General>
<Discovery><ParticipantIndex>auto</ParticipantIndex>
<Peers><Peer Address="127.0.0.1"/></Peers></Discovery>
</Domain></CycloneDDS>"""
HEAD = [0xFE, 0xEF]
LOW_LEVEL_FLAG = 0xFF
MOTORS = 12
COMMAND_QUEUE_LENGTH = 100


class SdkGo2:
    """The robot: its last command, what it counted, and its state."""

    def __init__(self) -> None:
        self.crc = CRC()
        self.state = unitree_go_msg_dds__LowState_()
        self.state.head = HEAD
        self.state.imu_state.quaternion = [1.0, 0.0, 0.0, 0.0]
        self.state.foot_force = [40, 41, 42, 43]
        self.counts = {"commands": 0, "bad_checksum": 0, "not_low_level": 0}
        self.last_command: list[list[float]] = []

    def receive(self, message: LowCmd_) -> None:
        """Count a command, and move the motors that have a position gain to their targets."""
        is_low_level = list(message.head) == HEAD and message.level_flag == LOW_LEVEL_FLAG
        self.counts["commands"] += 1
        self.counts["bad_checksum"] += self.crc.Crc(message) != message.crc
        self.counts["not_low_level"] += not is_low_level

        self.last_command = [
            [m.mode, m.q, m.dq, m.tau, m.kp, m.kd] for m in message.motor_cmd[:MOTORS]
        ]
        pairs = zip(self.state.motor_state, self.last_command, strict=False)
        for motor, (_mode, angle, _speed, _torque, kp, kd) in pairs:
            if kp > 0:
                motor.q = angle
                # the gains come back as speed and torque, for the test to see
                motor.dq = kd
                motor.tau_est = kp

    def publish(self, publisher: channel.ChannelPublisher, tick_ms: int) -> None:
        """Publish the state with its checksum."""
        self.state.tick = tick_ms
        self.state.crc = self.crc.Crc(self.state)
        publisher.Write(self.state)


def main() -> None:
    """Publish until a signal comes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interface", default="lo")
    parser.add_argument("--domain", type=int, default=0)
    parser.add_argument("--hz", type=float, default=100.0)
    args = parser.parse_args()

    if args.interface == "lo":
        channel.ChannelConfigHasInterface = LOOPBACK_CONFIG
    channel.ChannelFactoryInitialize(args.domain, args.interface)
    robot = SdkGo2()
    publisher = channel.ChannelPublisher("rt/lowstate", LowState_)
    publisher.Init()
    subscriber = channel.ChannelSubscriber("rt/lowcmd", LowCmd_)
    subscriber.Init(robot.receive, COMMAND_QUEUE_LENGTH)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))

    print("ready", flush=True)
    started = time.monotonic()
    try:
        while True:
            robot.publish(publisher, round((time.monotonic() - started) * 1e3))
            time.sleep(1 / args.hz)
    finally:
        print(json.dumps(robot.counts | {"last": robot.last_command}), flush=True)


if __name__ == "__main__":
    main()
