import math
import os
import signal
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bridging import JOINTS, PlainLayout, RecordingRobot, RestartingRobot, WavePolicy, meta

from metarobot.bridge.controller import Controller
from metarobot.bridge.errors import BridgeError
from metarobot.bridge.loop_timing import LoopTimer, MonotonicClock, SteppedClock
from metarobot.bridge.run_report import RunSettings
from metarobot.bridge.safety.command_gate import (
    STOP_AGAIN_S,
    CommandGate,
    GateWatchdog,
    damping_bounds_s,
)
from metarobot.bridge.safety.emergency_stop import stop_signals
from metarobot.bridge.safety.guard_process import damp_until_done, watch_heartbeats
from metarobot.bridge.state_machine import (
    ALLOWED_TRANSITIONS,
    ControllerState,
    ControllerStateMachine,
)
from metarobot.bridge.tools.read_log import read_log

BASE = {"hz": 50.0, "seconds": 60.0, "trials": 1, "ready_s": 0.2, "soft_s": 0.1, "damp_s": 0.1}


def controller(
    policy: Any = None,
    robot: Any = None,
    clock: Any = None,
    *,
    log: Path | None = None,
    adaptation: Any = None,
    **settings: Any,
) -> Controller:
    """Return a controller of a robot, both on a stepped clock unless another one is given."""
    clock = SteppedClock() if clock is None else clock
    policy = WavePolicy() if policy is None else policy
    robot = RecordingRobot(policy.meta, clock) if robot is None else robot
    robot.clock = clock
    return Controller(
        policy,
        robot,
        PlainLayout(policy.meta),
        RunSettings(**BASE | settings),
        clock=clock,
        log=log,
        adaptation=adaptation,
    )


def test_every_way_to_a_stop_leads_through_damping():
    before_stopped = [
        state for state, after in ALLOWED_TRANSITIONS.items() if ControllerState.STOPPED in after
    ]
    assert before_stopped == [ControllerState.DAMPING]
    for state in (ControllerState.IDLE, ControllerState.READY, ControllerState.RUNNING):
        assert ControllerState.DAMPING in ALLOWED_TRANSITIONS[state]
    machine = ControllerStateMachine()
    with pytest.raises(
        BridgeError, match="no transition from idle to running; allowed: ready, damping"
    ):
        machine.enter(ControllerState.RUNNING)
    assert machine.state is ControllerState.IDLE


def test_a_run_stands_up_acts_and_ends_in_damping():
    one = controller()
    report = one.run()
    robot = one.robot
    assert (report.reason, report.fault) == ("1 trials are over", False)
    assert (
        robot.order.count("command") == report.sent == 10 + 2 * 11 + 10
    )  # ready, two episodes, ready between
    first_damp = robot.order.index("damp")
    assert set(robot.order[first_damp:]) == {"damp"}
    targets = np.array([[c[f"{j}.pos"] for j in JOINTS] for _, c, _ in robot.commands])
    np.testing.assert_allclose(
        targets[9], meta().default_joint_pos, atol=0.02
    )  # where an episode begins
    assert np.abs(np.diff(targets[:10], axis=0)).max() < 0.2
    np.testing.assert_allclose(np.diff([t for t, _, _ in robot.commands]), 0.02)


def test_the_policy_gets_rewards_and_episode_ends_as_in_training():
    one = controller(robot=RestartingRobot(meta()), trials=2)
    one.run()
    inputs = one.policy.inputs
    hips = [reading[f"{JOINTS[0]}.pos"] for _, _, reading in one.robot.commands]
    assert len(inputs) == len(hips) == 40
    done = [i for i, (_, _, episode_ended) in enumerate(inputs) if episode_ended]
    assert done == [10, 30]  # the first step of every episode but the trial's first
    rewards = [reward for _, reward, _ in inputs]
    assert rewards[0] == rewards[20] == 0.0
    # the reward of a step follows from the next reading; after an episode's last the robot restarts
    np.testing.assert_allclose(
        np.delete(rewards, [0, 10, 20, 30]), np.delete(hips, [0, 10, 20, 30])
    )
    assert rewards[10] == pytest.approx(one.report.returns[0][0] - sum(rewards[1:10]))
    assert one.robot.restarts == [0, 1, 0, 1]
    assert one.policy.trials == 2
    np.testing.assert_array_equal(inputs[10][0][:2], np.float32([0.2, -0.4]))


