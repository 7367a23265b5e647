import math
import re
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bridging import JOINTS, LIMIT, RecordingRobot, RestartingRobot, WavePolicy, meta
from fuzzing import SensingLayout
from walks import RecordedEpisode
from walks import legged_meta as go2_meta

from metarobot.bridge.controller import Controller
from metarobot.bridge.errors import BridgeError
from metarobot.bridge.layouts.leg_odometry import LegOdometry
from metarobot.bridge.layouts.legged import LeggedLayout
from metarobot.bridge.loop_timing import SteppedClock
from metarobot.bridge.robot_interface import GYRO, QUAT
from metarobot.bridge.run_report import RunSettings
from metarobot.bridge.safety import plausibility_checks as plausibility
from metarobot.bridge.safety.plausibility_checks import ImplausibleReadingError, PlausibilityChecker
from metarobot.envs.robots import go2
from metarobot.tasks.family import families

PERIOD_S = 0.02
DAMAGE = families.get("QuadrupedDamage")
NEEDED = SensingLayout(meta()).needed()


@cache
def damage_walk(task: int, noise: bool) -> RecordedEpisode:
    """Return a walk with broken joints."""
    return RecordedEpisode("QuadrupedDamage-rl2", task, noise)


def tilted(degrees: float, axis: int = 1) -> dict[str, float]:
    """Return an IMU's numbers at a tilt about x (1) or y (2)."""
    quat = [math.cos(math.radians(degrees) / 2), 0.0, 0.0, 0.0]
    quat[axis] = math.sin(math.radians(degrees) / 2)
    return dict(zip((*QUAT, *GYRO), (*quat, 0.0, 0.0, 0.0), strict=True))


class Readings:
    """Readings of two joints that follow a target of half a radian to and fro, with a quiet IMU."""

    def __init__(self) -> None:
        self.checker = PlausibilityChecker(meta(), NEEDED, PERIOD_S)
        self.pos = np.zeros(2)
        self.target = np.zeros(2)
        self.count = 0
        self.rng = np.random.default_rng(0)

    def next(self) -> dict[str, float]:
        """Return the reading after the next control period, which is a true one."""
        self.count += 1
        self.target = np.full(2, 0.5 * math.sin(0.2 * self.count))
        moved = 0.3 * (self.target - self.pos)
        self.pos = self.pos + moved
        reading = {"stamp": PERIOD_S * self.count, "seq": float(self.count)}
        for i, joint in enumerate(JOINTS):
            reading[f"{joint}.pos"] = self.pos[i] + self.rng.uniform(-0.01, 0.01)
            reading[f"{joint}.vel"] = moved[i] / PERIOD_S + self.rng.uniform(-0.5, 0.5)
            reading[f"{joint}.tau"] = self.rng.uniform(-15, 15)
        reading |= tilted(self.rng.uniform(-2, 2))
        reading |= dict(zip(GYRO, self.rng.uniform(-0.2, 0.2, 3), strict=True))
        return reading

    def check(self, **changes: float) -> None:
        """Check the next reading, with changes."""
        self.checker.check(self.next() | changes, self.target)

    def seconds_until_noticed(self, change: Any, message: str) -> float:
        """Return how long readings with a change pass."""
        for passed in range(500):
            reading = self.next()
            reading |= change(reading)
            try:
                self.checker.check(reading, self.target)
            except ImplausibleReadingError as e:
                if not re.search(message, str(e)):
                    raise
                return passed * PERIOD_S
        raise AssertionError(f"never noticed: {message}")


def walking(checks: int = 50) -> Readings:
    readings = Readings()
    for _ in range(checks):
        readings.check()
    return readings


def test_true_readings_pass_for_long():
    walking(3000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hip.pos": 1.3}, "hip reads 1.3 rad, outside its range -1 to 1 by more than 0.2"),
        ({"knee.vel": -20.5}, "knee reads -20.5 rad/s, and can do 20 at most"),
        ({"hip.tau": 1000.0}, r"hip reads 1e\+03 N·m, and can do 30 at most"),
        ({"hip.pos": -0.9, "knee.pos": 0.9}, "jumped by .* rad in 20 ms at a measured"),
        (tilted(61), "the robot has fallen: it is tilted by 61 degrees, at most 60"),
        (tilted(-120, 2), "fallen: it is tilted by 120 degrees"),
        (tilted(180), "fallen: it is tilted by 180 degrees"),
        (tilted(45), "the IMU's attitude jumped by 4. degrees in 20 ms"),
        (dict.fromkeys(QUAT, 0.0), "a quaternion of zeros"),
        ({"hip.pos": 1e300}, r"hip.pos reads 1e\+300: no number of a robot is that large"),
        ({"knee.vel": -1.7e308}, "knee.vel reads .* no number of a robot"),
        ({"imu.quat.x": 1e200}, "fallen|attitude"),
    ],
)
def test_one_reading_that_cannot_be_true_is_enough(change, message):
    readings = walking()
    with pytest.raises(BridgeError, match=message):
        readings.check(**change)


