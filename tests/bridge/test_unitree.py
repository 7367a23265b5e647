import json
import math
import os
import struct
import subprocess
import time
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_args

import bridging
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wires import beating, domain, meta, until

from metarobot.bridge.controller import Controller
from metarobot.bridge.errors import BridgeError, OperatorStopError
from metarobot.bridge.robots import unitree_messages as go
from metarobot.bridge.robots.dds import DdsParticipant
from metarobot.bridge.robots.unitree import JOINTS, POS_STOP, VEL_STOP, UnitreeRobot
from metarobot.bridge.robots.unitree_health import Go2Health
from metarobot.bridge.run_report import RunSettings

idl = pytest.importorskip("cyclonedds.idl")

ZEROS = {go.LowCmd: 0x4B5A4880, go.LowState: 0x85F11EA6}
"""Checksums of messages of zeros by Unitree's own library (``crc_amd64.so`` of
unitree_sdk2_python)."""
ROOT = Path(__file__).parents[2]
HEADER = b"\0\1\0\0"
TEMPERATURES = slice(23 + 8, 23 + 12 * 12, 12)
MODES = range(23, 23 + 12 * 12, 12)
WELL = dict.fromkeys(MODES, 1) | {266: 80, 337: 0}
"""Index of a number -> value on a robot that is well: servo mode, charge, no flags."""


@cache
def plain(kind: type) -> type:
    """The same type, read and written field by field by cyclonedds."""
    return idl.make_idl_struct(kind.__name__, kind.__idl_typename__, dict(kind.__annotations__))


def filled(kind: type, numbers: Iterator[float]) -> Any:
    """A message of a plain type with these numbers in order."""

    def field(annotation: Any) -> Any:
        if get_args(annotation) and hasattr(array := get_args(annotation)[1], "length"):
            return [field(array.subtype) for _ in range(array.length)]
        return filled(annotation, numbers) if hasattr(annotation, "__idl__") else next(numbers)

    return plain(kind)(*[field(annotation) for annotation in kind.__annotations__.values()])


def sealed(state: list[float]) -> Any:
    """A LowState of these numbers, its checksum made right."""
    state[-1] = go.checksum(go._STATE_IN_C.pack(*state))
    return filled(go.LowState, iter(state))


def flat(message: Any) -> list[float]:
    """The numbers of a message in order."""
    if isinstance(message, list | bytes):
        return [number for part in message for number in flat(part)]
    return (
        flat([getattr(message, name) for name in message.__annotations__])
        if hasattr(message, "__idl__")
        else [message]
    )


def numbers(layout: struct.Struct) -> st.SearchStrategy[list[float]]:
    """Any numbers that fit a layout."""
    return st.binary(min_size=layout.size, max_size=layout.size).map(
        lambda data: [0.0 if n != n else n for n in layout.unpack(data)]
    )


def bitwise(message: bytes) -> int:
    """The checksum by its definition."""
    crc = 0xFFFFFFFF
    for (word,) in struct.iter_unpack("<I", message[:-4]):
        for bit in range(31, -1, -1):
            top = crc >> 31 ^ word >> bit & 1
            crc = (crc << 1 & 0xFFFFFFFF) ^ (0x04C11DB7 if top else 0)
    return crc