def test_each_reward_is_of_readings_that_follow_each_other():
    one = controller(robot=RestartingRobot(meta()))
    one.run()
    for pairs in one.layout.pairs:
        assert len(pairs) == 10
        assert all(after == before + 1 for before, after in pairs)
        assert [b for b, _ in pairs[1:]] == [a for _, a in pairs[:-1]]


def test_a_fall_ends_the_episode_and_a_robot_that_cannot_get_up_is_damped():
    def fall(count: int, reading: dict[str, float]) -> dict[str, float]:
        return reading | {"terminated": float(count == 15)}

    stays = controller(robot=RecordingRobot(meta(), spoil=fall))
    report = stays.run()
    assert report.fault
    assert report.reason == "the robot has fallen"
    gets_up = controller(robot=RestartingRobot(meta(), spoil=fall))
    report = gets_up.run()
    assert not report.fault
    assert gets_up.robot.order.count("command") == 10 + 1  # the second episode is one step long
    assert len(report.returns[0]) == 2


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda r: r | {"hip.pos": math.nan}, "hip.pos is not finite"),
        (lambda r: r | {"knee.vel": math.inf}, "knee.vel is not finite"),
        (lambda r: r | {"reward": math.nan}, "reward is not finite"),
        (lambda r: r | {"hip.vel": None}, "hip.vel is not finite"),
        (
            lambda r: {k: v for k, v in r.items() if k != "knee.pos"},
            "lacks knee.pos; it has stamp, seq",
        ),
        (lambda r: r | {"stamp": r["stamp"] + 1.0}, "ahead of this machine's"),
        (lambda r: r | {"stamp": r["stamp"] - 1.0}, "clock went back by 0.98 s"),
        (lambda r: r | {"knee.pos": 3.0}, "joint knee reads 3 rad, outside its range -1 to 1"),
        (lambda r: r | {"hip.pos": r["hip.pos"] + 0.7}, "joint hip jumped by"),
        (lambda r: r | {"hip.vel": 21.0}, "joint hip reads 21 rad/s, and can do 20 at most"),
    ],
)
def test_a_bad_reading_is_damped_in_the_same_step(spoil, reason):
    bad = 25
    one = controller(robot=RecordingRobot(meta(), spoil=lambda n, r: spoil(r) if n >= bad else r))
    report = one.run()
    assert report.fault
    assert reason in report.reason
    assert len(one.robot.commands) == bad - 1
    assert one.robot.damps[0] == pytest.approx(one.robot.commands[-1][0] + 0.02)


@pytest.mark.parametrize("key", ["stamp", "seq"])
def test_frozen_readings_are_damped_in_the_stated_time(key):
    frozen: dict[str, float] = {}

    def freeze(count: int, reading: dict[str, float]) -> dict[str, float]:
        frozen.setdefault(key, reading[key] if count == 20 else math.nan) if count == 20 else None
        return reading | frozen if count > 20 else reading

    one = controller(robot=RecordingRobot(meta(), spoil=freeze))
    report = one.run()
    assert report.fault
    assert "no new reading for 50 ms" in report.reason
    last_new = one.robot.commands[19][0]
    assert one.robot.damps[0] - last_new <= damping_bounds_s(0.02)[0]
    assert report.repeated == 2


def test_a_reading_out_of_order_is_not_believed():
    def swap(count: int, reading: dict[str, float]) -> dict[str, float]:
        late = {"stamp": reading["stamp"] - 0.05, "seq": reading["seq"] - 2.5, "hip.pos": -0.9}
        return reading | late if count == 20 else reading

    one = controller(robot=RecordingRobot(meta(), spoil=swap))
    report = one.run()
    assert not report.fault
    assert (report.repeated, report.disordered) == (1, 1)
    assert all(obs[0] != np.float32(-0.9) for obs, _, _ in one.policy.inputs)


