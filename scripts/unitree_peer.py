"""A Go2 made of Unitree's own SDK, its message types and its checksum: motors go where LowCmd says.
Needs that SDK.

Publishes rt/lowstate at a fixed rate. Ends on SIGTERM or SIGINT, and then prints what came in as
JSON.
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

# the SDK's own configuration, and where to look for others: the loopback interface carries no
# multicast
ON_LOOPBACK = """<CycloneDDS><Domain Id="any">
<General><Interfaces><NetworkInterface name="$__IF_NAME__$"/></Interfaces></General>
<Discovery><ParticipantIndex>auto</ParticipantIndex><Peers><Peer Address="127.0.0.1"/></Peers></Discovery>
</Domain></CycloneDDS>"""


class Go2:
    def __init__(self) -> None:
        self.crc, self.state = CRC(), unitree_go_msg_dds__LowState_()
        self.state.head = [0xFE, 0xEF]
        self.state.imu_state.quaternion = [1.0, 0.0, 0.0, 0.0]
        self.state.foot_force = [40, 41, 42, 43]
        self.count = {"commands": 0, "bad_checksum": 0, "not_low_level": 0}
        self.last: list[list[float]] = []

    def command(self, message: LowCmd_) -> None:
        self.count["commands"] += 1
        self.count["bad_checksum"] += self.crc.Crc(message) != message.crc
        self.count["not_low_level"] += (list(message.head), message.level_flag) != (
            [0xFE, 0xEF],
            0xFF,
        )
        self.last = [[m.mode, m.q, m.dq, m.tau, m.kp, m.kd] for m in message.motor_cmd[:12]]
        for motor, (_, q, _, _, kp, kd) in zip(self.state.motor_state, self.last, strict=False):
            if kp > 0:
                motor.q, motor.dq, motor.tau_est = q, kd, kp

    def publish(self, publisher: channel.ChannelPublisher, tick: int) -> None:
        self.state.tick = tick
        self.state.crc = self.crc.Crc(self.state)
        publisher.Write(self.state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interface", default="lo")
    parser.add_argument("--domain", type=int, default=0)
    parser.add_argument("--hz", type=float, default=100.0)
    args = parser.parse_args()
    channel.ChannelConfigHasInterface = (
        ON_LOOPBACK if args.interface == "lo" else channel.ChannelConfigHasInterface
    )
    channel.ChannelFactoryInitialize(args.domain, args.interface)
    robot = Go2()
    publisher = channel.ChannelPublisher("rt/lowstate", LowState_)
    publisher.Init()
    subscriber = channel.ChannelSubscriber("rt/lowcmd", LowCmd_)
    subscriber.Init(robot.command, 100)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    print("ready", flush=True)
    begun = time.monotonic()
    try:
        while True:
            robot.publish(publisher, round((time.monotonic() - begun) * 1e3))
            time.sleep(1 / args.hz)
    finally:
        print(json.dumps(robot.count | {"last": robot.last}), flush=True)


if __name__ == "__main__":
    main()
