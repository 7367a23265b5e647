import json
import math
import os
import pty
import threading
import time
import tty
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.policy.metadata import JointLimit
from metarobot.bridge.robots.lerobot import LeRobotAdapter, MotorConversion

META = SimpleNamespace(
    joint_names=("pan", "grip"),
    layout="direct",
    limits={
        "pan": JointLimit(-2.0, 2.0, velocity=5.0, torque=2.0),
        "grip": JointLimit(0.0, 1.5, velocity=5.0, torque=2.0),
    },
)
TABLE = {
    "grip": MotorConversion.ranged("gripper.pos", 0.0, 1.5, span=(0.0, 100.0)),
    "pan": MotorConversion.degrees("shoulder_pan.pos", sign=-1, zero=0.5),
}


class Bus:
    """One port: who comes while another is there is turned away, as with a servo bus."""

    def __init__(self) -> None:
        self.port, self.torque = threading.Lock(), True

    def use(self, seconds: float = 0.0) -> None:
        if not self.port.acquire(blocking=False):
            raise ConnectionError("[TxRxResult] Port is in use!")
        time.sleep(seconds)
        self.port.release()

    def disable_torque(self, motors: Any = None, num_retry: int = 0) -> None:
        self.use()
        self.torque = False


class Arm:
    """A robot of LeRobot's shape: three servos that go where they are told, at most 10 units at a
    time."""

    name, id = "so_arm", "left"
    action_features: ClassVar = {
        "shoulder_pan.pos": float,
        "gripper.pos": float,
        "wrist.pos": float,
    }
    observation_features: ClassVar = {**action_features, "eye": (4, 4, 3)}
    is_calibrated = True

    def __init__(self, bus: Bus | None = None) -> None:
        self.at = {"shoulder_pan.pos": 0.0, "gripper.pos": 50.0, "wrist.pos": 7.0}
        self.open, self.fault, self.slow = False, "", 0.0
        if bus:
            self.bus = bus

    def connect(self, calibrate: bool = True) -> None:
        assert not calibrate, "it would ask questions"
        self.open = True

    def get_observation(self) -> dict[str, Any]:
        self.reach()
        return self.at | {"eye": None}

    def send_action(self, action: dict[str, float]) -> dict[str, float]:
        self.reach()
        sent = {k: self.at[k] + max(-10.0, min(10.0, v - self.at[k])) for k, v in action.items()}
        self.at |= sent
        return sent

    def disconnect(self) -> None:
        self.open = False

    def reach(self) -> None:
        if self.fault or not self.open:
            raise ConnectionError(self.fault)
        if hasattr(self, "bus"):
            self.bus.use(self.slow)


def connected(arm: Arm) -> LeRobotAdapter:
    robot = LeRobotAdapter(arm, META, TABLE)
    robot.connect()
    return robot


def test_readings_are_in_rad_by_the_policys_names() -> None:
    arm = Arm()
    robot = connected(arm)
    first = robot.get_observation()
    assert first.keys() == {"stamp", "seq", "pan.pos", "grip.pos", "pan.vel", "grip.vel"}
    assert (first["pan.pos"], first["grip.pos"]) == (0.5, 0.75)
    arm.at |= {"shoulder_pan.pos": 90.0, "gripper.pos": 100.0}
    second = robot.get_observation()
    assert (second["pan.pos"], second["grip.pos"]) == pytest.approx((0.5 - math.pi / 2, 1.5))
    assert second["seq"] == first["seq"] + 1
    assert second["grip.vel"] == pytest.approx(0.75 / (second["stamp"] - first["stamp"]))


def test_what_was_really_sent_comes_back() -> None:
    arm = Arm()
    robot = connected(arm)
    sent = robot.send_action({"pan.pos": 0.5 - math.radians(5), "grip.pos": 1.5})
    assert sent == pytest.approx({"pan.pos": 0.5 - math.radians(5), "grip.pos": 0.9})
    assert arm.at == pytest.approx({"shoulder_pan.pos": 5.0, "gripper.pos": 60.0, "wrist.pos": 7.0})


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(-100, 100))
def test_a_range_maps_its_ends(low: float, high: float, number: float) -> None:
    channel = MotorConversion.ranged("m", low, high)
    assert channel.zero + channel.scale * -100 == pytest.approx(low, abs=1e-12)
    assert channel.zero + channel.scale * 100 == pytest.approx(high, abs=1e-12)


