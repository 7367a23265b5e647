"""The simulated robot itself: an ``Env`` of one world, and what its sensors say.

Physics, latencies, noise, starts and true rewards are those of training. Robots with joints and an
IMU give what theirs measure; others are told their observations and their reward by the simulator,
which knows the task.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mujoco
import numpy as np
import torch

from metarobot.bridge.robot_interface import GYRO, QUAT
from metarobot.env.base import Env, StepResult
from metarobot.errors import MetarobotError
from metarobot.tasks.family import Family, Hardware
from metarobot.tasks.space import Task
from metarobot.types import Floats

SOFTER = 4.0
"""How much more a limp robot's drives damp than when they hold a position: it sinks down, and does
not drop."""


def damped_model(model: mujoco.MjModel) -> mujoco.MjModel:
    """Return the model with its drives in damping: no gain on position, no force, only resistance
    to motion.
    """
    soft = copy.copy(model)
    soft.actuator_gainprm[:, 0] = 0.0
    soft.actuator_biasprm[:, :2] = 0.0
    soft.actuator_biasprm[:, 2] *= SOFTER
    return soft


class SimulatedRobot:
    """One robot on one task at a time, stepped by as few physics steps as wanted."""

    def __init__(
        self, family: Family, tasks: Sequence[Task], *, seed: int = 0, noise: bool = True
    ) -> None:
        self.family, self.tasks, self.seed, self._noise = family, tasks, seed, noise
        self.env = Env(family, tasks[:1], seed=seed, threads=1)
        hardware = family.deployment.hardware() if family.deployment.hardware is not None else None
        self.signals: Signals = (
            NamedSignals(self.env) if hardware is None else LeggedSignals(self.env, hardware)
        )
        self.restart(0, 0)

    def restart(self, world: int, episode: int) -> None:
        """Put the robot where an episode begins, as ``Env`` would in its world of that number.

        Task by task; after the last comes the first again, from other starts.
        """
        if min(world, episode) < 0:
            raise MetarobotError(
                f"worlds and episodes count from 0: there is no episode {episode} of world {world}"
            )
        self.world, self.episode, self.task = world, episode, self.tasks[world % len(self.tasks)]
        self.env.world_ids[0] = world
        self.env.set_tasks([self.task])
        self.env.reset(self.seed)
        self.obs = self.env.restart(episode)
        self.damped = self.over = False
        self.steps, self.reward, self.returns, self.terms = (
            0,
            0.0,
            0.0,
            dict.fromkeys(self.family.weights, 0.0),
        )
        self.terminated, self._substep, self._broken = False, 0, torch.zeros(1, dtype=torch.bool)

    def command(self, values: Floats) -> None:
        """Take a command: targets of joints, or an action."""
        if not self.damped:
            self.env.apply_action(torch.from_numpy(self.signals.action(values))[None])

    def advance(self, substeps: int) -> None:
        """Live through so many physics steps; at the end of a control step, see what it gave."""
        for _ in range(substeps):
            self._broken |= self.env.sim.step(1)
            self._substep += 1
            if self._substep == self.family.substeps:
                self.env.elapsed.remainder_(self.family.horizon)
                self._account(self.env.finish_step(self._broken))
                self._substep = 0

    def damp(self) -> None:
        """Turn the drives limp until the next restart."""
        if not self.damped:
            self.env.sim.set_models([damped_model(self.env.model(self.task))])
            self.damped = True

    def reading(self) -> list[float]:
        """Return what the robot says now, in the order of the signals' names."""
        clean = self.family.observe(self.env.snapshot)
        return self.signals.values(
            self, clean[0].numpy(), (self.obs if self._noise else clean)[0].numpy()
        )

    def told(self) -> dict[str, Any]:
        """Return what the episode really earned so far, and whether it failed."""
        return {
            "world": self.world,
            "episode": self.episode,
            "steps": self.steps,
            "return": self.returns,
            "terms": self.terms,
            "terminated": self.terminated,
        }

    def _account(self, step: StepResult) -> None:
        self.obs, self.reward = step.obs, float(step.reward)
        if bool(step.faulted):
            self.damp()
        if not self.over:
            self.steps, self.returns = self.steps + 1, self.returns + self.reward
            self.terms = {k: v + float(step.terms[k]) for k, v in self.terms.items()}
            self.terminated = bool(step.terminated)
            self.over = bool(step.terminated | step.truncated)


