import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wires import FakeRos2Controller, domain, head, meta, until

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.robots import ros2_messages as ros
from metarobot.bridge.robots.ros2 import Ros2Robot
from metarobot.bridge.robots.ros2_messages import JointState

ROOT = Path(__file__).parents[2]


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRos2Controller]:
    monkeypatch.setattr("metarobot.bridge.robots.dds.LISTEN", 0.1)
    controller = FakeRos2Controller(domain())
    yield controller
    controller.link.close()


def near(far: FakeRos2Controller, **settings: object) -> Ros2Robot:
    """The robot at this end of the same domain, connected."""
    robot = Ros2Robot(
        settings.pop("meta", meta()), domain=far.number, controller="fwd", timeout=10.0, **settings
    )
    with far.alive():
        robot.connect()
    return robot


def sees(robot: Ros2Robot, stamp: float) -> dict[str, float]:
    return until(lambda: (r := robot.get_observation()) and r["stamp"] == stamp and r)


def test_joints_are_matched_by_name(far: FakeRos2Controller) -> None:
    robot = near(far)
    far.publish(
        100.25, position=[7.0, 8.0, 9.0], velocity=[0.7, 0.8, 0.9], effort=[70.0, 80.0, 90.0]
    )
    reading = sees(robot, 100.25)
    seq = reading.pop("seq")
    expected = {
        "a.pos": 9.0,
        "b.pos": 8.0,
        "a.vel": 0.9,
        "b.vel": 0.8,
        "a.tau": 90.0,
        "b.tau": 80.0,
    }
    assert reading == {"stamp": 100.25, **expected}
    far.publish(100.5, name=["b", "a"], position=[1.0, 2.0])
    assert sees(robot, 100.5)["a.pos"] == 2.0
    assert robot.get_observation()["seq"] == seq + 1


@given(
    st.permutations([f"j{k}" for k in range(5)]),
    st.permutations(range(8)),
    st.integers(0, 5),
    st.data(),
)
@settings(max_examples=50, deadline=None)
def test_any_order_and_any_others_among_the_joints(
    ours: list[str], places: list[int], long: int, data: Any
) -> None:
    named = [
        *(f"{joint}_joint" if k < long else joint for k, joint in enumerate(ours)),
        "wheel",
        "j",
        "j0_link",
    ]
    state = {named[i]: data.draw(st.floats(-9, 9)) for i in places}
    robot = Ros2Robot(meta(ours))
    robot._ros_joint_names, robot._seq = (), 0
    message = JointState(head(1.5), list(state), list(state.values()), list(state.values()), [])
    reading = robot._read_joints(JointState.deserialize(message.serialize()))
    expected = {
        f"{joint}.{part}": state[named[k]]
        for k, joint in enumerate(ours)
        for part in ("pos", "vel")
    }
    assert reading == {"stamp": 1.5, **expected}


def test_what_is_not_measured_is_left_out(far: FakeRos2Controller) -> None:
    robot = near(far)
    far.publish(100.0, velocity=[], effort=[])
    assert sees(robot, 100.0).keys() == {"stamp", "seq", "a.pos", "b.pos"}


def test_commands_go_out_in_the_controllers_order(far: FakeRos2Controller) -> None:
    robot = near(far, joints="b,a")
    assert robot.send_action({"a.pos": 0.1, "b.pos": 0.2}) == {"a.pos": 0.1, "b.pos": 0.2}
    assert until(far.commanded) == [0.2, 0.1]


@pytest.mark.parametrize(
    ("action", "said"),
    [
        ({"a.pos": math.nan, "b.pos": 0.0}, "not finite"),
        ({"a.pos": 0.0, "b.pos": -math.inf}, "b.pos"),
        ({"a.pos": 0.0}, "keys do not match: b.pos"),
        ({"a.pos": 0.0, "b.pos": 0.0, "c.pos": 0.0}, "c.pos"),
    ],
)
def test_what_the_controller_would_drop_or_die_of_is_not_sent(
    far: FakeRos2Controller, action: dict, said: str
) -> None:
    robot = near(far)
    with pytest.raises(BridgeError, match=said):
        robot.send_action(action)
    robot.send_action({"a.pos": 1.0, "b.pos": 2.0})
    assert until(far.commanded) == [1.0, 2.0]