def test_a_lost_link_ends_the_run():
    def lose(count: int, reading: dict[str, float]) -> dict[str, float]:
        if count == 20:
            raise BridgeError("nobody publishes states any more")
        return reading

    one = controller(robot=RecordingRobot(meta(), spoil=lose))
    report = one.run()
    assert (report.fault, report.reason) == (True, "nobody publishes states any more")
    assert one.robot.damps


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda p, o: np.array([np.nan, 0.0]), "not finite"),
        (lambda p, o: np.array([np.inf, 0.0]), "not finite"),
        (lambda p, o: np.array([1e300, 0.0]), "not finite"),
        (lambda p, o: np.zeros(3), "shape (3,), not (2,)"),
    ],
)
def test_garbage_from_a_policy_is_never_sent(answer, reason):
    one = controller(WavePolicy(act=answer), trials=1)
    report = one.run()
    assert report.fault
    assert reason in report.reason
    assert len(one.robot.commands) == 10  # those that stood it up


def test_huge_actions_are_brought_within_limits_and_counted():
    one = controller(WavePolicy(act=lambda p, o: np.array([4000.0, -4000.0])))
    report = one.run()
    assert not report.fault
    assert report.limited["hip"]["position"] > 0
    for _, command, seen in one.robot.commands:
        for j in JOINTS:
            assert abs(command[f"{j}.pos"]) <= 1.0
            drive = 40 * (command[f"{j}.pos"] - seen[f"{j}.pos"]) - seen[f"{j}.vel"]
            assert abs(drive) <= 20 + 1e-9


def test_a_policy_that_is_late_three_times_is_damped_before_its_command_is_stale():
    clock = SteppedClock()

    def dawdle(policy: WavePolicy, obs: Any) -> Any:
        clock.time += 0.025
        return np.zeros(2)

    one = controller(WavePolicy(act=dawdle), clock=clock)
    report = one.run()
    assert "longer than a control period 3 times" in report.reason
    assert len(one.robot.commands) == 12


def test_a_policy_that_comes_back_too_late_sends_nothing_more():
    clock = SteppedClock()

    def hang(policy: WavePolicy, obs: Any) -> Any:
        clock.time += 0.2 if len(policy.inputs) == 4 else 0.0
        return np.zeros(2)

    one = controller(WavePolicy(act=hang), clock=clock)
    report = one.run()
    assert report.fault
    assert "for 50 ms" in report.reason
    assert len(one.robot.commands) == 13


class FakeAdaptation:
    """An adaptation that takes 30 polls, and then has the next of its results."""

    rollouts = 1

    def __init__(self, contexts: list[Any]) -> None:
        self.contexts = contexts
        self.undo: list[Any] = []
        """Answers of ``review``."""
        self.ready = False
        self.busy = False
        self.polls = 0
        self.steps: list[Any] = []
        self.episodes: list[Any] = []

    def step(self, obs: Any, action: Any, reward: float) -> None:
        self.steps.append((obs.copy(), action.copy(), reward))

    def end(self, final_obs: Any, *, failed: bool) -> None:
        self.episodes.append(self.steps)
        self.steps = []
        self.ready = True

    def drop(self) -> None:
        pass

    def clear(self) -> None:
        self.ready = False

    def review(self) -> Any:
        return self.undo.pop(0) if self.undo else None

    def start(self, context: Any) -> None:
        self.ready = False
        self.busy = True
        self.polls = 0

    def poll(self) -> Any:
        self.polls += 1
        if self.polls < 30:
            return None
        self.busy = False
        context = self.contexts.pop(0)
        reason = "" if context else "too far"
        return SimpleNamespace(context=context, reason=reason, kl=0.1, seconds=0.5)

    def stop(self) -> None:
        self.busy = False


def test_an_adapted_context_that_turns_out_worse_is_rolled_back():
    old = {"weights": np.zeros(3)}
    new = {"weights": np.ones(3)}
    adaptation = FakeAdaptation([new, new])
    fell = SimpleNamespace(context=old, reason="the mean return fell from 5.0 to 1.0 in 3 episodes")
    adaptation.undo = [None, fell]
    one = controller(adaptation=adaptation, episodes=3)
    report = one.run()
    assert one.policy.contexts[:2] == [new, old]
    assert report.adapted[1] == (
        "rolled back to the old weights: the mean return fell from 5.0 to 1.0 in 3 episodes"
    )