class NamedSignals:
    """Robots without hardware of their own: observations by name, the reward, and whether the
    episode has failed.
    """

    def __init__(self, env: Env) -> None:
        self.reading = (*env.family.observations, "reward", "terminated", "damped")
        self.command = env.action_names

    def action(self, values: Floats) -> Floats:
        """Return the action that a command is."""
        return values.copy()

    def values(self, world: SimulatedRobot, clean: Floats, seen: Floats) -> list[float]:
        """Return a reading: the observation as it was ``seen`` when the control step began."""
        return [*seen.tolist(), world.reward, float(world.terminated), float(world.damped)]


class LeggedSignals:
    """A robot on legs: what its joints, IMU and feet measure, noise as in its observations; its
    operator's command.
    """

    def __init__(self, env: Env, hardware: Hardware) -> None:
        model = env.model(env.tasks[0])
        joints = [int(model.actuator(name).trnid[0]) for name in hardware.joints]
        self._pos, self._vel = model.jnt_qposadr[joints], model.jnt_dofadr[joints]
        self._tau = [int(model.sensor(f"{name}_torque").adr[0]) for name in hardware.joints]
        touch = [
            model.sensor(i) for i in range(model.nsensor) if model.sensor(i).name.endswith("_touch")
        ]
        self._force = [int(s.adr[0]) for s in touch]
        self._pose, self._scale = np.array(hardware.pose), np.array(hardware.scale)
        self._told = () if hardware.commands else ("reward",)
        self.command = tuple(f"{name}.pos" for name in hardware.joints)
        self.reading = (
            *(f"{name}.{kind}" for kind in ("pos", "vel", "tau") for name in hardware.joints),
            *(f"{s.name.removesuffix('_touch')}.force" for s in touch),
            *QUAT,
            *GYRO,
            *(self._told or ("command.x", "command.y", "command.turn")),
            "damped",
        )

    def action(self, values: Floats) -> Floats:
        """Return the action that asks for these targets of the joints, rad."""
        action: Floats = (values - self._pose) / self._scale
        return action

    def values(self, world: SimulatedRobot, clean: Floats, seen: Floats) -> list[float]:
        """Return a reading of this moment, with the noise of the last observation."""
        noise = seen - clean
        state = world.env.state
        qpos, qvel, sensors = (x[0].numpy() for x in (state.qpos, state.qvel, state.sensors))
        down = world.env.model(world.task).opt.gravity
        quat = tilted(upright(qpos[3:7], down), noise[:3])
        told = [world.reward] if self._told else clean[-3:].tolist()
        return [
            *(qpos[self._pos] + noise[6:18]),
            *(qvel[self._vel] + noise[18:30]),
            *sensors[self._tau],
            *sensors[self._force],
            *quat,
            *(qvel[3:6] + noise[3:6]),
            *told,
            float(world.damped),
        ]


Signals = NamedSignals | LeggedSignals


def product(a: Floats, b: Floats) -> Floats:
    """Multiply quaternions, w first."""
    w, v = a[0] * b[0] - a[1:] @ b[1:], a[0] * b[1:] + b[0] * a[1:] + np.cross(a[1:], b[1:])
    return np.array([w, *v])


def between(a: Floats, b: Floats) -> Floats:
    """Return the shortest rotation that takes the direction of ``a`` to that of ``b``, which are
    not opposite.
    """
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    quat = np.array([1 + a @ b, *np.cross(a, b)])
    unit: Floats = quat / np.linalg.norm(quat)
    return unit


def upright(quat: Floats, gravity: Floats) -> Floats:
    """Return a rotation as an IMU sees it, for which down is where gravity points: the simulator
    turns it on slopes.
    """
    return product(between(gravity, np.array([0.0, 0.0, -1.0])), quat)


def tilted(quat: Floats, noise: Floats) -> Floats:
    """Return a rotation whose gravity, in the trunk's frame, is disturbed: what an IMU's error can
    be.
    """
    if not noise.any():
        return quat
    w, x, y, z = quat
    down = -np.array([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)])
    return product(quat, between(down + noise, down))
