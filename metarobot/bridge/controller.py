"""The control loop: a policy on a robot at a fixed rate, from the first reading to damping.

A trial runs as in training: its episodes follow each other, each at most ``horizon`` steps long. In
each step the policy gets the reward of its last action, and whether an episode has just ended. One
tick of the loop is

    wait -> read -> check the reading -> reward -> observe -> act -> limit -> gate -> robot -> log

The loop runs in one thread. The watchdog's thread may close the gate at any time; the loop notices
in its next tick, or when it sends. Whatever ends a run, the robot is damped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metarobot.bridge.errors import BridgeError, OperatorStopError
from metarobot.bridge.loop_timing import (
    LoopClock,
    LoopTimer,
    MonotonicClock,
    collect_garbage,
    without_gc_pauses,
)
from metarobot.bridge.robot_interface import (
    BlockingRobot,
    Float32Array,
    Reading,
    RestartableRobot,
    Robot,
    SignalLayout,
    TaskSelectableRobot,
)
from metarobot.bridge.run_report import EpisodeAdaptation, RunnablePolicy, RunReport, RunSettings
from metarobot.bridge.safety.command_gate import CommandGate
from metarobot.bridge.safety.command_limits import CommandLimiter, blend
from metarobot.bridge.safety.plausibility_checks import PlausibilityChecker
from metarobot.bridge.safety.reading_checks import OPTIONAL_KEYS, ReadingChecker
from metarobot.bridge.state_machine import ControllerState, ControllerStateMachine
from metarobot.bridge.tools.run_log import LogRow, RunLog

MOST_SLOW_STEPS = 3
"""The run ends when the policy takes longer than a control period so many times in succession.

A single slow step is within the gate's patience; a policy that is always slow would have the robot
follow commands for a state that has passed."""
RESTART_PATIENCE_S = 1.0
"""How long a robot may be silent after its restart, while it holds itself."""
STATUS_INTERVAL_S = 0.2
"""How often the status is shown."""

STATE_NUMBERS = {state: number for number, state in enumerate(ControllerState)}
"""Number of a state in the log."""

TICK_COLUMNS = (
    "time",
    "state",
    "trial",
    "episode",
    "step",
    "reward",
    "done",
    "new",
    "late_ms",
    "work_ms",
    "policy_ms",
)
"""Columns of a tick in the log that are neither readings, observations nor commands."""
TIME = TICK_COLUMNS.index("time")
STATE = TICK_COLUMNS.index("state")
TRIAL = TICK_COLUMNS.index("trial")
EPISODE = TICK_COLUMNS.index("episode")
STEP = TICK_COLUMNS.index("step")
REWARD = TICK_COLUMNS.index("reward")
DONE = TICK_COLUMNS.index("done")
NEW = TICK_COLUMNS.index("new")
LATE_MS = TICK_COLUMNS.index("late_ms")
WORK_MS = TICK_COLUMNS.index("work_ms")
POLICY_MS = TICK_COLUMNS.index("policy_ms")


class TimeIsOverError(BridgeError):
    """The run's time is over: the usual end of a run, and no fault."""