def test_an_adapted_context_is_used_from_the_next_episode_on_or_refused():
    adaptation = FakeAdaptation([{"weights": np.ones(3)}, None])
    one = controller(adaptation=adaptation, episodes=3)
    report = one.run()
    assert not report.fault
    assert report.adapted == [
        "switched to new weights, KL 0.1, after 0.5 s",
        "kept the old weights: too far",
    ]
    assert len(one.policy.contexts) == 1
    assert [len(episode) for episode in adaptation.episodes] == [10, 10, 10]
    # meanwhile the robot was held: commands did not stop
    np.testing.assert_allclose(np.diff([t for t, _, _ in one.robot.commands]), 0.02)
    observed = [obs for obs, _, _ in one.policy.inputs[:10]]
    np.testing.assert_array_equal([obs for obs, _, _ in adaptation.episodes[0]], observed)
    np.testing.assert_allclose(
        [reward for _, _, reward in adaptation.episodes[0][:-1]],
        [reward for _, reward, _ in one.policy.inputs[1:10]],
    )


def test_the_last_episode_of_a_trial_is_not_adapted_to():
    adaptation = FakeAdaptation([{"weights": np.ones(3)}, {"weights": np.ones(3)}])
    one = controller(adaptation=adaptation, episodes=2, trials=2)
    assert not one.run().fault
    assert len(one.policy.contexts) == 2
    assert one.policy.trials == 2


def test_the_log_holds_every_step_and_what_happened(tmp_path: Path):
    one = controller(log=tmp_path / "run.mcap", robot=RestartingRobot(meta()))
    report = one.run()
    content = list(read_log(tmp_path / "run.mcap"))
    ticks = [c for topic, c in content if topic == "/tick"]
    events = [c for topic, c in content if topic == "/event"]
    assert report.dropped == 0
    assert len(ticks) == report.pace["ticks"] == 2 * 12
    acted = [t for t in ticks if t["action"][0] is not None]
    np.testing.assert_array_equal([t["obs"] for t in acted], [o for o, _, _ in one.policy.inputs])
    assert [t["reward"] for t in acted] == [r for _, r, _ in one.policy.inputs]
    assert [t["sent"] for t in acted] == [c for _, c, _ in one.robot.commands]
    assert [e["value"] for e in events if e["what"] == "episode"] == report.returns[0]
    states = [e["state"] for e in events if e["what"] == "state"]
    assert states == ["ready", "running", "ready", "running", "damping", "stopped"]


def test_damping_goes_out_in_real_time_while_the_policy_hangs():
    hanging, go_on = threading.Event(), threading.Event()

    def hang(policy: WavePolicy, obs: Any) -> Any:
        if len(policy.inputs) == 5:
            hanging.set()
            go_on.wait(10.0)
        return np.zeros(2)

    one = controller(WavePolicy(act=hang), clock=MonotonicClock(), ready_s=0.04)
    with GateWatchdog(one.gate):
        thread = threading.Thread(target=one.run)
        thread.start()
        assert hanging.wait(10.0)
        end = time.monotonic() + 5.0
        while not one.robot.damps and time.monotonic() < end:
            time.sleep(0.001)
        sent = len(one.robot.commands)
        go_on.set()
        thread.join()
    assert one.robot.damps[0] - one.robot.commands[-1][0] >= one.gate.patience_s
    assert len(one.robot.commands) == sent  # nothing after damping, although the policy came back
    assert one.report.fault


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_damps_even_while_the_main_thread_is_busy(number):
    robot = RecordingRobot(meta(), MonotonicClock())
    handler = signal.getsignal(number)
    with (
        stop_signals(keys=False) as stop,
        GateWatchdog(gate := CommandGate(robot, MonotonicClock(), 0.02), stop.sources),
    ):
        os.kill(os.getpid(), number)
        end = time.monotonic() + 5.0
        while not robot.damps and time.monotonic() < end:
            sum(range(1000))
    assert (gate.reason, gate.fault) == (signal.Signals(number).name, False)
    assert signal.getsignal(number) is handler