@given(st.binary(min_size=4, max_size=64).map(lambda b: b[: len(b) // 4 * 4]))
@settings(deadline=None)
def test_checksum_is_what_its_definition_says(message: bytes) -> None:
    assert go.checksum(message) == bitwise(message)


def test_checksum_is_the_vendors() -> None:
    assert go.LowCmd([0] * 250).numbers[-1] == ZEROS[go.LowCmd]
    assert sealed([0] * 349).crc == ZEROS[go.LowState]


@given(numbers(go._COMMAND_ON_WIRE))
@settings(max_examples=30, deadline=None)
def test_commands_are_laid_out_as_cyclonedds_does(message: list[float]) -> None:
    command = go.LowCmd(message)
    assert command.serialize() == filled(go.LowCmd, iter(command.numbers)).serialize()


@given(numbers(go._STATE_ON_WIRE))
@settings(max_examples=30, deadline=None)
def test_states_are_read_as_cyclonedds_does(message: list[float]) -> None:
    data = filled(go.LowState, iter(message)).serialize()
    assert list(go.LowState.deserialize(data).numbers) == message
    assert go.LowState.deserialize(sealed(message).serialize()).is_valid


@pytest.mark.parametrize("at", [4, 300, 1170])
def test_one_bit_is_enough_to_be_unsound(at: int) -> None:
    data = bytearray(sealed([0] * 349).serialize())
    data[at] ^= 1
    assert not go.LowState.deserialize(bytes(data)).is_valid


@pytest.mark.parametrize("data", [b"\0\0\0\0" + bytes(1176), HEADER + bytes(1000)])
def test_what_is_no_state_is_refused(data: bytes) -> None:
    with pytest.raises(BridgeError, match="not a Go2's"):
        go.LowState.deserialize(data)


class Go2:
    """The far end of ``unitree``: states out, commands in, in messages that cyclonedds reads field
    by field."""

    def __init__(self, number: int) -> None:
        self.number, self.link = number, DdsParticipant("lo", number)
        self._states = self.link.writer("rt/lowstate", plain(go.LowState))
        self._commands = self.link.reader("rt/lowcmd", plain(go.LowCmd))

    def publish(self, stamp: float, spoilt: int = 0, changes: Mapping[int, int] = WELL) -> None:
        """Publish a state of numbers that count up, but for its tick, the remote's buttons and the
        motors' temperatures; ``spoilt`` is added to its checksum.

        ``changes``: index of a number -> another value."""
        state = [k % 100 for k in range(349)]
        state[296] = round(stamp * 1000)
        state[299:301] = [0, 0]
        state[TEMPERATURES] = [40] * 12
        for index, value in changes.items():
            state[index] = value
        message = sealed(state)
        message.crc ^= spoilt
        self._states.send(message)

    def alive(self, **how: Any) -> Any:
        """Publish every 5 ms."""
        return beating(lambda stamp: self.publish(stamp, **how))

    def commanded(self) -> Any:
        """Return the newest command, None if none is new."""
        return self._commands.newest()


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> Iterator[Go2]:
    monkeypatch.setattr("metarobot.bridge.robots.dds.LISTEN", 0.1)
    robot = Go2(domain())
    yield robot
    robot.link.close()


def near(
    far: Go2, joints: tuple[str, ...] = JOINTS, changes: Mapping[int, int] = WELL, **settings: Any
) -> UnitreeRobot:
    robot = UnitreeRobot(meta(joints), domain=far.number, timeout=10.0, **settings)
    with far.alive(changes=changes):
        robot.connect()
    return robot


def sees(robot: UnitreeRobot, stamp: float) -> dict[str, float]:
    return until(lambda: (r := robot.get_observation()) and abs(r["stamp"] - stamp) < 1e-9 and r)


def test_a_reading_has_all_that_was_measured(far: Go2) -> None:
    robot = near(far, foot_zero=88.0, foot_scale=0.5)
    far.publish(100.007)
    reading = sees(robot, 100.007)
    assert reading.pop("seq") == 100007
    assert [reading.pop(f"imu.quat.{a}") for a in "wxyz"] == [9, 10, 11, 12]
    assert [reading.pop(f"imu.gyro.{a}") for a in "xyz"] == [13, 14, 15]
    # a motor has twelve numbers, from the 23rd on: mode, q, dq, ddq, torque ...
    for i, joint in enumerate(JOINTS):
        assert [reading.pop(f"{joint}.{part}") for part in ("pos", "vel", "tau")] == [
            (23 + 12 * i + k) % 100 for k in (1, 2, 4)
        ]
    assert [reading.pop(f"{leg}.force") for leg in ("FR", "FL", "RR", "RL")] == [0.0, 0.5, 1.0, 1.5]
    assert reading.keys() == {"stamp"}


def test_commands_carry_each_joints_gains(far: Go2) -> None:
    names = JOINTS[::-1]
    robot = near(far, names)
    action = {f"{joint}.pos": 0.25 * i for i, joint in enumerate(JOINTS)}
    assert robot.send_action(action) == action
    command = until(far.commanded)
    assert (list(command.head), command.level_flag) == ([0xFE, 0xEF], 0xFF)
    for i, motor in enumerate(command.motor_cmd[:12]):
        assert (motor.mode, motor.q, motor.dq, motor.tau) == (1, 0.25 * i, 0.0, 0.0)
        assert (motor.kp, motor.kd) == (10.0 * (12 - i), 0.5 * (12 - i))
    for motor in command.motor_cmd[12:]:
        assert (motor.q, motor.dq, motor.tau, motor.kp, motor.kd) == (
            POS_STOP,
            VEL_STOP,
            0.0,
            0.0,
            0.0,
        )
    assert command.crc == go.checksum(go._COMMAND_IN_C.pack(*flat(command)))


def test_damping_is_the_last_word(far: Go2) -> None:
    robot = near(far)
    robot.damp()
    command = until(far.commanded)
    assert {(m.mode, m.q, m.dq, m.tau, m.kp, m.kd) for m in command.motor_cmd[:12]} == {
        (1, POS_STOP, 0, 0, 0, 4.0)
    }
    # as Unitree's own library seals this command
    assert command.crc == 0x205D641E
    assert robot.send_action({f"{joint}.pos": 0.0 for joint in JOINTS}) == {}
    time.sleep(0.05)
    assert far.commanded() is None
    robot.damp()
    assert until(far.commanded).crc == 0x205D641E


@pytest.mark.parametrize(
    "bad", [{"FR_hip.pos": math.nan}, {"FR_hip.pos": math.inf}, {"FR_knee.pos": 0.0}]
)
def test_what_is_no_command_is_not_sent(far: Go2, bad: dict[str, float]) -> None:
    robot = near(far)
    with pytest.raises(BridgeError, match="command"):
        robot.send_action({f"{joint}.pos": 0.0 for joint in JOINTS} | bad)
    time.sleep(0.05)
    assert far.commanded() is None


def test_unsound_readings_are_dropped_and_counted(far: Go2) -> None:
    robot = near(far)
    far.publish(100.0)
    sees(robot, 100.0)
    far.publish(101.0, spoilt=1)
    until(lambda: robot.get_observation() and robot.bad)
    assert (robot.bad, robot.get_observation()["stamp"]) == (1, 100.0)
    strict = UnitreeRobot(meta(JOINTS), domain=far.number, timeout=0.3)
    with (
        far.alive(spoilt=1),
        pytest.raises(BridgeError, match="with a wrong checksum and no valid one within"),
    ):
        strict.connect()
    lenient = UnitreeRobot(meta(JOINTS), domain=far.number, timeout=10.0, checksums=False)
    with far.alive(spoilt=1):
        lenient.connect()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({299: 0x20, 300: 0x02}, r"L2\+B was pressed on the robot's remote"),
        ({299: 0x21, 300: 0x82}, r"L2\+B was pressed on the robot's remote"),
        ({23 + 12 * 4 + 8: 86}, "the motor FL_thigh is at 86 °C, more than 85"),
        ({23 + 12 * 11: 0}, "the motor RL_calf follows commands no more: its mode is 0"),
        ({23 + 9: 32 + 101}, "lost 101 packets of the motor FR_hip within 1 s, more than 100"),
        ({266: 4}, "the battery is at 4 %, less than 5"),
        ({337: 0x80}, r"board reports a fault: motors silent \(0x80\)"),
        ({337: 0x40}, "microcontroller silent"),
    ],
)
def test_what_the_robot_reports_of_itself_ends_the_run_at_once(
    far: Go2, changes: dict[int, int], message: str
) -> None:
    robot = near(far)
    far.publish(100.0)
    sees(robot, 100.0)
    far.publish(100.1, changes=WELL | changes)
    with pytest.raises(BridgeError, match=message) as caught:
        sees(robot, 100.1)
    assert isinstance(caught.value, OperatorStopError) == ("remote" in message)
    robot.damp()
    assert until(far.commanded).crc == 0x205D641E


@pytest.mark.parametrize(
    "changes",
    [
        {299: 0x20},  # L2 alone
        {300: 0x02},  # B alone
        {23 + 9: 32 + 100},
        {337: 0x20},  # the remote was switched off
        {TEMPERATURES.start: 85},
    ],
)
def test_what_is_no_fault_goes_on(far: Go2, changes: dict[int, int]) -> None:
    robot = near(far)
    far.publish(100.0)
    sees(robot, 100.0)
    far.publish(100.1, changes=WELL | changes)
    sees(robot, 100.1)


def test_a_robot_that_is_not_well_is_not_connected_to(far: Go2) -> None:
    hot = {TEMPERATURES.start: 90}
    with pytest.raises(BridgeError, match="the motor FR_hip is at 90 °C"):
        near(far, changes=hot)
    near(far, changes=hot, max_motor_c=95).disconnect()
    with pytest.raises(BridgeError, match="min_charge must be between 0 and 200, not nan"):
        UnitreeRobot(meta(JOINTS), min_charge=math.nan)


def test_packets_lost_slowly_and_a_silent_battery_are_no_fault() -> None:
    health = Go2Health(JOINTS, 85.0, 5.0)
    numbers = [0.0] * 349
    for second in range(20):
        numbers[296] = 1000.0 * second
        numbers[23 + 9] = 100.0 * second
        health.check(numbers)
    numbers[23 + 9] += 101
    with pytest.raises(BridgeError, match="lost 101 packets"):
        health.check(numbers)


def test_bit_errors_in_number_end_the_run() -> None:
    health = Go2Health(JOINTS, 85.0, 5.0)
    for i in range(200):
        health.note_checksum(is_right=i % 10 != 0)
    health.note_checksum(is_right=False)
    with pytest.raises(BridgeError, match="bit errors: 6 of the last 50 readings"):
        health.note_checksum(is_right=False)


def test_the_remote_damps_within_one_tick_and_is_no_fault() -> None:
    """The whole controller, on a robot whose third reading comes with the remote's stop."""
    about = bridging.meta()

    def stop_at_third(number: int, reading: dict[str, float]) -> dict[str, float]:
        if number >= 3:
            raise OperatorStopError("L2+B was pressed on the robot's remote")
        return reading

    robot = bridging.RecordingRobot(about, spoil=stop_at_third)
    controller = Controller(
        bridging.WavePolicy(about),
        robot,
        bridging.PlainLayout(about),
        RunSettings(hz=50.0, seconds=5.0, damp_s=0.1),
        clock=robot.clock,
    )
    report = controller.run()
    assert report.reason == "L2+B was pressed on the robot's remote"
    assert not report.fault
    assert robot.order.count("command") == 2
    assert "command" not in robot.order[2:]
    # The third reading was read 3 ticks after the start, and damping went out in that tick
    assert robot.damps[0] == pytest.approx(3 / 50)


def test_a_policy_for_another_robot_is_refused() -> None:
    with pytest.raises(
        BridgeError, match="a policy for the joints a, b; a Go2 has FR_hip, FR_thigh"
    ):
        UnitreeRobot(meta())


def test_who_is_not_there_or_leaves(far: Go2) -> None:
    with pytest.raises(BridgeError, match="unitree is not connected"):
        UnitreeRobot(meta(JOINTS)).get_observation()
    with pytest.raises(BridgeError, match="nothing on rt/lowstate within"):
        UnitreeRobot(meta(JOINTS), domain=far.number, timeout=0.1).connect()
    robot = near(far)
    far.link.close()
    with pytest.raises(BridgeError, match="link lost"):
        until(lambda: robot.get_observation() and False)
    robot.disconnect()
    robot.damp()


@pytest.mark.slow
def test_round_trip_through_the_vendors_own_types() -> None:
    python = ROOT / os.environ.get("UNITREE_VENV", ".unitree") / "bin/python"
    if not python.exists():
        pytest.skip("Unitree's SDK is not there: scripts/unitree_peer.sh")
    number = domain()
    command = [python, ROOT / "scripts/unitree_peer.py", "--domain", str(number)]
    peer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        robot = UnitreeRobot(meta(JOINTS), domain=number, timeout=60.0)
        robot.connect()
        targets = {f"{joint}.pos": 0.125 * i for i, joint in enumerate(JOINTS)}
        for _ in range(50):
            robot.send_action(targets)
            time.sleep(0.01)
        # the vendor's side moves its motors to the targets, and tells the gains it was sent as
        # speed and torque
        reading = until(lambda: (r := robot.get_observation()) and r["FR_thigh.pos"] and r)
        assert {key: reading[key] for key in targets} == targets
        assert [reading[f"{joint}.tau"] for joint in JOINTS] == [10.0 * k for k in range(1, 13)]
        assert [reading[f"{joint}.vel"] for joint in JOINTS] == [0.5 * k for k in range(1, 13)]
        assert [reading[f"{leg}.force"] for leg in ("FR", "FL", "RR", "RL")] == [40, 41, 42, 43]
        robot.damp()
        time.sleep(0.2)
    finally:
        peer.terminate()
        told = peer.communicate(timeout=20)[0]
    counted = json.loads(told.splitlines()[-1])
    assert counted.pop("last") == [[1, POS_STOP, 0.0, 0.0, 0.0, 4.0]] * 12
    assert counted == {"commands": 51, "bad_checksum": 0, "not_low_level": 0}
    assert robot.bad == 0