class Controller:
    """Run a policy on a connected robot; ``run`` always ends with damping.

    Args:
        policy: Policy to run.
        robot: Connected robot.
        layout: Turns readings into observations and actions into commands.
        settings: Rate, duration and so on.
        clock: Time of the loop; the machine's monotonic clock if None.
        heartbeat: Called with each command, for the guard process.
        log: MCAP file to write.
        adaptation: Adaptation between episodes.
        show_status: Called now and then with ``status()``.
        show_message: Called with a line on each event.
    """

    def __init__(
        self,
        policy: RunnablePolicy,
        robot: Robot,
        layout: SignalLayout,
        settings: RunSettings,
        *,
        clock: LoopClock | None = None,
        heartbeat: Callable[[], None] = lambda: None,
        log: Path | None = None,
        adaptation: EpisodeAdaptation | None = None,
        show_status: Callable[[dict[str, Any]], None] = lambda status: None,
        show_message: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.policy = policy
        self.robot = robot
        self.layout = layout
        self.settings = settings
        self.clock: LoopClock = MonotonicClock() if clock is None else clock
        self.report = RunReport()
        self._meta = policy.meta
        self._period_s = 1 / settings.hz
        self._adaptation = adaptation
        self._show_status = show_status
        self._show_message = show_message

        # What stands between the policy and the robot
        self.gate = CommandGate(robot, self.clock, self._period_s, heartbeat)
        self._limiter = CommandLimiter(self._meta, self._period_s, settings.rate)
        self._readings = ReadingChecker(layout.needed())
        self._timer = LoopTimer(self.clock, self._period_s)
        self._machine = ControllerStateMachine(self._on_state_change)

        # What the robot can do beyond the minimum
        self._restartable = isinstance(robot, RestartableRobot)
        self._await_reading: Callable[[], None] = lambda: None
        if isinstance(robot, BlockingRobot):
            self._await_reading = robot.await_reading

        # Joints and poses; a robot of a "direct" policy has none that the controller knows
        self._legged = self._meta.layout == "legged"
        names = self._limiter.names
        size = len(names)
        self._plausibility: PlausibilityChecker | None = None
        self._pos = np.zeros(size)
        self._vel = np.zeros(size)
        if self._legged:
            self._plausibility = PlausibilityChecker(self._meta, layout.needed(), self._period_s)
            # Angles and speeds of the latest reading; other robots keep zeros
            self._pos = self._plausibility.pos
            self._vel = self._plausibility.vel
        self._targets: NDArray[np.float64] | None = None
        """Targets that the joints have; None until a command was sent."""
        self._asked = np.zeros(size)
        """The command that the policy's latest action stands for."""
        self._blend_start = np.zeros(size)
        self._blended = np.zeros(size)
        pose = self._meta.default_joint_pos if self._legged else (0.0,) * size
        self._default_pose = np.clip(
            np.array(pose, np.float64), self._limiter.low, self._limiter.high
        )

        # Progress
        self._noise_rng = np.random.default_rng(settings.seed)
        self._end_time = math.inf
        self._trial = 0
        self._episode = 0
        self._step = 0
        self._return = 0.0
        self._slow_steps = 0
        self._status_shown_at = -math.inf
        self._last_obs: Float32Array = np.zeros(len(self._meta.observation_names), np.float32)
        self._last_chosen: NDArray[np.float64] = np.zeros(len(self._meta.action.names))

        # The log's row is filled in any case: without a log it costs little, and a loop that times
        # the same with and without one is easier to reason about
        needed = dict.fromkeys(("stamp", "seq", *layout.needed()))
        needed_keys = [key for key in needed if key not in OPTIONAL_KEYS]
        self._needed_values = itemgetter(*needed_keys)
        self.row = LogRow(
            {
                "tick": TICK_COLUMNS,
                "reading": [*needed_keys, *OPTIONAL_KEYS],
                "obs": self._meta.observation_names,
                "noise": [f"noise_{i}" for i in range(self._meta.noise)],
                "action": self._meta.action.names,
                "asked": names,
                "sent": names,
                "limited": self._limiter.joints,
            }
        )
        self._log: RunLog | None = None
        if log is not None:
            about = {
                "policy": self._meta.sha256,
                "family": self._meta.family,
                "robot": robot.name,
            }
            about |= {name: str(value) for name, value in asdict(settings).items()}
            self._log = RunLog(log, self.row, about, settings.log_part_mb, settings.log_max_mb)

    def run(self) -> RunReport:
        """Run trials until the time is over or something is wrong, damp the robot, and report.

        Errors other than ``BridgeError`` and ``OSError`` are raised after damping: they are bugs.
        """
        self._end_time = self.clock.now() + self.settings.seconds
        reason = "an error in the controller"
        try:
            with without_gc_pauses():
                self._timer.restart()
                self._machine.enter(ControllerState.READY)
                reason = self._run_trials()
        except TimeIsOverError as e:
            reason = str(e)
        except OperatorStopError as e:
            reason = str(e)
            self.gate.damp(reason, fault=False)
        except BridgeError as e:
            reason = str(e)
            # An operator's stop is no fault; the gate knows the difference
            self.report.fault = self.gate.fault
        except OSError as e:
            reason = f"the robot's driver failed: {e.strerror or e}"
            self.report.fault = True
        finally:
            self._damp_and_stop(reason)
        return self.report

    def _run_trials(self) -> str:
        """Run as many trials as were asked for; return why the run ended."""
        rollouts = 1 if self._adaptation is None else self._adaptation.rollouts
        episodes = rollouts * (self.settings.episodes or self._meta.trial.episodes)
        wanted = self.settings.trials
        while not wanted or self._trial < wanted:
            self.policy.begin()
            self.report.returns.append([])
            last_reward = 0.0
            for episode in range(episodes):
                self._episode = episode
                self._go_to_start()
                last_reward = self._run_episode(last_reward)
                self._start_adaptation(trial_is_over=episode + 1 == episodes)
                collect_garbage()
            self._trial += 1
        return f"{wanted} trials are over"

    # Between episodes ---------------------------------------------------------------------------

    def _go_to_start(self) -> None:
        """Bring the robot to an episode's start; hold it there until an adaptation is finished."""
        if self._machine.state is not ControllerState.READY:
            self._machine.enter(ControllerState.READY)
        if self._restartable:
            self._restart_robot()
        elif self._legged:
            self._move_to_default_pose()
        else:
            # A robot without joints that we know: it holds itself, and is only watched
            self.gate.expect_commands(False)
            self._watch_until(self._adaptation_is_finished)

    def _restart_robot(self) -> None:
        """Have the robot put itself at the start; it holds itself until the first command."""
        assert isinstance(self.robot, RestartableRobot)
        # A robot that was damped must stay damped: a restart would end that
        self.gate.check()

        # Wait for the adaptation first: after its restart the robot must not wait for long
        self.gate.pause()
        while not self._adaptation_is_finished():
            self._begin_tick(watched=False)
            self._end_tick()

        if isinstance(self.robot, TaskSelectableRobot):
            self.robot.select_task(self._trial)
        self.robot.restart(self._episode)

        # The restart took time and may have moved the robot's clock
        self._readings.reset()
        self._targets = None
        if self._plausibility is not None:
            self._plausibility.begin()
        self._timer.restart()
        self.gate.pause(RESTART_PATIENCE_S)
        self._watch_until(lambda: bool(self._readings.latest), watched=False)
        self.gate.note_new_reading()

    def _move_to_default_pose(self) -> None:
        """Move the joints to the default pose, at rest at both ends, and hold it.

        The motion starts from the measured angles: a target far from them would be a jerk.
        """
        steps = max(math.ceil(self.settings.ready_s / self._period_s), 1)
        done = 0
        while done < steps or not self._adaptation_is_finished():
            self._begin_tick()
            if done == 0:
                if self._plausibility is not None and self._targets is None:
                    self._plausibility.check_start()
                self._blend_start[:] = self._pos
                self._limiter.begin(self._pos)
                # From here on the robot depends on commands, so they must not stop
                self.gate.expect_commands(True)
            done += 1
            target = blend(self._blend_start, self._default_pose, done / steps, self._blended)
            self._limit_and_send(target)
            self._end_tick()

    def _watch_until(self, condition: Callable[[], bool], watched: bool = True) -> None:
        """Read without commanding until ``condition`` holds, for one tick at least."""
        while True:
            self._begin_tick(watched)
            # The guard process must not take a robot that holds itself for one without controller
            self.gate.beat()
            self._end_tick()
            if condition():
                return

    def _adaptation_is_finished(self) -> bool:
        """Return whether no adaptation is going on; take over the result of one that has ended."""
        if self._adaptation is None or not self._adaptation.busy:
            return True
        result = self._adaptation.poll()
        if result is None:
            return False

        if result.context is None:
            line = f"kept the old weights: {result.reason}"
        else:
            self.policy.set_context(result.context)
            line = f"switched to new weights, KL {result.kl:.3g}, after {result.seconds:.1f} s"
        self.report.adapted.append(line)
        self._announce(line, "adapted", context=result.context)
        return True

    def _start_adaptation(self, trial_is_over: bool) -> None:
        """Begin to adapt if enough episodes are collected; undo an adaptation that was no good.

        At the end of a trial they are discarded: the next trial begins with a new context.
        """
        if self._adaptation is None:
            return
        undone = self._adaptation.review()
        if undone is not None:
            self.policy.set_context(undone.context)
            line = f"rolled back to the old weights: {undone.reason}"
            self.report.adapted.append(line)
            self._announce(line, "adapted", context=undone.context)
        if trial_is_over:
            self._adaptation.clear()
        elif self._adaptation.ready:
            self._adaptation.start(self.policy.context())

    # An episode ---------------------------------------------------------------------------------

    def _run_episode(self, last_reward: float) -> float:
        """Run an episode; return the reward of its last action.

        ``last_reward`` is that of the episode before: the policy gets it in the first step, as in
        training. An episode of ``horizon`` actions takes ``horizon + 1`` ticks, because the reward
        of an action is known with the next reading only.
        """
        self._machine.enter(ControllerState.RUNNING)
        self.layout.begin()

        # A robot that was held at the default pose continues from its last command; one that was
        # restarted may begin anywhere
        if self._legged and not self._restartable:
            self._limiter.begin(self._limiter.out)
        else:
            self._limiter.begin()
        self._blend_start[:] = self._default_pose
        self.gate.expect_commands(True)

        action: Float32Array = np.zeros(len(self._meta.action.names), np.float32)
        last_action = action
        before: Reading | None = None
        reward = last_reward
        self._return = 0.0
        for step in range(self._meta.trial.horizon + 1):
            self._step = step
            reading = self._begin_tick()
            if before is not None:
                reward = self.layout.reward(before, reading, action, last_action)
                self._return += reward
                fallen = self.layout.ended(reading)
                if self._adaptation is not None:
                    self._adaptation.step(self._last_obs, self._last_chosen, reward)
                if fallen or step == self._meta.trial.horizon:
                    self._finish_episode(reading, action, reward, fallen)
                    return reward
            last_action = action
            before = reading
            action = self._act(reading, action, reward)
            self._end_tick()
        raise AssertionError  # an episode has at least one step

    def _act(self, reading: Reading, last_action: Float32Array, reward: float) -> Float32Array:
        """Observe, act and send; return the action."""
        episode_ended = self._step == 0 and self._episode > 0
        obs = self.layout.observe(reading, last_action)
        noise = None
        if self._meta.noise:
            noise = self._noise_rng.standard_normal(self._meta.noise).astype(np.float32)

        started = self.clock.now()
        action = self.policy.act(obs, reward, episode_ended, noise)
        policy_s = self.clock.now() - started

        self._slow_steps = self._slow_steps + 1 if policy_s > self._period_s else 0
        if self._slow_steps >= MOST_SLOW_STEPS:
            # Closes the gate: the command of this step is not sent any more
            self.gate.damp(
                f"the policy took longer than a control period {MOST_SLOW_STEPS} times in "
                f"succession: {1e3 * policy_s:.0f} ms"
            )

        self._log_action(obs, noise, reward, episode_ended, policy_s)
        if np.shape(action) != np.shape(last_action):
            raise BridgeError(
                f"the policy's action is of shape {np.shape(action)}, not {np.shape(last_action)}"
            )
        self._send_action(action)
        return np.asarray(action)

    def _send_action(self, action: Float32Array) -> None:
        """Turn an action into a command, blended in at an episode's start, and send it.

        A policy's first command may be far from the pose that is held; the blend turns the step
        into a ramp of ``soft_s``.
        """
        command = self.layout.targets(action)
        self._asked[:] = [command[name] for name in self._limiter.names]
        soft_s = 0.0 if self._restartable else self.settings.soft_s
        progress = 1.0 if soft_s <= 0 else (self._step + 1) * self._period_s / soft_s
        target = blend(self._blend_start, self._asked, progress, self._blended)
        self._limit_and_send(target)

    def _finish_episode(
        self, reading: Reading, action: Float32Array, reward: float, fallen: bool
    ) -> None:
        """Account for an episode at its last reading; end the run if the robot has fallen."""
        final_obs = self.layout.observe(reading, action)
        if self._adaptation is not None:
            self._adaptation.end(final_obs, failed=fallen)
        self.report.returns[-1].append(self._return)
        line = (
            f"trial {self._trial + 1} episode {self._episode + 1}: "
            f"return {self._return:.2f} in {self._step} steps"
        )
        if fallen:
            line += ", fallen"
        self._announce(
            line,
            "episode",
            reward=reward,
            value=self._return,
            steps=self._step,
            fallen=fallen,
        )
        if not self._restartable:
            if fallen:
                # It cannot be moved to its pose from there, and somebody must look after it
                raise BridgeError("the robot has fallen")
            # Hold the last command in this tick: commands must not stop between episodes
            self._limit_and_send(self._asked)
        self._end_tick()

    # A tick; nothing here may wait, as all of it together must fit into a control period ---------

    def _begin_tick(self, watched: bool = True) -> Reading:
        """Wait for the next tick, and read; return the newest valid reading.

        Args:
            watched: Whether readings must not stop: each new one keeps the gate open.

        Raises:
            DampedError: the gate is closed.
            TimeIsOverError: the run's time is over.
            ReadingError: the reading must not be acted on.
            ImplausibleReadingError: it cannot be true, or the robot has fallen.
        """
        late_s = self._timer.wait(self._await_reading)
        self.row.data.fill(np.nan)
        tick = self.row["tick"]
        tick[LATE_MS] = 1e3 * late_s

        # Before anything else: the watchdog may have damped the robot while the loop slept
        self.gate.check()
        if self.clock.now() >= self._end_time:
            raise TimeIsOverError(f"{self.settings.seconds:g} s are over")

        reading = self.robot.get_observation()
        now = self.clock.now()
        is_new = self._readings.accept(reading, now)
        if is_new and self._plausibility is not None:
            # A robot that restarts after a fall, as a simulated one, is judged by its layout alone
            self._plausibility.check(reading, self._targets, fallen_is_fault=not self._restartable)
        if is_new and watched:
            self.gate.note_new_reading()

        latest = self._readings.latest
        tick[TIME] = now
        tick[STATE] = STATE_NUMBERS[self._machine.state]
        tick[TRIAL] = self._trial
        tick[EPISODE] = self._episode
        tick[STEP] = self._step
        tick[NEW] = is_new
        # Before the first reading after a restart there is none; the row then keeps NaN
        if latest:
            logged = self.row["reading"]
            logged[: -len(OPTIONAL_KEYS)] = self._needed_values(latest)
            logged[-len(OPTIONAL_KEYS) :] = [latest.get(key, math.nan) for key in OPTIONAL_KEYS]
        return latest

    def _limit_and_send(self, target: NDArray[np.float64]) -> None:
        """Move a command into its limits at the latest reading, and send it through the gate."""
        self.row["asked"][:] = target
        safe = self._limiter(target, self._pos, self._vel)
        sent = self.gate.send(dict(zip(self._limiter.names, safe.tolist(), strict=True)))
        self.row["sent"][:] = [sent.get(name, math.nan) for name in self._limiter.names]
        self.row["limited"][:] = self._limiter.bits()
        self._targets = safe

    def _log_action(
        self,
        obs: Float32Array,
        noise: Float32Array | None,
        reward: float,
        episode_ended: bool,
        policy_s: float,
    ) -> None:
        """Write what the policy got and chose into the log's row, and keep it for adaptation."""
        row = self.row
        row["obs"][:] = obs
        row["action"][:] = self.policy.chosen
        if noise is not None:
            row["noise"][:] = noise
        tick = row["tick"]
        tick[REWARD] = reward
        tick[DONE] = episode_ended
        tick[POLICY_MS] = 1e3 * policy_s
        self._last_obs = obs
        # The next tick clears the row before the reward of this action is known
        self._last_chosen = row["action"].copy()

    def _end_tick(self) -> None:
        """Account for the tick, log it, and now and then show the status."""
        self.row["tick"][WORK_MS] = 1e3 * self._timer.finish_tick()
        if self._log is not None:
            self._log.write_tick()
            # A log that was asked for and cannot be written, as when the disk is full, ends the run
            self._log.check()
        now = self.clock.now()
        if now - self._status_shown_at >= STATUS_INTERVAL_S:
            self._status_shown_at = now
            self._show_status(self.status())

    # Status and end -----------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Return the state of the run, for the terminal panel."""
        return {
            "state": self._machine.state.value,
            "reason": self.gate.reason,
            "trial": self._trial,
            "episode": self._episode,
            "step": self._step,
            "return": self._return,
            "returns": self.report.returns[-2:],
            "left_s": self._end_time - self.clock.now(),
            "pace": self._timer.report() | {"hz": 1 / self._period_s},
            "limited": self._limiter.report(),
            "adapted": self.report.adapted[-3:],
            "adapting": self._adaptation is not None and bool(self._adaptation.busy),
            "dropped": self._log.dropped if self._log is not None else 0,
            "readings": {
                "repeated": self._readings.repeated,
                "disordered": self._readings.disordered,
            },
        }

    def _damp_and_stop(self, reason: str) -> None:
        """Damp the robot for a while, and only then clean up and complete the report.

        Nothing that fails in here keeps the robot from being damped: neither its driver, nor the
        panel or the log. A robot that could not be damped in that time is damped until it succeeds,
        or until somebody says to give up.
        """
        # The watchdog need not end this process: the loop has come back
        self.gate.loop_noticed = True
        self.gate.damp(reason)
        if self._machine.state is not ControllerState.DAMPING:
            self._enter_whatever_fails(ControllerState.DAMPING, self.gate.reason)
        self._timer.close()

        # Repeat, as a single damping command may get lost
        end = self.clock.now() + self.settings.damp_s
        announced = False
        while True:
            now = self.clock.now()
            if now >= end and (self.gate.damping_arrived or self.gate.give_up):
                break
            if now >= end and not announced:
                announced = True
                self._show_whatever_fails(
                    f"the robot cannot be damped: {self.gate.damping_error}; trying on; "
                    "any key, Ctrl-C or SIGTERM gives up"
                )
            self.clock.sleep_until(now + self._period_s)
            self.gate.damp(reason)
        self._enter_whatever_fails(ControllerState.STOPPED)

        if self._adaptation is not None:
            self._adaptation.stop()

        report = self.report
        report.reason = self.gate.reason
        if not self.gate.damping_arrived:
            report.reason += f"; the robot could not be damped: {self.gate.damping_error}"
            report.fault = True
        report.limited = self._limiter.report()
        report.pace = self._timer.report() | {"stolen_s": self._timer.stolen_s}
        report.sent = self.gate.sent
        report.repeated = self._readings.repeated
        report.disordered = self._readings.disordered
        self._show_status(self.status())
        if self._log is not None:
            self._log.write_event("report", **asdict(report))
            self._log.close()
            report.dropped = self._log.dropped
            report.log_failure = self._log.failure

    def _enter_whatever_fails(self, state: ControllerState, reason: str = "") -> None:
        """Change the state; a panel or log that fails must not end the damping."""
        with suppress(Exception):
            self._machine.enter(state, reason)

    def _show_whatever_fails(self, line: str) -> None:
        with suppress(Exception):
            self._show_message(line)

    def _on_state_change(self, state: ControllerState, reason: str) -> None:
        """Log a change of state; show those that end a run."""
        if state in (ControllerState.DAMPING, ControllerState.STOPPED):
            self._show_message(f"{state.value}: {reason}" if reason else state.value)
        if self._log is not None:
            self._log.write_event("state", state=state.value, why=reason)

    def _announce(self, line: str, event: str, **facts: Any) -> None:
        """Show an event, and log it with its facts."""
        self._show_message(line)
        if self._log is not None:
            self._log.write_event(event, line=line, **facts)
