"""The controller: a policy on a robot at a fixed rate, from the first reading to damping.

A trial is lived as in training: its episodes follow each other, each at most ``horizon`` steps
long; at each step the policy is told what its last action earned, and whether an episode has just
ended. A step is: read, reckon the reward, observe, act, pass the limits, send.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.loop_timing import Clock, Monotonic, Pace, undisturbed
from metarobot.bridge.robot_interface import Floats, Layout, Reading, Restarts, Robot, Waits
from metarobot.bridge.run_report import Acting, Adapting, Report, Settings
from metarobot.bridge.safety.command_gate import Gate
from metarobot.bridge.safety.command_limits import Filter, blend
from metarobot.bridge.safety.reading_checks import TOLD, Readings
from metarobot.bridge.state_machine import Machine, State
from metarobot.bridge.tools.run_log import Log, Row

SLOW = 3
"""So many steps in succession in which the policy takes longer than a control period end the
run."""
RESTART_S = 1.0
"""How long a robot may be silent after its restart."""
SHOW_S = 0.2
NUMBER = {state: i for i, state in enumerate(State)}
TICK = (
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


class OverError(BridgeError):
    """The run's time is over."""


class Controller:
    """Runs a policy on a robot that is connected. Whatever happens, ``run`` ends with damping."""

    def __init__(
        self,
        policy: Acting,
        robot: Robot,
        layout: Layout,
        settings: Settings,
        *,
        clock: Clock | None = None,
        beat: Callable[[], None] = lambda: None,
        log: Path | None = None,
        adaptation: Adapting | None = None,
        show: Callable[[dict[str, Any]], None] = lambda status: None,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.policy, self.robot, self.layout, self.settings = policy, robot, layout, settings
        self.clock: Clock = Monotonic() if clock is None else clock
        self._meta, self._period = policy.meta, 1 / settings.hz
        self.gate = Gate(robot, self.clock, self._period, beat)
        self.report = Report()
        self._pace = Pace(self.clock, self._period)
        self._machine = Machine(self._turned)
        self._readings, self._filter = (
            Readings(layout.needed()),
            Filter(self._meta, self._period, settings.rate),
        )
        self._adaptation, self._show, self._tell = adaptation, show, tell
        self._restarts = isinstance(robot, Restarts)
        self._heard: Callable[[], None] = (
            robot.await_reading if isinstance(robot, Waits) else lambda: None
        )
        self._legged = self._meta.layout == "legged"
        self._keys = [name.removesuffix(".pos") for name in self._filter.names]
        names = self._filter.names
        self._pos, self._vel, self._target, self._start, self._asked = (
            np.zeros(len(names)) for _ in range(5)
        )
        pose = self._meta.default_joint_pos if self._legged else np.zeros(len(names))
        self._pose = np.clip(np.array(pose, np.float64), self._filter.low, self._filter.high)
        self._noise = np.random.default_rng(settings.seed)
        self._trial = self._episode = self._step = self._slow = 0
        self._return, self._shown = 0.0, -math.inf
        self.row = Row(
            {
                "tick": TICK,
                "reading": list(dict.fromkeys(("stamp", "seq", *layout.needed(), *TOLD))),
                "obs": self._meta.observation_names,
                "noise": [f"noise_{i}" for i in range(self._meta.noise)],
                "action": self._meta.action.names,
                "asked": names,
                "sent": names,
                "limited": self._filter.joints,
            }
        )
        about = {"policy": self._meta.sha256, "family": self._meta.family, "robot": robot.name}
        self._log = (
            None
            if log is None
            else Log(log, self.row, about | {k: str(v) for k, v in asdict(settings).items()})
        )

    def run(self) -> Report:
        """Live trials until the time is over or something is wrong, then damp the robot; return
        what came of it.
        """
        self._end = self.clock.now() + self.settings.seconds
        reason = "an error in the controller"
        try:
            with undisturbed():
                self._pace.begin()
                self._machine.to(State.READY)
                reason = self._trials()
        except OverError as e:
            reason = str(e)
        except BridgeError as e:
            reason, self.report.fault = str(e), self.gate.fault
        except OSError as e:
            reason, self.report.fault = f"the robot's driver failed: {e.strerror or e}", True
        finally:
            self._limp(reason)
        return self.report

    def _trials(self) -> str:
        """Live as many trials as were asked for."""
        s, trial = self.settings, self._meta.trial
        rollouts = 1 if self._adaptation is None else self._adaptation.rollouts
        episodes = rollouts * (s.episodes or trial.episodes)
        while not s.trials or self._trial < s.trials:
            self.policy.begin()
            self.report.returns.append([])
            told = 0.0
            for episode in range(episodes):
                self._episode = episode
                self._ready()
                told = self._live(told)
                self._adapt(last=episode + 1 == episodes)
            self._trial += 1
        return f"{s.trials} trials are over"

    def _ready(self) -> None:
        """Put or walk the robot to where an episode begins, and hold it there until adapting is
        through.
        """
        if self._machine.state is not State.READY:
            self._machine.to(State.READY)
        if self._restarts:
            self._restart()
        elif self._legged:
            self._stand()
        else:
            self.gate.expect(False)
            self._until(lambda: self._held)

    def _restart(self) -> None:
        """Have the robot put itself there; until the first command it holds itself."""
        assert isinstance(self.robot, Restarts)
        self.gate.check()
        self.gate.pause()
        while not self._held:
            self._look(watched=False)
            self._finish()
        if hasattr(self.robot, "trial"):
            self.robot.trial(self._trial)
        self.robot.restart(self._episode)
        self._readings.forget()
        self._pace.begin()
        self.gate.pause(RESTART_S)
        self._until(lambda: bool(self._readings.latest), watched=False)
        self.gate.fresh()

    def _stand(self) -> None:
        """Go from where the joints are to the default pose, at rest at both ends, and hold it."""
        steps, done = max(math.ceil(self.settings.ready_s / self._period), 1), 0
        while done < steps or not self._held:
            self._look()
            if not done:
                self._joints()
                self._start[:] = self._pos
                self._filter.begin(self._pos)
                self.gate.expect(True)
            done += 1
            self._send(blend(self._start, self._pose, done / steps, self._target))
            self._finish()

    def _until(self, ready: Callable[[], bool], watched: bool = True) -> None:
        """Look on without commanding until a reading came and ``ready`` says so."""
        while True:
            self._look(watched)
            self._finish()
            if ready():
                return

    @property
    def _held(self) -> bool:
        """Whether nothing holds the next episode up; takes in what became of an adaptation."""
        if self._adaptation is None or not self._adaptation.busy:
            return True
        outcome = self._adaptation.poll()
        if outcome is None:
            return False
        if outcome.context is None:
            said = f"kept the old weights: {outcome.reason}"
        else:
            self.policy.adopt(outcome.context)
            said = f"adopted new weights, KL {outcome.kl:.3g}, after {outcome.seconds:.1f} s"
        self.report.adapted.append(said)
        self._say(said, "adapted", context=outcome.context)
        return True

    def _adapt(self, last: bool) -> None:
        """Begin to adapt if there are enough episodes; what a trial's last ones teach is nothing to
        the next trial.
        """
        if self._adaptation is not None and last:
            self._adaptation.clear()
        elif self._adaptation is not None and self._adaptation.ready:
            self._adaptation.start(self.policy.context())

    def _live(self, told: float) -> float:
        """Live an episode; ``told`` is what the last action before it earned. Return what its own
        last one did.
        """
        self._machine.to(State.RUNNING)
        self.layout.begin()
        self._filter.begin(self._filter.out if self._legged and not self._restarts else None)
        self._start[:] = self._pose
        self.gate.expect(True)
        last = action = np.zeros(len(self._meta.action.names), np.float32)
        before, self._return, reward = None, 0.0, told
        for step in range(self._meta.trial.horizon + 1):
            self._step = step
            reading = self._look()
            if before is not None:
                reward = self.layout.reward(before, reading, action, last)
                self._return += reward
                fallen = self.layout.ended(reading)
                self._write_down(reward)
                if fallen or step == self._meta.trial.horizon:
                    return self._close(reading, action, reward, fallen)
            last, before = action, reading
            action = self._act(reading, action, reward)
            self._finish()
        raise AssertionError  # an episode has at least one step

    def _act(self, reading: Reading, last: Floats, reward: float) -> Floats:
        """Observe, act and send; return the action."""
        done = self._step == 0 and self._episode > 0
        obs = self.layout.observe(reading, last)
        noise = (
            self._noise.standard_normal(self._meta.noise).astype(np.float32)
            if self._meta.noise
            else None
        )
        began = self.clock.now()
        action = self.policy.act(obs, reward, done, noise)
        took = self.clock.now() - began
        self._slow = self._slow + 1 if took > self._period else 0
        if self._slow >= SLOW:
            self.gate.damp(
                f"the policy took longer than a control period {SLOW} times in succession: {1e3 * took:.0f} ms"
            )
        self._note(obs, noise, reward, done, took)
        if np.shape(action) != np.shape(last):
            raise BridgeError(
                f"the policy's action is of shape {np.shape(action)}, not {np.shape(last)}"
            )
        self._command(action)
        return np.asarray(action)

    def _command(self, action: Floats) -> None:
        """Turn an action into a command, blended in at an episode's start, and send it."""
        wanted = self.layout.targets(action)
        self._asked[:] = [wanted[name] for name in self._filter.names]
        soft = 0.0 if self._restarts else self.settings.soft_s
        progress = 1.0 if soft <= 0 else (self._step + 1) * self._period / soft
        self._send(blend(self._start, self._asked, progress, self._target))

    def _close(self, reading: Reading, action: Floats, reward: float, fallen: bool) -> float:
        """End an episode at its last reading."""
        obs = self.layout.observe(reading, action)
        if self._adaptation is not None:
            self._adaptation.end(obs, failed=fallen)
        self.report.returns[-1].append(self._return)
        self._say(
            f"trial {self._trial + 1} episode {self._episode + 1}: return {self._return:.2f} in {self._step} steps"
            + (", fallen" if fallen else ""),
            "episode",
            reward=reward,
            value=self._return,
            steps=self._step,
            fallen=fallen,
        )
        if not self._restarts:
            if fallen:
                raise BridgeError("the robot has fallen")
            self._send(self._asked)  # nothing new is asked in the step that ends the episode
        self._finish()
        return reward

    def _look(self, watched: bool = True) -> Reading:
        """Wait for the next step and read; ``watched`` readings keep the gate open."""
        late = self._pace.wait(self._heard)
        self.row.data.fill(np.nan)
        self.row["tick"][8] = 1e3 * late
        self.gate.check()
        if self.clock.now() >= self._end:
            raise OverError(f"{self.settings.seconds:g} s are over")
        reading = self.robot.get_observation()
        now = self.clock.now()
        new = self._readings.take(reading, now)
        if new and watched:
            self.gate.fresh()
        latest = self._readings.latest
        tick = self.row["tick"]
        tick[:5] = now, NUMBER[self._machine.state], self._trial, self._episode, self._step
        tick[7] = new
        self.row["reading"][:] = [latest.get(key, math.nan) for key in self.row.groups["reading"]]
        return latest

    def _joints(self) -> None:
        """Take angles and velocities from the latest reading; robots without joints have none."""
        if self._legged:
            latest = self._readings.latest
            self._pos[:] = [latest[name] for name in self._filter.names]
            self._vel[:] = [latest[f"{key}.vel"] for key in self._keys]

    def _send(self, target: Any) -> None:
        """Pass the limits and send."""
        self._joints()
        self.row["asked"][:] = target
        safe = self._filter(target, self._pos, self._vel)
        sent = self.gate.send(dict(zip(self._filter.names, safe.tolist(), strict=True)))
        self.row["sent"][:] = [sent.get(name, math.nan) for name in self._filter.names]
        self.row["limited"][:] = self._filter.bits()

    def _note(
        self, obs: Floats, noise: Floats | None, reward: float, done: bool, took: float
    ) -> None:
        row, tick = self.row, self.row["tick"]
        row["obs"][:], row["action"][:] = obs, self.policy.chosen
        if noise is not None:
            row["noise"][:] = noise
        tick[5], tick[6], tick[10] = reward, done, 1e3 * took
        self._seen, self._chosen = obs, row["action"].copy()

    def _write_down(self, reward: float) -> None:
        if self._adaptation is not None:
            self._adaptation.step(self._seen, self._chosen, reward)

    def _finish(self) -> None:
        """End a step: account for it, log it, and now and then show where things stand."""
        self.row["tick"][9] = 1e3 * self._pace.done()
        if self._log is not None:
            self._log.tick()
        if self.clock.now() - self._shown >= SHOW_S:
            self._shown = self.clock.now()
            self._show(self.status())

    def status(self) -> dict[str, Any]:
        """Say where things stand, for a panel."""
        pace = self._pace
        return {
            "state": self._machine.state.value,
            "reason": self.gate.reason,
            "trial": self._trial,
            "episode": self._episode,
            "step": self._step,
            "return": self._return,
            "returns": self.report.returns[-2:],
            "left_s": self._end - self.clock.now(),
            "pace": pace.report() | {"hz": 1 / self._period},
            "limited": self._filter.report(),
            "adapted": self.report.adapted[-3:],
            "adapting": self._adaptation is not None and bool(self._adaptation.busy),
            "dropped": self._log.dropped if self._log is not None else 0,
            "readings": {
                "repeated": self._readings.repeated,
                "disordered": self._readings.disordered,
            },
        }

    def _limp(self, reason: str) -> None:
        """Damp the robot for a while, and stop."""
        self.gate.noticed = True
        self.gate.damp(reason)
        if self._machine.state in (State.IDLE, State.READY, State.RUNNING):
            self._machine.to(State.DAMPING, self.gate.reason)
        self._pace.close()
        end = self.clock.now() + self.settings.damp_s
        while (now := self.clock.now()) < end:
            self.clock.sleep_until(now + self._period)
            self.gate.damp(reason)
        self._machine.to(State.STOPPED)
        if self._adaptation is not None:
            self._adaptation.stop()
        r = self.report
        r.reason, r.limited, r.pace, r.sent = (
            self.gate.reason,
            self._filter.report(),
            self._pace.report() | {"stolen_s": self._pace.stolen},
            self.gate.sent,
        )
        r.repeated, r.disordered = self._readings.repeated, self._readings.disordered
        self._show(self.status())
        if self._log is not None:
            self._log.event("report", **asdict(r))
            self._log.close()
            r.dropped = self._log.dropped

    def _turned(self, state: State, why: str) -> None:
        """Say that the state has changed."""
        line = f"{state.value}{': ' + why if why else ''}"
        if state in (State.DAMPING, State.STOPPED):
            self._tell(line)
        if self._log is not None:
            self._log.event("state", state=state.value, why=why)

    def _say(self, line: str, what: str, **facts: Any) -> None:
        self._tell(line)
        if self._log is not None:
            self._log.event(what, line=line, **facts)