def test_damping_is_the_last_word(far: FakeRos2Controller) -> None:
    robot = near(far)
    far.publish(100.0, position=[0.0, 20.0, 10.0])
    sees(robot, 100.0)
    robot.send_action({"a.pos": 0.1, "b.pos": 0.2})
    assert until(far.commanded) == [0.1, 0.2]
    robot.damp()
    assert until(far.commanded) == [10.0, 20.0]
    assert robot.send_action({"a.pos": 0.1, "b.pos": 0.2}) == {}
    far.publish(101.0, position=[0.0, 21.0, 11.0])
    time.sleep(0.05)
    robot.damp()
    assert until(far.commanded) == [11.0, 21.0]
    time.sleep(0.05)
    assert far.commanded() is None


@pytest.mark.parametrize("number", [math.nan, 1e6, -31.0])
def test_damping_holds_what_was_plausible_last(far: FakeRos2Controller, number: float) -> None:
    robot = near(far)
    far.publish(100.0, position=[0.0, 20.0, 10.0])
    sees(robot, 100.0)
    far.publish(101.0, position=[0.0, number, 11.0])
    assert sees(robot, 101.0)["b.pos"] == pytest.approx(number, nan_ok=True)
    robot.damp()
    assert until(far.commanded) == [10.0, 20.0]


def test_damping_without_a_reading_sends_no_empty_command(far: FakeRos2Controller) -> None:
    robot = Ros2Robot(meta(), domain=far.number, controller="fwd", timeout=1.0)
    robot._connection = robot._open()
    until(lambda: far._commands.publishers)
    robot.damp()
    time.sleep(0.05)
    assert far.commanded() is None


def test_damping_from_another_thread_wins_over_commands(far: FakeRos2Controller) -> None:
    robot = near(far)
    far.publish(100.0, position=[0.0, 20.0, 10.0])
    sees(robot, 100.0)
    threads = [
        threading.Thread(
            target=lambda: [robot.send_action({"a.pos": 0.0, "b.pos": 0.0}) for _ in range(300)]
        )
    ]
    threads[0].start()
    time.sleep(0.01)
    robot.damp()
    threads[0].join()
    time.sleep(0.05)
    assert far.commanded() == [10.0, 20.0]


def test_a_legged_policy_has_the_trunk_too_and_either_may_freeze(far: FakeRos2Controller) -> None:
    robot = near(far, meta=meta(layout="legged"))
    far.publish(100.0)
    far.tilt(100.1)
    reading = sees(robot, 100.0)
    assert [reading[f"imu.quat.{a}"] for a in "wxyz"] == [1.0, 2.0, 3.0, 4.0]
    assert [reading[f"imu.gyro.{a}"] for a in "xyz"] == [5.0, 6.0, 7.0]
    assert (reading["FL.force"], reading["FR.force"]) == (10.0, 20.0)
    for stamp in (100.2, 100.3):
        far.publish(stamp)
        time.sleep(0.02)
        assert robot.get_observation()["stamp"] == 100.1