@pytest.mark.parametrize("bad", [{"pan.pos": math.nan, "grip.pos": 0.0}, {"pan.pos": 0.0}])
def test_what_is_no_command_is_not_sent(bad: dict[str, float]) -> None:
    arm = Arm()
    with pytest.raises(BridgeError):
        connected(arm).send_action(bad)
    assert arm.at["shoulder_pan.pos"] == 0.0


def test_damping_switches_the_torque_off() -> None:
    arm = Arm(Bus())
    robot = connected(arm)
    robot.damp()
    assert not arm.bus.torque
    before = dict(arm.at)
    assert robot.send_action({"pan.pos": 0.0, "grip.pos": 0.0}) == {}
    assert arm.at == before


def test_without_a_bus_damping_holds() -> None:
    arm = Arm()
    robot = connected(arm)
    robot.send_action({"pan.pos": 0.5, "grip.pos": 0.8})
    robot.get_observation()
    before = dict(arm.at)
    robot.damp()
    assert arm.at == pytest.approx(before)
    limp: list[bool] = []
    robot = LeRobotAdapter(Arm(), META, TABLE, limp=lambda: limp.append(True))
    robot.connect()
    robot.damp()
    assert limp == [True]


@pytest.mark.parametrize("number", [math.nan, math.inf, 300.0])
def test_a_reading_that_cannot_be_is_not_held_but_the_last_good_one(number: float) -> None:
    arm = Arm()
    robot = connected(arm)
    arm.at["gripper.pos"] = number
    assert robot.get_observation()["grip.pos"] == pytest.approx(0.015 * number, nan_ok=True)
    arm.at["gripper.pos"] = 50.0
    robot.damp()
    assert arm.at["gripper.pos"] == 50.0


def test_damping_waits_for_a_bus_in_use() -> None:
    arm = Arm(Bus())
    robot = connected(arm)
    arm.slow = 0.05
    reading = threading.Thread(target=robot.get_observation)
    reading.start()
    time.sleep(0.01)
    robot.damp()
    reading.join()
    assert not arm.bus.torque


def test_faults_are_lost_links() -> None:
    arm = Arm()
    robot = connected(arm)
    arm.fault = "no status packet"
    with pytest.raises(BridgeError, match="link lost: no status packet"):
        robot.get_observation()
    with pytest.raises(BridgeError, match="link lost: no status packet"):
        robot.send_action({"pan.pos": 0.0, "grip.pos": 0.0})
    robot.disconnect()
    robot.disconnect()
    assert not arm.open
    robot.damp()


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"pan": TABLE["pan"]}, "the policy's joints pan, grip are not the table's: pan"),
        (
            TABLE | {"grip": MotorConversion.degrees("knee.pos")},
            "so_arm has no motor knee.pos; it has gripper.pos, shoulder",
        ),
        (TABLE | {"grip": MotorConversion.degrees("eye")}, "no motor eye"),
    ],
)
def test_the_table_must_fit_robot_and_policy(table: dict[str, MotorConversion], said: str) -> None:
    with pytest.raises(BridgeError, match=said):
        LeRobotAdapter(Arm(), META, table)


def test_it_must_be_calibrated() -> None:
    arm = Arm()
    arm.is_calibrated = False
    with pytest.raises(BridgeError, match="run lerobot-calibrate"):
        connected(arm)
    assert not arm.open


class Servos(threading.Thread):
    """Six Feetech servos on a pseudo-terminal, as an arm has on its serial port; each goes where it
    is told at once."""

    goal, position, torque = 42, 56, 40

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.end, slave = pty.openpty()
        tty.setraw(slave)
        self.port = os.ttyname(slave)
        self.memory = {i: bytearray(256) for i in range(1, 7)}
        for memory in self.memory.values():
            memory[3:5] = (777).to_bytes(2, "little")  # an STS3215
            memory[9:13] = (1024).to_bytes(2, "little") + (3072).to_bytes(
                2, "little"
            )  # the calibrated range
            memory[self.position : self.position + 2] = (2048).to_bytes(2, "little")

    def run(self) -> None:
        data = b""
        while data := data + os.read(self.end, 1024):
            while len(data) >= 4 and len(data) >= 4 + data[3]:
                packet, data = data[: 4 + data[3]], data[4 + data[3] :]
                self.obey(packet[2], packet[4], packet[5:-1])

    def obey(self, servo: int, verb: int, told: bytes) -> None:
        if verb in (1, 2):  # ping, read
            self.answer(servo, told[0] if told else 0, told[1] if told else 0)
        elif verb == 3:  # write
            self.store(servo, told[0], told[1:])
            self.answer(servo, 0, 0)
        elif verb == 0x82:  # read from several
            for each in told[2:]:
                self.answer(each, told[0], told[1])
        elif verb == 0x83:  # write to several
            for k in range(2, len(told), 1 + told[1]):
                self.store(told[k], told[0], told[k + 1 : k + 1 + told[1]])

    def store(self, servo: int, at: int, data: bytes) -> None:
        memory = self.memory[servo]
        memory[at : at + len(data)] = data
        if at == self.goal and memory[self.torque]:
            memory[self.position : self.position + 2] = memory[self.goal : self.goal + 2]

    def answer(self, servo: int, at: int, length: int) -> None:
        body = bytes([servo, length + 2, 0, *self.memory[servo][at : at + length]])
        os.write(self.end, b"\xff\xff" + body + bytes([~sum(body) & 0xFF]))


