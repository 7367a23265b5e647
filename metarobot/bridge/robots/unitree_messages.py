"""Unitree's Go2 messages as DDS types: fields, layouts in bytes, and checksum.

Fields, names and layout are those of Unitree's SDK2 (``unitree_go/msg/*.idl``, BSD-3). All sizes
are fixed, so a message is a ``struct`` of numbers, in two layouts that differ in padding alone: on
the wire each number is aligned to its own size, and in the robot's memory, over which the checksum
is computed, a C compiler also pads nested structures. One ``unpack`` and the checksum take 45 µs;
cyclonedds, which reads the fields one by one, takes 850 µs.
"""
# annotations are evaluated here, without ``from __future__ import annotations``: cyclonedds makes
# its types of them

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from cyclonedds.idl import IdlStruct
from cyclonedds.idl.annotations import autoid, final
from cyclonedds.idl.types import array, float32, int16, int32, uint8, uint16, uint32

from metarobot.bridge.errors import BridgeError

MOTORS = 20
"""Motors in a message; a Go2 has twelve, which come first."""

# struct formats of the parts of a message: head, each motor, battery, rest
_COMMAND_PARTS = ("4B4IH", *["B5f3I"] * MOTORS, "4B", "40B12B2BB2I")
_STATE_PARTS = ("4B4IH", "13fB", *["B7fB3I"] * MOTORS, "4BiH4B15H", "8hI40BBf2B2f4H2I")
_COMMAND_ON_WIRE = struct.Struct("@" + "".join(_COMMAND_PARTS))
_STATE_ON_WIRE = struct.Struct("@" + "".join(_STATE_PARTS))
# "0I" pads to a multiple of four bytes, as C does around a nested structure
_COMMAND_IN_C = struct.Struct("@" + "0I".join(_COMMAND_PARTS))
_STATE_IN_C = struct.Struct("@" + "0I".join(_STATE_PARTS))

_LITTLE_ENDIAN_HEADER = b"\0\1\0\0"
_LITTLE_ENDIAN_BIT = 1
"""Bit of the header's second byte that is set in little-endian messages."""
_REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
"""Byte -> the same with its bits in reverse order."""


def checksum(message: bytes) -> int:
    """Return the CRC-32 of a message in C's layout without its last word, the checksum's place.

    The polynomial is 0x04C11DB7 and the initial value 0xFFFFFFFF, over little-endian words from
    their highest bit down.
    """
    # zlib takes bits from the lowest up: what it is given is bit-reversed, and its answer too
    words = np.frombuffer(message, "<u4")[:-1].byteswap().tobytes()
    reversed_crc = zlib.crc32(words.translate(_REVERSED_BITS)) ^ 0xFFFFFFFF
    return int.from_bytes(reversed_crc.to_bytes(4, "little").translate(_REVERSED_BITS), "big")


@dataclass
@final
@autoid("sequential")
class MotorCmd(IdlStruct, typename="unitree_go.msg.dds_.MotorCmd_"):
    """A motor's targets, rad, rad/s, N·m, and its gains on the first two."""

    mode: uint8
    q: float32
    dq: float32
    tau: float32
    kp: float32
    kd: float32
    reserve: array[uint32, 3]


@dataclass
@final
@autoid("sequential")
class BmsCmd(IdlStruct, typename="unitree_go.msg.dds_.BmsCmd_"):
    """The battery's part of a command."""

    off: uint8
    reserve: array[uint8, 3]