def test_a_missed_deadline_is_the_loops_own_only_if_its_own_share_is_too_long():
    timer = LoopTimer(MonotonicClock(), 0.01)
    timer.restart()
    timer.wait()
    end = time.thread_time() + 0.025
    while time.thread_time() < end:
        pass
    timer.finish_tick()
    assert timer.missed_own >= 2
    own = timer.missed_own
    timer.wait()
    timer.finish_tick()
    assert timer.missed_own == own
    timer.wait()
    time.sleep(0.025)  # waiting is the loop's own doing too
    timer.finish_tick()
    assert timer.missed_own > own
    own, host = timer.missed_own, timer.missed_host
    timer.wait(lambda: time.sleep(0.025))  # but for a reading that is late
    timer.finish_tick()
    assert (timer.missed_own, timer.ticks) == (own, 4)
    assert timer.missed_host > host


def test_missed_deadlines_are_skipped_and_not_made_up_for():
    clock = SteppedClock()
    timer = LoopTimer(clock, 0.02)
    timer.restart()
    timer.wait()
    clock.time += 0.09
    timer.finish_tick()
    assert timer.missed_own + timer.missed_host == 4
    timer.wait()
    assert clock.time == pytest.approx(0.12)


def test_only_a_loop_that_does_not_come_back_is_given_up():
    given_up: list[str] = []
    for noticed in (True, False):
        gate = CommandGate(RecordingRobot(meta(), MonotonicClock()), MonotonicClock(), 0.02)
        with GateWatchdog(gate) as watchdog:
            watchdog.loop_hung_s = 0.05
            watchdog.on_loop_hung = lambda: given_up.append("hung")
            gate.loop_noticed = noticed
            gate.damp("a test")
            time.sleep(0.3)
        assert len(given_up) == (not noticed)


class UndampableRobot(RecordingRobot):
    """A robot whose driver raises whenever it should damp, until ``works``."""

    works = False
    failures = 0
    errors = (RuntimeError, ValueError, KeyError, OSError, BridgeError, MemoryError, TypeError)

    def damp(self) -> None:
        if not self.works:
            self.failures += 1
            raise self.errors[self.failures % len(self.errors)]("a bug in the driver")
        super().damp()


def wait_until(condition: Any, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.002)


def test_a_driver_that_cannot_damp_is_asked_again_until_it_can():
    robot = UndampableRobot(meta())
    clock = SteppedClock()
    one = controller(robot=robot, clock=clock)

    def mend(deadline: float) -> None:
        clock.time = max(clock.time, deadline)
        robot.works = robot.failures >= 500

    clock.sleep_until = mend
    report = one.run()
    assert robot.failures == 500
    assert robot.damps
    assert (report.reason, report.fault) == ("1 trials are over", False)


def test_only_a_second_stop_gives_up_a_robot_that_cannot_be_damped():
    reader, writer = os.pipe()
    robot = UndampableRobot(meta(), MonotonicClock())
    lines: list[str] = []
    one = controller(robot=robot, clock=MonotonicClock(), damp_s=0.05)
    one._show_message = lines.append
    watchdog = GateWatchdog(one.gate, [(reader, lambda data: "a key was pressed")])
    with watchdog:
        thread = threading.Thread(target=one.run)
        thread.start()
        wait_until(lambda: robot.commands)
        os.write(writer, b"q")
        wait_until(lambda: one.gate.reason)
        os.write(writer, b"q")  # a key that repeats is no second stop
        wait_until(lambda: any("cannot be damped" in line for line in lines))
        failures = robot.failures
        wait_until(lambda: robot.failures > failures + 20)
        assert thread.is_alive()
        assert not one.gate.give_up
        time.sleep(max(one.gate.damped_at + STOP_AGAIN_S + 0.05 - time.monotonic(), 0.0))
        os.write(writer, b"q")
        thread.join(10.0)
        assert not thread.is_alive()
    os.close(writer)
    os.close(reader)
    assert one.report.fault
    assert one.report.reason.startswith("a key was pressed; the robot could not be damped: ")