def test_without_what_it_needs_it_does_not_connect(far: FakeRos2Controller) -> None:
    wanting = {"domain": far.number, "controller": "fwd", "timeout": 0.1}
    for problem, said in (
        (Ros2Robot(meta(), **wanting), "nothing on rt/joint_states within 0.1 s on lo, domain"),
        (Ros2Robot(meta(), **wanting | {"states": "other"}), "nobody publishes rt/other"),
        (
            Ros2Robot(meta(), **wanting | {"controller": "other"}),
            "nobody listens to rt/other/commands",
        ),
    ):
        with pytest.raises(BridgeError, match=said):
            problem.connect()
    with (
        far.alive(),
        pytest.raises(BridgeError, match="no joint c among the robot's: spare, b_joint, a"),
    ):
        Ros2Robot(meta(["a", "c"]), **wanting | {"timeout": 10.0}).connect()
    with far.alive(position=[0.0, math.nan, 0.0]), pytest.raises(BridgeError, match="not finite"):
        Ros2Robot(meta(), **wanting | {"timeout": 10.0}).connect()
    with pytest.raises(BridgeError, match="the policy's joints a, b are not fwd's: a, b, c"):
        Ros2Robot(meta(), controller="fwd", joints="a,b,c")
    assert far.commanded() is None


@pytest.mark.parametrize("other", [{"name": ["a", "x", "y"]}, {"velocity": [1.0]}])
def test_joints_that_change_are_an_error_at_once(far: FakeRos2Controller, other: dict) -> None:
    robot = near(far)
    far.publish(100.0, **other)
    with pytest.raises(BridgeError, match=r"no joint b|1 numbers for 3 joints"):
        sees(robot, 100.0)


def diagnosis(level: int, name: str = "motor driver", text: str = "hot\nvery") -> Any:
    status = [ros.DiagnosticStatus(level, name, text, "", [ros.KeyValue("a", "b")])]
    return ros.DiagnosticArray(head(1.0), status)


@pytest.mark.parametrize(("level", "kind"), [(2, "an error"), (3, "a component that is silent")])
def test_an_error_among_the_diagnostics_ends_the_run(
    far: FakeRos2Controller, level: int, kind: str
) -> None:
    diagnostics = far.link.writer("rt/diagnostics", ros.DiagnosticArray)
    robot = near(far, ignore="wifi,camera")
    until(lambda: diagnostics.listeners)
    # Several nodes publish at once, and none of their messages may get lost
    for harmless in (diagnosis(0), diagnosis(1), diagnosis(2, "camera 3")):
        diagnostics.send(harmless)
    diagnostics.send(diagnosis(level))
    message = f"diagnostics reports {kind}: motor driver: hot very"
    with pytest.raises(BridgeError, match=message):
        until(lambda: robot.get_observation() and False)


def test_warnings_end_no_run(far: FakeRos2Controller) -> None:
    diagnostics = far.link.writer("rt/diagnostics", ros.DiagnosticArray)
    robot = near(far)
    until(lambda: diagnostics.listeners)
    diagnostics.send(diagnosis(1))
    far.publish(100.0)
    sees(robot, 100.0)


def activity(controller: int, hardware: int, other: int = 3) -> Any:
    def named(name: str, state: int) -> Any:
        return ros.NamedLifecycleState(name, ros.LifecycleState(state, "inactive"))

    controllers = [named("fwd", controller), named("gripper", other)]
    return ros.ControllerManagerActivity(head(1.0), controllers, [named("leg board", hardware)])


@pytest.mark.parametrize(
    ("states", "message"),
    [((2, 3), "fwd is not active any more: inactive"), ((3, 2), "leg board is not active")],
)
def test_a_controller_that_is_deactivated_ends_the_run(
    far: FakeRos2Controller, states: tuple[int, int], message: str
) -> None:
    about = "rt/controller_manager/activity"
    writer = far.link.writer(about, ros.ControllerManagerActivity, latched=True)
    writer.send(activity(3, 3))
    robot = near(far)
    far.publish(100.0)
    sees(robot, 100.0)
    writer.send(activity(3, 3, other=2))
    far.publish(100.5)
    sees(robot, 100.5)
    writer.send(activity(*states))
    with pytest.raises(BridgeError, match=message):
        until(lambda: robot.get_observation() and False)


def test_a_network_interface_must_be_there_and_up() -> None:
    with pytest.raises(BridgeError, match=r"no network interface 'eth77'; there are .*lo"):
        Ros2Robot(meta(), interface="eth77").connect()
    down = [
        p.parent.name
        for p in Path("/sys/class/net").glob("*/flags")
        if not int(p.read_text(), 16) & 1
    ]
    if down:
        with pytest.raises(BridgeError, match=f"'{down[0]}' is down; up are .*lo"):
            Ros2Robot(meta(), interface=down[0]).connect()