def test_what_stands_still_is_noticed_in_the_stated_time():
    def frozen(keys: Any) -> Any:
        readings = walking(57)
        last = readings.next()
        readings.checker.check(last, readings.target)
        change = {key: last[key] for key in last if keys(key)}
        return readings, lambda reading: change

    readings, change = frozen(lambda key: key not in ("stamp", "seq"))
    seconds = readings.seconds_until_noticed(change, "have not changed for 100 ms")
    assert seconds <= plausibility.FROZEN_S

    readings, change = frozen(lambda key: key == "hip.pos")
    seconds = readings.seconds_until_noticed(change, "joint hip's (angle has not|speed and angles)")
    assert seconds <= plausibility.STUCK_S

    readings, change = frozen(lambda key: key == "knee.vel")
    seconds = readings.seconds_until_noticed(change, "joint knee's speed")
    assert seconds <= plausibility.STUCK_S

    for keys in (QUAT, GYRO):
        readings, change = frozen(lambda key, keys=keys: key in keys)
        seconds = readings.seconds_until_noticed(change, "the IMU's numbers have not changed")
        assert seconds <= plausibility.IMU_FROZEN_S


def test_a_joint_at_rest_that_nothing_moves_may_repeat_its_numbers():
    checker = PlausibilityChecker(meta(), NEEDED, PERIOD_S)
    readings = Readings()
    still = readings.next() | {"hip.vel": 0.0, "knee.vel": 0.0}
    for i in range(200):
        imu = dict(zip(GYRO, readings.rng.uniform(-0.2, 0.2, 3), strict=True))
        imu |= tilted(readings.rng.uniform(-2, 2)) | imu
        moving = {"stamp": PERIOD_S * i, "seq": float(i)}
        checker.check(still | imu | moving, readings.target)


def test_a_wrong_speed_and_a_joint_that_does_not_follow_are_noticed():
    readings = walking()
    wrong = readings.seconds_until_noticed(
        lambda r: {"hip.vel": r["hip.vel"] + 4.0}, "joint hip's speed and angles differ"
    )
    assert wrong <= 2 * plausibility.MEAN_MISMATCH_S

    stopped = walking()
    keys = [f"{joint}.{kind}" for joint in JOINTS for kind in ("pos", "vel", "tau")]
    stopped.checker.begin()

    def stand(reading: dict[str, float]) -> dict[str, float]:
        # The target is as far off as the drive's largest torque allows
        stopped.target = np.array([0.0, LIMIT["torque"] / 40.0])
        return dict(zip(keys, stopped.rng.uniform(-0.01, 0.01, 6), strict=True))

    seconds = stopped.seconds_until_noticed(stand, "joint knee does not follow its target")
    assert 2.5 < seconds < 4.0


def test_after_a_restart_the_robot_may_be_anywhere():
    readings = walking()
    readings.checker.begin()
    readings.check(**{"hip.pos": -0.9, "knee.pos": 0.9}, **tilted(45))


# In the controller


def run(robot: Any, **settings: Any) -> Any:
    """Run a controller with a layout that needs torques and an IMU."""
    policy = WavePolicy(robot.meta)
    base = {"hz": 50.0, "seconds": 60.0, "trials": 1, "ready_s": 0.4, "soft_s": 0.1, "damp_s": 0.1}
    adaptation = settings.pop("adaptation", None)
    controller = Controller(
        policy,
        robot,
        SensingLayout(policy.meta),
        RunSettings(**base | settings),
        clock=robot.clock,
        adaptation=adaptation,
    )
    return controller.run()


def with_imu(tilt_deg: Any) -> Any:
    """Return what adds an IMU to a reading; ``tilt_deg`` of the reading's number."""
    rng = np.random.default_rng(0)

    def spoil(count: int, reading: dict[str, float]) -> dict[str, float]:
        imu = tilted(tilt_deg(count) + rng.uniform(-0.1, 0.1))
        return reading | imu | dict(zip(GYRO, rng.uniform(-0.2, 0.2, 3), strict=True))

    return spoil


@pytest.mark.parametrize("degrees", [35, 90, 120, 180, -179])
def test_a_robot_that_lies_on_its_side_or_back_is_not_stood_up(degrees):
    robot = RecordingRobot(meta(), SteppedClock(), with_imu(lambda count: degrees))
    report = run(robot)
    assert report.fault
    assert "tilted by" in report.reason
    assert robot.order.count("command") == 0
    assert robot.damps


def test_a_robot_that_moves_is_not_stood_up():
    def turn(count: int, reading: dict[str, float]) -> dict[str, float]:
        return with_imu(lambda count: 0)(count, reading) | {"knee.vel": 3.0}

    robot = RecordingRobot(meta(), SteppedClock(), turn)
    report = run(robot)
    assert "joint knee turns at 3 rad/s before the start; at most 2.5" in report.reason
    assert not robot.commands


def test_a_robot_whose_joint_is_out_of_its_range_is_not_stood_up():
    robot = RecordingRobot(meta(), SteppedClock(), with_imu(lambda count: 0))
    robot.pos = np.array([1.3, 0.0])
    report = run(robot)
    assert "joint hip reads 1.3 rad, outside its range" in report.reason
    assert not robot.commands
    assert robot.damps