def test_neither_driver_nor_stop_source_ends_the_watchdog():
    def explode(data: bytes) -> str:
        raise ZeroDivisionError

    for explodes in (False, True):
        reader, writer = os.pipe()
        robot = UndampableRobot(meta(), MonotonicClock())
        gate = CommandGate(robot, MonotonicClock(), 0.02)
        with GateWatchdog(gate, [(reader, explode)]):
            if explodes:
                os.write(writer, b"q")
            else:
                gate.note_new_reading()  # and no more
            wait_until(lambda robot=robot: robot.failures > 10)
            robot.works = True
            wait_until(lambda robot=robot: robot.damps)
        expected = "the watchdog failed: ZeroDivisionError" if explodes else "no new reading for"
        assert gate.reason.startswith(expected)
        os.close(writer)
        os.close(reader)


def test_a_panel_or_log_that_fails_does_not_end_the_damping():
    def fail(line: str) -> None:
        if line.startswith(("damping", "stopped")):
            raise OSError("broken pipe")

    one = controller(damp_s=0.2)
    one._show_message = fail
    one.run()
    assert len(one.robot.damps) >= 10


def guard_answers(heartbeats: bool) -> tuple[bool, int]:
    """Return whether a guard took the run's end for a good one, and how often it answered."""
    reader, writer = os.pipe()
    answers: list[float] = []
    result: list[bool] = []
    thread = threading.Thread(
        target=lambda: result.append(
            watch_heartbeats(reader, 0.2, lambda: answers.append(time.monotonic()))
        )
    )
    thread.start()
    time.sleep(0.3)  # before the first heartbeat there is no timeout
    assert thread.is_alive()
    os.write(writer, b"b")
    for _ in range(20 if heartbeats else 0):
        os.write(writer, b"b")
        time.sleep(0.02)
    if heartbeats:
        os.write(writer, b"o")
    thread.join(10.0)
    os.close(writer)
    os.close(reader)
    return result[0], len(answers)


def test_the_guard_answers_heartbeats_and_notices_their_end():
    ended_well, answers = guard_answers(True)
    assert ended_well
    assert answers >= 20
    ended_well, _ = guard_answers(False)
    assert not ended_well


def test_the_guard_damps_whatever_the_driver_raises():
    robot = UndampableRobot(meta(), MonotonicClock())
    threading.Timer(0.2, lambda: setattr(robot, "works", True)).start()
    damp_until_done(robot, 0.3)
    assert robot.failures > 2
    assert robot.damps[-1] - robot.damps[0] > 0.2


def test_reference_cycles_of_a_driver_are_freed_between_episodes():
    """Collections are off while the loop runs: a leaking driver would fill the memory in time."""
    alive = weakref.WeakSet()

    class Cycle:
        def __init__(self):
            self.itself = self
            self.data = bytearray(10_000)
            alive.add(self)

    most = 0

    def leak(number: int, reading: dict[str, float]) -> dict[str, float]:
        nonlocal most
        Cycle()
        most = max(most, len(alive))
        return reading

    one = controller(robot=RestartingRobot(meta(), SteppedClock(), leak), episodes=50)
    one.run()
    assert one.robot.reads > 500
    assert most < 100


def test_the_guard_hears_of_a_robot_that_holds_itself_between_commands():
    about = meta(
        layout="direct",
        joint_names=(),
        observation_names=("hip.pos", "knee.pos", "hip.vel", "knee.vel"),
        action=meta().action.__class__(("hip.pos", "knee.pos"), (-1.0, -1.0), (1.0, 1.0)),
    )
    beats: list[float] = []
    clock = SteppedClock()
    robot = RecordingRobot(about, clock)
    layout = PlainLayout(about)
    layout.targets = lambda action: dict(zip(about.action.names, action.tolist(), strict=True))
    one = Controller(
        WavePolicy(about, act=lambda policy, obs: np.zeros(2)),
        robot,
        layout,
        RunSettings(**BASE),
        clock=clock,
        heartbeat=lambda: beats.append(clock.now()),
        adaptation=FakeAdaptation([{"weights": np.ones(3)}]),
    )
    report = one.run()
    assert report.reason == "1 trials are over"
    # 30 periods pass without a command while an adaptation goes on
    assert max(np.diff([when for when, _, _ in robot.commands])) > 0.5
    assert max(np.diff(beats)) <= one.gate.patience_s