def test_a_domain_is_open_on_one_interface(far: FakeRos2Controller) -> None:
    others = [
        p.parent.name
        for p in Path("/sys/class/net").glob("*/flags")
        if int(p.read_text(), 16) & 9 == 1
    ]
    if not others:
        pytest.skip("no second interface is up")
    with pytest.raises(BridgeError, match=f"domain {far.number} is open on lo"):
        Ros2Robot(meta(), domain=far.number, interface=others[0]).connect()


def test_one_controller_a_robot(far: FakeRos2Controller) -> None:
    first = near(far)
    second = Ros2Robot(meta(), domain=far.number, controller="fwd", timeout=10.0)
    stop = threading.Event()
    commands = threading.Thread(
        target=lambda: [first.send_action({"a.pos": 1.0, "b.pos": 1.0}) for _ in beats(stop)]
    )
    with far.alive():
        commands.start()
        with pytest.raises(BridgeError, match="another controller publishes rt/fwd/commands on lo"):
            second.connect()
        guard = Ros2Robot(meta(), domain=far.number, controller="fwd", timeout=10.0, guard=True)
        guard.connect()
        stop.set()
        commands.join()
        guard.damp()
    assert until(far.commanded) == [1.0, 2.0]
    with pytest.raises(BridgeError, match="another controller"):
        until(lambda: first.get_observation() and False)


def beats(stop: threading.Event) -> "itertools.takewhile":
    return itertools.takewhile(lambda _: not stop.wait(0.01), itertools.count())


def test_who_leaves_is_missed_at_once(far: FakeRos2Controller) -> None:
    robot = near(far)
    far.link.close()
    begun = time.monotonic()
    with pytest.raises(BridgeError, match="link lost: nobody"):
        until(lambda: robot.get_observation() and False)
    assert time.monotonic() - begun < 2.0
    robot.damp()
    robot.disconnect()
    robot.disconnect()
    with pytest.raises(BridgeError, match="ros2 is not connected"):
        robot.get_observation()
    robot.damp()


PEER = """
import sys
sys.path.insert(0, {tests!r})
from wires import FakeRos2Controller
far = FakeRos2Controller({number})
with far.alive():
    for line in sys.stdin:
        pass
"""


def test_who_is_killed_freezes_and_nothing_waits_for_it() -> None:
    number = domain()
    code = PEER.format(tests=str(Path(__file__).parents[1]), number=number)
    far = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    robot = Ros2Robot(meta(), domain=number, controller="fwd", timeout=60.0)
    robot.connect()
    first = robot.get_observation()["stamp"]
    until(lambda: robot.get_observation()["stamp"] > first)
    far.send_signal(signal.SIGKILL)
    far.communicate()
    last, begun = robot.get_observation()["stamp"], time.monotonic()
    for _ in range(200):
        assert robot.get_observation()["stamp"] == last
        assert robot.send_action({"a.pos": 0.0, "b.pos": 0.0})
    robot.damp()
    assert time.monotonic() - begun < 5.0


@pytest.mark.slow
def test_a_real_ros2_takes_every_command(tmp_path: Path) -> None:
    python = ROOT / os.environ.get("ROS_VENV", ".ros") / "bin/python"
    if not python.exists():
        pytest.skip("no ROS 2 is there: scripts/ros_peer.sh")
    figures = tmp_path / "figures.json"
    script = [
        sys.executable,
        ROOT / "scripts/ros_loop.py",
        "--seconds",
        "2",
        "--hz",
        "50",
        "--python",
        python,
    ]
    done = subprocess.run([*script, "--json", figures], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(figures.read_text())
    assert told["commands_received"] == told["sent"] == 100
    assert told["peer"]["height_m"] > 0.15