def test_a_real_lerobot_arm_on_its_serial_bus(tmp_path: Path) -> None:
    so = pytest.importorskip("lerobot.robots.so_follower", reason="LeRobot is not installed here")
    servos = Servos()
    servos.start()
    motors = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
    measures = {"drive_mode": 0, "homing_offset": 0, "range_min": 1024, "range_max": 3072}
    (tmp_path / "left.json").write_text(
        json.dumps({m: {"id": i + 1, **measures} for i, m in enumerate(motors)})
    )
    arm = so.SO101Follower(
        so.SO101FollowerConfig(port=servos.port, id="left", calibration_dir=tmp_path)
    )
    robot = LeRobotAdapter(
        arm, META, {"pan": MotorConversion.degrees("shoulder_pan.pos"), "grip": TABLE["grip"]}
    )
    robot.connect()
    reading = robot.get_observation()
    assert (reading["pan.pos"], reading["grip.pos"]) == pytest.approx((0.0, 0.75), abs=2e-3)
    sent = robot.send_action({"pan.pos": 0.5, "grip.pos": 0.3})
    assert sent == pytest.approx({"pan.pos": 0.5, "grip.pos": 0.3})
    reading = robot.get_observation()
    assert (reading["pan.pos"], reading["grip.pos"]) == pytest.approx((0.5, 0.3), abs=2e-3)
    assert all(memory[Servos.torque] for memory in servos.memory.values())
    # from another thread, while this one is at the bus all the time
    damping = threading.Timer(0.05, robot.damp)
    damping.start()
    while damping.is_alive():
        with suppress(BridgeError):
            robot.get_observation()
        time.sleep(0.001)
    assert not any(memory[Servos.torque] for memory in servos.memory.values())
    assert robot.send_action({"pan.pos": 0.0, "grip.pos": 0.0}) == {}
    robot.disconnect()


class ReportingBus(Bus):
    """A bus whose motors tell their temperature and error bits, as Feetech's do."""

    def __init__(self) -> None:
        super().__init__()
        self.registers = {
            "Present_Temperature": {"shoulder_pan": 40, "gripper": 41},
            "Status": {"shoulder_pan": 0, "gripper": 0},
        }
        self.reads: list[str] = []

    def sync_read(
        self, data_name: str, motors: Any = None, *, normalize: bool = True
    ) -> dict[str, int]:
        assert not normalize
        self.reads.append(data_name)
        self.use()
        return self.registers[data_name]


@pytest.mark.parametrize(
    ("register", "motor", "number", "message"),
    [
        ("Present_Temperature", "gripper", 66, "the motor gripper is at 66 °C, more than 65"),
        ("Status", "shoulder_pan", 32, "the motor shoulder_pan reports an error: Status is 32"),
    ],
)
def test_what_the_motors_report_of_themselves_ends_the_run(
    register: str, motor: str, number: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metarobot.bridge.robots.lerobot.HEALTH_INTERVAL_S", 0.0)
    bus = ReportingBus()
    robot = LeRobotAdapter(Arm(bus), META, TABLE)
    robot.connect()
    for _ in range(4):
        robot.get_observation()
    # The register that this bus lacks was asked for once
    assert bus.reads.count("Hardware_Error_Status") == 1
    assert bus.reads.count("Status") >= 2
    bus.registers[register][motor] = number
    # One register a reading
    with pytest.raises(BridgeError, match=message):
        [robot.get_observation() for _ in range(2)]
    robot.damp()
    assert not bus.torque
    with pytest.raises(BridgeError, match=message):
        LeRobotAdapter(Arm(bus), META, TABLE).connect()


def test_motors_are_asked_how_they_are_once_a_second() -> None:
    bus = ReportingBus()
    robot = LeRobotAdapter(Arm(bus), META, TABLE)
    robot.connect()
    before = len(bus.reads)
    for _ in range(50):
        robot.get_observation()
    assert len(bus.reads) <= before + 1