@pytest.mark.parametrize("bad", [5, 15, 25])
@pytest.mark.parametrize("degrees", [61, 120, 180])
def test_a_fall_is_damped_in_its_tick_while_standing_up_and_running(bad, degrees):
    robot = RecordingRobot(
        meta(), SteppedClock(), with_imu(lambda count: degrees if count >= bad else 0)
    )
    report = run(robot)
    assert report.fault
    assert "the robot has fallen: it is tilted by" in report.reason
    assert len(robot.commands) == bad - 1
    assert robot.damps[0] == pytest.approx(robot.commands[-1][0] + PERIOD_S)


class EndlessAdaptation:
    """An adaptation that is never finished."""

    rollouts = 1
    ready = True
    busy = False

    def step(self, obs: Any, action: Any, reward: float) -> None: ...
    def end(self, final_obs: Any, *, failed: bool) -> None: ...
    def clear(self) -> None: ...
    def poll(self) -> None: ...
    def review(self) -> None: ...

    def start(self, context: Any) -> None:
        self.busy = True

    def stop(self) -> None:
        self.busy = False


def test_a_fall_is_damped_in_its_tick_while_an_adaptation_is_waited_for():
    bad = 100
    robot = RecordingRobot(
        meta(), SteppedClock(), with_imu(lambda count: 90 if count >= bad else 0)
    )
    report = run(robot, adaptation=EndlessAdaptation())
    assert "the robot has fallen" in report.reason
    assert len(report.returns[0]) == 1
    assert len(robot.commands) == bad - 1


def test_a_robot_that_restarts_after_a_fall_is_not_damped_for_it():
    robot = RestartingRobot(meta(), SteppedClock(), with_imu(lambda count: 5.0 * min(count, 18)))
    report = run(robot)
    assert report.reason == "1 trials are over"


def test_the_antipode_of_the_attitude_is_noticed_by_filter_and_layout():
    hardware = DAMAGE.deployment.hardware()
    odometry = LegOdometry(hardware.reward["legs"], 0.022)
    pose = go2.DEFAULT_POSE.reshape(4, 3).tolist()
    still = [[0.0] * 3] * 4
    for up in ((0.0, 0.0, 1.0), (0.0, 0.0, -1.0)):
        for _ in range(3):
            motion = odometry.update(pose, still, up, (0.0, 0.0, 0.0), [True] * 4, PERIOD_S)
        assert motion.up == pytest.approx(up)

    episode = damage_walk(0, noise=True)
    layout = LeggedLayout(go2_meta(DAMAGE))
    assert not layout.ended(episode.readings[0])
    upside_down = dict(zip(QUAT, (0.0, 1.0, 0.0, 0.0), strict=True))
    assert layout.ended(episode.readings[1] | upside_down)


# On the simulated robot


def walk_checker(family: Any = DAMAGE) -> tuple[PlausibilityChecker, Any]:
    about = go2_meta(family)
    about = SimpleNamespace(**vars(about), joint_stiffness=(25.0,) * 12)
    return PlausibilityChecker(about, LeggedLayout(about).needed(), PERIOD_S), about


@pytest.mark.parametrize(("task", "noise"), [(0, True), (7, False)])
def test_a_walk_with_broken_joints_is_plausible(task, noise):
    checker, about = walk_checker()
    pose, scale = np.array(about.default_joint_pos), np.array(about.action_scale)
    episode = damage_walk(task, noise)
    largest = np.zeros(len(checker.used))
    for i, reading in enumerate(episode.readings):
        checker.check(reading, pose + scale * episode.actions[i] if i else None)
        largest = np.maximum(largest, checker.used.max(1))
    assert (largest <= 0.95).all()


@pytest.mark.parametrize("pairs", [("FR", "FL", "RR", "RL"), ("FR", "RR", "FL", "RL")])
def test_legs_that_are_swapped_in_a_walk_are_noticed(pairs):
    swap = {pairs[0]: pairs[1], pairs[1]: pairs[0], pairs[2]: pairs[3], pairs[3]: pairs[2]}
    checker, _ = walk_checker()
    episode = damage_walk(0, noise=True)

    def swapped(reading: dict[str, float]) -> dict[str, float]:
        joints = {
            f"{swap[joint[:2]]}{joint[2:]}.{kind}": reading[f"{joint}.{kind}"]
            for joint in go2.JOINTS
            for kind in ("pos", "vel", "tau")
        }
        return reading | joints

    for reading in episode.readings[:50]:
        checker.check(reading, None)
    with pytest.raises(ImplausibleReadingError, match="jumped by"):
        checker.check(swapped(episode.readings[50]), None)


@pytest.mark.slow
def test_no_limit_is_reached_over_twenty_tasks():
    sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
    from plausibility_margins import measure_margins

    margins = measure_margins("QuadrupedDamage-rl2", 20)
    assert margins.report.reason == "20 trials are over"
    assert not margins.report.fault
    assert margins.ticks > 7000
    assert (margins.used < 0.95).all()


def test_an_error_of_the_checks_is_the_bridges():
    assert issubclass(ImplausibleReadingError, BridgeError)