@final
@autoid("sequential")
class LowCmd(IdlStruct, typename="unitree_go.msg.dds_.LowCmd_"):
    """A command to all motors; only ``numbers`` is used, its values in the order of the fields.

    The checksum, their last, is computed.
    """

    head: array[uint8, 2]
    level_flag: uint8
    frame_reserve: uint8
    sn: array[uint32, 2]
    version: array[uint32, 2]
    bandwidth: uint16
    motor_cmd: array[MotorCmd, MOTORS]
    bms_cmd: BmsCmd
    wireless_remote: array[uint8, 40]
    led: array[uint8, 12]
    fan: array[uint8, 2]
    gpio: uint8
    reserve: uint32
    crc: uint32

    def __init__(self, numbers: Sequence[float]) -> None:
        *body, _ = numbers
        self.numbers = [*body, checksum(_COMMAND_IN_C.pack(*body, 0))]

    def serialize(
        self, buffer: Any = None, endianness: Any = None, use_version_2: Any = None
    ) -> bytes:
        """Return the message as it goes over the wire."""
        return _LITTLE_ENDIAN_HEADER + _COMMAND_ON_WIRE.pack(*self.numbers)


@dataclass
@final
@autoid("sequential")
class IMUState(IdlStruct, typename="unitree_go.msg.dds_.IMUState_"):
    """The trunk's orientation (w, x, y, z), rad/s, m/s², rad, °C."""

    quaternion: array[float32, 4]
    gyroscope: array[float32, 3]
    accelerometer: array[float32, 3]
    rpy: array[float32, 3]
    temperature: uint8


@dataclass
@final
@autoid("sequential")
class MotorState(IdlStruct, typename="unitree_go.msg.dds_.MotorState_"):
    """A motor's measurements: rad, rad/s, rad/s², N·m, the same raw, °C, packets lost."""

    mode: uint8
    q: float32
    dq: float32
    ddq: float32
    tau_est: float32
    q_raw: float32
    dq_raw: float32
    ddq_raw: float32
    temperature: uint8
    lost: uint32
    reserve: array[uint32, 2]


@dataclass
@final
@autoid("sequential")
class BmsState(IdlStruct, typename="unitree_go.msg.dds_.BmsState_"):
    """The battery's charge %, mA, °C, mV."""

    version_high: uint8
    version_low: uint8
    status: uint8
    soc: uint8
    current: int32
    cycle: uint16
    bq_ntc: array[uint8, 2]
    mcu_ntc: array[uint8, 2]
    cell_vol: array[uint16, 15]


@final
@autoid("sequential")
class LowState(IdlStruct, typename="unitree_go.msg.dds_.LowState_"):
    """The robot's measurements; only ``numbers`` is used, the values in the order of the fields."""

    head: array[uint8, 2]
    level_flag: uint8
    frame_reserve: uint8
    sn: array[uint32, 2]
    version: array[uint32, 2]
    bandwidth: uint16
    imu_state: IMUState
    motor_state: array[MotorState, MOTORS]
    bms_state: BmsState
    foot_force: array[int16, 4]
    foot_force_est: array[int16, 4]
    tick: uint32
    wireless_remote: array[uint8, 40]
    bit_flag: uint8
    adc_reel: float32
    temperature_ntc1: uint8
    temperature_ntc2: uint8
    power_v: float32
    power_a: float32
    fan_frequency: array[uint16, 4]
    reserve: uint32
    crc: uint32

    def __init__(self, numbers: tuple[float, ...]) -> None:
        self.numbers = numbers

    @classmethod
    def deserialize(cls, data: bytes, has_header: bool = True, use_version_2: Any = None) -> Self:
        """Read a message as it came over the wire.

        Raises:
            BridgeError: It has another size or byte order.
        """
        header_size = len(_LITTLE_ENDIAN_HEADER)
        little_endian = data[1] & _LITTLE_ENDIAN_BIT
        if not little_endian or len(data) < header_size + _STATE_ON_WIRE.size:
            raise BridgeError(
                f"a LowState of {len(data)} bytes with the header {data[:4].hex()}: not a Go2's"
            )
        return cls(_STATE_ON_WIRE.unpack_from(data, header_size))

    @property
    def is_valid(self) -> bool:
        """Whether the checksum is right."""
        return checksum(_STATE_IN_C.pack(*self.numbers)) == self.numbers[-1]
