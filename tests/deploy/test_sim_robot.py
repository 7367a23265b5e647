import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mujoco
import numpy as np
import pytest
import torch

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.robots.sim_client import (
    HOST,
    FrameKind,
    SimRobotClient,
    parse_frame,
    write_frame,
)
from metarobot.deploy.sim_robot_body import (
    SimulatedRobot,
    attitude_against_gravity,
    damped_model,
    disturb_attitude,
    quaternion_product,
    rotation_between,
)
from metarobot.deploy.sim_robot_server import SimRobotServer, serve
from metarobot.env.base import Env
from metarobot.errors import MetarobotError
from metarobot.tasks.family import families

WATCHDOG = 0.1


def meta(family: str) -> Any:
    """What a client asks of a policy's metadata."""
    chosen = families.get(family)
    joints = chosen.deployment.hardware().joints if chosen.deployment.hardware else ()
    return SimpleNamespace(family=family, joint_names=joints, observation_names=chosen.observations)


def world(family: str, tasks: int = 1, **settings: Any) -> SimulatedRobot:
    chosen = families.get(family)
    return SimulatedRobot(chosen, chosen.space.sample("test", tasks), **settings)


@contextmanager
def served(
    robot: SimulatedRobot, *, lockstep: bool = True, watchdog_s: float = WATCHDOG, hz: float = 0.0
) -> Iterator[SimRobotServer]:
    """A robot's loop in a thread of its own."""
    server = SimRobotServer(robot, port=0, lockstep=lockstep, watchdog_s=watchdog_s, publish_hz=hz)
    thread = threading.Thread(target=server.serve, kwargs={"until_eof": False}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(5)
        assert not thread.is_alive()


@contextmanager
def driven(server: SimRobotServer) -> Iterator[SimRobotClient]:
    robot = SimRobotClient(meta(server.robot.family.name), address=f"{HOST}:{server.port}")
    robot.connect()
    try:
        yield robot
    finally:
        robot.disconnect()


def act(robot: SimRobotClient, values: Any) -> dict[str, float]:
    robot.send_action(dict(zip(robot.info["command"], values, strict=True)))
    robot.await_reading()
    return robot.get_observation()


def still(robot: SimRobotClient) -> np.ndarray:
    """A command that asks for nothing: joints where they are, or no action."""
    reading = robot.get_observation()
    return np.array([reading.get(k, 0.0) for k in robot.info["command"]])


def report(port: int) -> dict[str, Any]:
    """What an onlooker is told, who does not drive the robot."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
        link.settimeout(2)
        link.sendto(write_frame(FrameKind.REPORT, 0), (HOST, port))
        parsed = parse_frame(link.recv(65536))
    assert parsed is not None
    return json.loads(parsed[2])


def wait_for(condition: Any, seconds: float) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.002)
    return time.monotonic() - began


@pytest.mark.parametrize("family", ["CheetahDir", "HopperParams", "GraspFragile"])
def test_in_lock_step_it_lives_the_episodes_of_an_environment_bit_for_bit(family: str) -> None:
    chosen, rng, number = families.get(family), np.random.default_rng(0), 2
    env = Env(chosen, chosen.space.sample("test", 3), threads=1)
    with served(world(family, 3)) as server, driven(server) as robot:
        robot.select_task(number)
        for episode in (1, 0):
            robot.restart(episode)
            reading, obs = robot.get_observation(), env.restart(episode)
            assert reading["reward"] == 0.0
            for _ in range(30):
                assert [reading[k] for k in chosen.observations] == obs[number].tolist()
                action = torch.from_numpy(rng.uniform(-1, 1, env.act_dim)).float()
                reading = act(robot, action.tolist())
                step = env.step(action.expand(3, -1))
                obs = step.final_obs
                assert reading["reward"] == float(step.reward[number])
                assert reading["terminated"] == float(step.terminated[number])
                if step.terminated[number]:
                    break
        assert robot.report()["told"]["steps"] > 1


def test_what_it_really_earned_is_summed_by_term() -> None:
    robot = world("CheetahDir", 2)
    robot.restart(1, 0)
    rewards = []
    for _ in range(5):
        robot.command(np.full(6, 0.5))
        robot.advance(robot.family.substeps)
        rewards.append(robot.reward)
    told, weights = robot.episode_summary(), robot.family.weights
    assert told["return"] == pytest.approx(sum(rewards))
    assert sum(weights[k] * v for k, v in told["terms"].items()) == pytest.approx(
        sum(rewards), rel=1e-5
    )
    assert (told["world"], told["episode"], told["steps"], told["terminated"]) == (1, 0, 5, False)


def test_past_the_horizon_it_goes_on_and_nothing_more_is_summed() -> None:
    chosen = replace(families.get("QuadrupedFlat"), horizon=5)
    robot = SimulatedRobot(chosen, chosen.space.sample("test", 1))
    robot.advance(12 * chosen.substeps)
    assert (robot.episode_summary()["steps"], robot.over) == (5, True)
    assert len(robot.reading()) == len(robot.signals.reading)


def test_after_the_last_task_comes_the_first_from_another_start() -> None:
    robot = world("CheetahDir", 2)
    starts = []
    for number in range(4):
        robot.restart(number, 0)
        assert robot.task == robot.tasks[number % 2]
        starts.append(robot.reading())
    assert starts[0] != starts[2]
    robot.restart(0, 0)
    assert robot.reading() == starts[0]


def test_a_task_that_is_not_there_is_refused() -> None:
    robot = world("CheetahDir", 2)
    for bad in ((-1, 0), (0, -1)):
        with pytest.raises(MetarobotError, match=r"there is no episode -?\d of world -?\d"):
            robot.restart(*bad)
    with served(robot) as server, driven(server) as client:
        client.select_task(-1)
        with pytest.raises(BridgeError, match="no episode 0 of world -1"):
            client.restart(0)


def test_a_legged_robot_tells_what_its_sensors_measure() -> None:
    robot = world("QuadrupedFlat", noise=False)
    assert not robot.obs[0, 3:30].equal(
        robot.family.observe(robot.env.snapshot)[0, 3:30]
    )  # training's has noise
    robot.advance(robot.family.substeps)
    said = dict(zip(robot.signals.reading, robot.reading(), strict=True))
    model, state = robot.env.model(robot.tasks[0]), robot.env.state
    for i, name in enumerate(families.get("QuadrupedFlat").deployment.hardware().joints):
        assert said[f"{name}.pos"] == float(state.qpos[0, 7 + i])
        assert said[f"{name}.vel"] == float(state.qvel[0, 6 + i])
        assert said[f"{name}.tau"] == float(state.sensors[0, model.sensor(f"{name}_torque").adr[0]])
    for leg in ("FR", "FL", "RR", "RL"):
        assert said[f"{leg}.force"] == float(state.sensors[0, model.sensor(f"{leg}_touch").adr[0]])
    assert [said[f"imu.quat.{a}"] for a in "wxyz"] == pytest.approx(state.qpos[0, 3:7].tolist())
    assert [said[f"imu.gyro.{a}"] for a in "xyz"] == state.qvel[0, 3:6].tolist()
    assert said["command.x"] == pytest.approx(robot.tasks[0]["command_x"])
    assert "reward" not in said


def test_a_robot_whose_command_is_hidden_is_told_its_reward_and_not_the_command() -> None:
    keys = world("QuadrupedVel").signals.reading
    assert "reward" in keys
    assert "command.x" not in keys


def test_sensors_are_found_in_the_observation_by_their_declared_names() -> None:
    """A legged family may order its observations as it likes: here they are reversed."""
    family = families.get("QuadrupedFlat")
    reversed_family = family.replace(
        observations=family.observations[::-1],
        observe=lambda state: family.observe(state).flip(1),
        noise=family.interaction.noise[::-1],
    )
    robot = SimulatedRobot(reversed_family, family.space.sample("test", 1))
    reading = dict(zip(robot.signals.reading, robot.reading(), strict=True))
    state = robot.env.snapshot
    clean = reversed_family.observe(state)[0].numpy()
    noise = dict(zip(reversed_family.observations, robot.obs[0].numpy() - clean, strict=True))
    assert len({float(x) for x in noise.values()}) > 30  # sensors are noisy, each for itself

    joints = family.deployment.hardware().joints
    for i, joint in enumerate(joints):
        angle = state.qpos[0, 7 + i].item() + noise[f"{joint}_rad"]
        speed = state.qvel[0, 6 + i].item() + noise[f"{joint}_rad/s"]
        assert reading[f"{joint}.pos"] == pytest.approx(angle)
        assert reading[f"{joint}.vel"] == pytest.approx(speed)
    for i, axis in enumerate("xyz"):
        turn = state.qvel[0, 3 + i].item() + noise[f"turn_{axis}_rad/s"]
        assert reading[f"imu.gyro.{axis}"] == pytest.approx(turn)
    task = robot.task
    assert reading["command.x"] == pytest.approx(task["command_x"])
    assert reading["command.turn"] == pytest.approx(task["command_turn"])


def test_a_legged_robot_without_declared_sensors_is_refused() -> None:
    family = families.get("QuadrupedFlat")
    hardware = replace(family.deployment.hardware(), sensors=None)
    undeclared = family.replace(hardware=lambda: hardware)
    with pytest.raises(MetarobotError, match=r"QuadrupedFlat declares no Hardware\.sensors"):
        SimulatedRobot(undeclared, family.space.sample("test", 1))


def turned(quat: np.ndarray, v: Any) -> np.ndarray:
    out = np.zeros(3)
    mujoco.mju_rotVecQuat(out, np.array(v, float), quat)
    return out


def test_an_imu_calls_down_what_gravity_pulls_to() -> None:
    gravity = np.array([0.3, -0.2, -9.0])
    quat = np.array([0.9, 0.1, -0.3, 0.2])
    quat /= np.linalg.norm(quat)
    seen = attitude_against_gravity(quat, gravity)
    inverse = seen * [1, -1, -1, -1]
    really = turned(quat * [1, -1, -1, -1], gravity / np.linalg.norm(gravity))
    assert turned(inverse, [0, 0, -1]) == pytest.approx(really)
    assert attitude_against_gravity(quat, np.array([0, 0, -9.81])) == pytest.approx(quat)
    noise = np.array([0.05, -0.03, 0.02])
    wrong = (really + noise) / np.linalg.norm(really + noise)
    assert turned(disturb_attitude(seen, noise) * [1, -1, -1, -1], [0, 0, -1]) == pytest.approx(
        wrong
    )
    assert quaternion_product(
        rotation_between(gravity, really), np.array([1.0, 0, 0, 0])
    ) == pytest.approx(rotation_between(gravity, really))


def test_a_limp_robot_only_resists_motion() -> None:
    robot = world("QuadrupedFlat")
    soft = damped_model(robot.env.model(robot.tasks[0]))
    data = mujoco.MjData(soft)
    data.ctrl[:], data.qvel[6:] = 3.0, np.linspace(-1, 1, 12)
    mujoco.mj_forward(soft, data)
    assert data.actuator_force == pytest.approx(-2.0 * data.qvel[6:])
    motors = damped_model(
        world("CheetahDir").env.model(families.get("CheetahDir").space.task(direction=1.0))
    )
    data = mujoco.MjData(motors)
    data.ctrl[:] = 1.0
    mujoco.mj_forward(motors, data)
    assert not data.actuator_force.any()


def test_damped_it_sinks_down_obeys_nothing_and_a_restart_ends_it() -> None:
    robot = world("QuadrupedFlat")
    pose = np.array(families.get("QuadrupedFlat").deployment.hardware().pose)
    robot.damp()
    for _ in range(100):
        robot.command(pose)
        robot.advance(4)
    assert robot.env.state.qpos[0, 2] < 0.2
    assert robot.reading()[-1] == 1.0
    robot.restart(0, 0)
    for _ in range(100):
        robot.command(pose)
        robot.advance(4)
    assert robot.env.state.qpos[0, 2] > 0.25
    assert robot.reading()[-1] == 0.0


def test_it_is_held_at_the_start_until_the_first_command() -> None:
    with served(world("QuadrupedFlat"), lockstep=False) as server, driven(server) as robot:
        before = robot.get_observation()
        robot.restart(0)
        time.sleep(0.15)
        after = robot.get_observation()
        assert after["stamp"] > before["stamp"] + 0.1
        assert after["seq"] > before["seq"]
        assert after["FR_calf.pos"] == before["FR_calf.pos"]
        assert robot.report()["held"]


def test_in_lock_step_time_passes_with_each_reading_and_without_commands_it_damps() -> None:
    with served(world("QuadrupedFlat"), hz=200) as server, driven(server) as robot:
        robot.restart(0)
        seen = [robot.get_observation() for _ in range(4)]
        assert np.diff([r["stamp"] for r in seen]) == pytest.approx(0.02)
        assert len({r["FR_calf.pos"] for r in seen}) == 1  # held
        targets = still(robot)
        seen = [act(robot, targets), *(robot.get_observation() for _ in range(6))]
        assert np.diff([r["stamp"] for r in seen]) == pytest.approx(0.02)
        assert [r["damped"] for r in seen] == [0, 0, 0, 0, 0, 1, 1]  # after 0.1 s


def test_in_real_time_a_reading_comes_each_control_period_and_none_twice() -> None:
    with (
        served(world("QuadrupedFlat"), lockstep=False, watchdog_s=1.0) as server,
        driven(server) as robot,
    ):
        robot.restart(0)
        targets, seen, began = still(robot), [], time.monotonic()
        for _ in range(50):
            seen.append(act(robot, targets))
        took = time.monotonic() - began
    gaps = np.diff([r["stamp"] for r in seen])[
        1:
    ]  # the first may lead from before the command to after it
    assert (gaps > -1e-9).all()
    assert gaps / 0.02 == pytest.approx((gaps / 0.02).round(), abs=1e-6)  # the robot's own periods
    assert (
        gaps > 0.01
    ).any()  # on a busy host one of the two may be held up, and readings come late
    assert took > gaps.sum() - 0.05  # its time is not ahead of the clock


def test_it_publishes_as_fast_as_wanted() -> None:
    with served(world("QuadrupedFlat"), lockstep=False, hz=200) as server, driven(server) as robot:
        first = robot.get_observation()
        robot._wait_and_receive(0.5)
        assert robot.get_observation()["stamp"] - first["stamp"] == pytest.approx(0.005, abs=0.03)
        time.sleep(0.2)
        assert robot.report()["readings"] > 15


def test_a_robot_that_hears_nothing_damps_in_its_time() -> None:
    with served(world("QuadrupedFlat"), lockstep=False) as server, driven(server) as robot:
        robot.restart(0)
        act(robot, still(robot))
        wait_for(lambda: robot.report()["damped"], 1.0)
        said = robot.report()
        assert WATCHDOG < said["damped_after_s"] <= WATCHDOG + 2 * server.physics_s
        assert act(robot, still(robot))["damped"] == 1.0  # it stays so, whatever it is told
        robot.restart(0)
        assert robot.get_observation()["damped"] == 0.0


def test_damping_is_obeyed_at_once_from_another_thread() -> None:
    with (
        served(world("QuadrupedFlat"), lockstep=False, watchdog_s=60) as server,
        driven(server) as robot,
    ):
        robot.restart(0)
        act(robot, still(robot))
        thread = threading.Thread(target=robot.damp)
        thread.start()
        assert wait_for(lambda: report(server.port)["damped"], 1.0) < 0.5
        thread.join()
        robot.damp()


def test_commands_that_are_not_whole_not_finite_or_not_new_are_refused() -> None:
    with served(world("CheetahDir"), watchdog_s=60) as server, driven(server) as robot:
        robot.restart(0)
        act(robot, [0.5] * 6)
        for bad in ([np.nan] * 6, [np.inf] * 6):
            act(robot, bad)
        assert robot.report()["refused"] == 2
        number = robot._sent_number
        for data in (
            write_frame(FrameKind.COMMAND, number, [0.1] * 6),  # not new
            write_frame(FrameKind.COMMAND, number - 2, [0.1] * 6),
            write_frame(FrameKind.COMMAND, number + 1, [0.1] * 5),
            b"mrs1 is not enough",
            b"",
            write_frame(FrameKind.COMMAND, number)[:3],
            write_frame(FrameKind.RESTART, 0, [np.nan, 0, 0]),
            write_frame(FrameKind.RESTART, 0, [1.0]),
            b"xxxx" + write_frame(FrameKind.DAMP, 0)[4:],
            write_frame(FrameKind.DAMP, 0)[:4] + b"\x77" + write_frame(FrameKind.DAMP, 0)[5:],
        ):
            robot._send(data)
        said = robot.report()
        assert said["commands"] == 1
        assert said["refused"] == 12
        assert float(server.robot.env.state.action[0, 0]) == 0.5  # the last good one is in force
        assert not said["damped"]


def test_one_controller_at_a_time() -> None:
    with served(world("CheetahDir")) as server:
        with driven(server) as robot:
            robot.restart(0)
            other = SimRobotClient(meta("CheetahDir"), address=f"{HOST}:{server.port}")
            with pytest.raises(BridgeError, match="has a controller: one at a time"):
                other.connect()
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
                for kind in (FrameKind.COMMAND, FrameKind.DAMP, FrameKind.RESTART, FrameKind.BYE):
                    stranger.sendto(write_frame(kind, 99, [0.0] * 6), (HOST, server.port))
            assert robot.report()["foreign"] == 5  # the other's farewell too
            act(robot, [0.0] * 6)
        with driven(server) as robot:  # the first has let go
            robot.restart(0)
            assert act(robot, [0.0] * 6)["reward"] <= 1.0


def test_a_policy_for_another_robot_is_refused() -> None:
    with served(world("CheetahDir")) as server:
        for family in ("AntDir", "QuadrupedFlat"):
            robot = SimRobotClient(meta(family), address=f"{HOST}:{server.port}")
            with pytest.raises(
                BridgeError, match=r"the policy is for .* the simulated CheetahDir has"
            ):
                robot.connect()


def test_nobody_at_the_address() -> None:
    for address, said in (
        ("127.0.0.1:9", "gone|answered"),
        ("nowhere", "give host:port"),
        ("127.0.0.1:0", "give host"),
    ):
        with pytest.raises(BridgeError, match=said):
            SimRobotClient(meta("CheetahDir"), address=address).connect()


DRIVE = """
import sys, time
from types import SimpleNamespace
from metarobot.bridge.robots.sim_client import SimRobotClient
joints = sys.argv[2].split(",")
meta = SimpleNamespace(family="QuadrupedFlat", joint_names=joints, observation_names=())
robot = SimRobotClient(meta, address=sys.argv[1])
robot.connect()
robot.restart(0)
targets = {f"{j}.pos": robot.get_observation()[f"{j}.pos"] for j in meta.joint_names}
print("driving", flush=True)
while True:
    robot.send_action(targets)
    robot.await_reading()
    robot.get_observation()
"""


def test_when_its_controller_is_killed_it_damps_in_its_time(tmp_path: Path) -> None:
    joints = ",".join(families.get("QuadrupedFlat").deployment.hardware().joints)
    with served(world("QuadrupedFlat"), lockstep=False) as server:
        command = [sys.executable, "-c", DRIVE, f"{HOST}:{server.port}", joints]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as controller:
            assert controller.stdout is not None
            assert controller.stdout.readline() == b"driving\n"
            wait_for(lambda: report(server.port)["commands"] > 10, 5)
            assert not report(server.port)["damped"]
            controller.send_signal(signal.SIGKILL)
            took = wait_for(lambda: report(server.port)["damped"], 2)
        assert took < WATCHDOG + 0.3  # wall time, on a busy machine
        assert report(server.port)["damped_after_s"] <= WATCHDOG + 2 * server.physics_s


def test_the_process_answers_dies_and_goes_with_whoever_started_it() -> None:
    robot = SimRobotClient(meta("CheetahDir"), tasks=2, lockstep=True, task={"direction": -1.0})
    robot.connect()
    assert robot.info["tasks"] == 1
    robot.restart(0)
    assert act(robot, [1.0] * 6)["reward"] != 0.0
    assert robot._process is not None
    os.kill(robot._process.pid, signal.SIGKILL)
    robot._process.wait()
    with suppress(BridgeError):  # the first frame may still leave
        robot.send_action(dict.fromkeys(robot.info["command"], 0.0))
    with pytest.raises(BridgeError, match="the simulated robot is gone"):
        act(robot, [0.0] * 6)
    robot.disconnect()
    robot.disconnect()
    with pytest.raises(BridgeError, match="not connected"):
        robot.get_observation()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"family": "Nothing"}, "no family called 'Nothing'"),
        ({"watchdog_s": -1.0}, "watchdog_s must be above 0, not -1"),
        ({"publish_hz": 1e6}, "publish_hz must be between 0 and the physics' 100, not 1e"),
        ({"task": ("slope=1",)}, "has no parameter 'slope'"),
        ({"task": ("slope",)}, "'slope' is not name=value"),
        ({"split": "interpolate"}, "has no split 'interpolate'"),
        ({"robot": "other.xml"}, "no other robot than its own"),
        ({"port": 99999}, "port 99999 of 127.0.0.1 cannot be had"),
    ],
)
def test_a_robot_that_cannot_be_says_so_in_a_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(MetarobotError, match=said):
        serve(settings.pop("family", "CheetahDir"), **settings)


def test_a_process_that_does_not_start_says_why() -> None:
    with pytest.raises(BridgeError, match="does not start: watchdog_s must be above 0, not -1"):
        SimRobotClient(meta("CheetahDir"), watchdog_s=-1.0).connect()


def test_a_port_that_is_taken() -> None:
    robot = world("CheetahDir")
    with (
        served(robot) as server,
        pytest.raises(MetarobotError, match=f"port {server.port} of 127.0.0.1 cannot be had"),
    ):
        SimRobotServer(robot, port=server.port, lockstep=True, watchdog_s=1.0, publish_hz=0.0)
