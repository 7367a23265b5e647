"""The simulated robot's body: one world of a family's physics, and the signals its sensors give.

This file has the physics and no clock or socket. Its neighbours:

- ``metarobot.sim`` holds the physics backends, which know neither robots nor tasks;
- ``metarobot.deploy.sim_robot_server`` is the process that runs this body in real time and speaks
  UDP;
- ``metarobot.bridge.robots.sim_client`` is the controller's client of that process.

Physics, latencies, noise, initial states and rewards are those of training. A legged robot
publishes what its joints, IMU and feet measure, as its family declares in ``Hardware.sensors``. Any
other robot publishes its observations by name and the reward, which the simulator computes because
it knows the task.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mujoco
import numpy as np
import torch

from metarobot.bridge.layouts.legged import OPERATOR_COMMAND
from metarobot.bridge.robot_interface import GYRO, QUAT
from metarobot.env.base import Env, StepResult
from metarobot.errors import MetarobotError
from metarobot.tasks.family import Family, Hardware
from metarobot.tasks.space import Task
from metarobot.types import Floats

DAMPING_FACTOR = 4.0
"""How many times more a damped robot's drives resist motion than when they hold a position, so that
the robot sinks instead of dropping."""


def damped_model(model: mujoco.MjModel) -> mujoco.MjModel:
    """Return a copy of a model whose drives only resist motion: no position gain and no force."""
    damped = copy.copy(model)
    # force = gain · control + bias_0 + bias_1 · q + bias_2 · q̇; only the last term is kept
    damped.actuator_gainprm[:, 0] = 0.0
    damped.actuator_biasprm[:, :2] = 0.0
    damped.actuator_biasprm[:, 2] *= DAMPING_FACTOR
    return damped


class SimulatedRobot:
    """One robot on one task at a time, which can be advanced by single physics steps.

    Args:
        family: Task family whose robot, physics and reward are used.
        tasks: Tasks to choose from; ``restart`` names one by its number.
        seed: Draws initial states and sensor noise, as an evaluation with this seed does.
        noise: Whether sensors are as noisy as in training.
    """

    def __init__(
        self, family: Family, tasks: Sequence[Task], *, seed: int = 0, noise: bool = True
    ) -> None:
        self.family = family
        self.tasks = tasks
        self.seed = seed
        self._noise = noise
        self.env = Env(family, tasks[:1], seed=seed, threads=1)

        self.signals: NamedSignals | LeggedSignals
        if family.deployment.hardware is None:
            self.signals = NamedSignals(self.env)
        else:
            self.signals = LeggedSignals(self.env, family.deployment.hardware())
        self.restart(0, 0)

    def restart(self, world: int, episode: int) -> None:
        """Put the robot where an episode begins, as ``Env`` does in the world of that number.

        World ``n`` has task ``n`` of ``tasks``, counted round; a later round has other initial
        states.

        Raises:
            MetarobotError: A negative number.
        """
        if min(world, episode) < 0:
            raise MetarobotError(
                f"worlds and episodes count from 0: there is no episode {episode} of world {world}"
            )
        self.world = world
        self.episode = episode
        self.task = self.tasks[world % len(self.tasks)]

        self.env.world_ids[0] = world
        self.env.set_tasks([self.task])
        self.env.reset(self.seed)
        self.obs = self.env.restart(episode)

        # the state of the drives, and the statistics of the episode so far
        self.damped = False
        self.over = False
        self.terminated = False
        self.steps = 0
        self.reward = 0.0
        self.returns = 0.0
        self.terms = dict.fromkeys(self.family.weights, 0.0)
        self._substep = 0
        self._broken = torch.zeros(1, dtype=torch.bool)

    def command(self, values: Floats) -> None:
        """Apply a command, ``(command,)``: joint targets in rad, or an action.

        A damped robot ignores it.
        """
        if not self.damped:
            action = self.signals.action(values)
            self.env.apply_action(torch.from_numpy(action)[None])

    def advance(self, substeps: int) -> None:
        """Simulate physics steps; compute observation and reward at each control step's end."""
        for _ in range(substeps):
            self._broken |= self.env.sim.step(1)
            self._substep += 1
            if self._substep == self.family.substeps:
                # a robot that runs on beyond the horizon repeats the episode's noise sequence
                self.env.elapsed.remainder_(self.family.horizon)
                self._update_statistics(self.env.finish_step(self._broken))
                self._substep = 0

    def damp(self) -> None:
        """Make the drives limp until the next ``restart``."""
        if not self.damped:
            self.env.sim.set_models([damped_model(self.env.model(self.task))])
            self.damped = True

    def reading(self) -> list[float]:
        """Return the current values of all signals, in the order of ``signals.reading``."""
        clean = self.family.observe(self.env.snapshot)
        noisy = self.obs if self._noise else clean
        return self.signals.values(self, clean[0].numpy(), noisy[0].numpy())

    def episode_summary(self) -> dict[str, Any]:
        """Return the true return of the episode so far, its reward terms, and whether it failed."""
        return {
            "world": self.world,
            "episode": self.episode,
            "steps": self.steps,
            "return": self.returns,
            "terms": self.terms,
            "terminated": self.terminated,
        }

    def _update_statistics(self, step: StepResult) -> None:
        self.obs = step.obs
        self.reward = float(step.reward)
        if bool(step.faulted):
            self.damp()

        # what happens after the episode's end does not count
        if self.over:
            return
        self.steps += 1
        self.returns += self.reward
        self.terms = {name: sum_ + float(step.terms[name]) for name, sum_ in self.terms.items()}
        self.terminated = bool(step.terminated)
        self.over = bool(step.terminated | step.truncated)


class NamedSignals:
    """Signals of a robot without declared hardware: observations by name, reward and failure."""

    def __init__(self, env: Env) -> None:
        self.reading = (*env.family.observations, "reward", "terminated", "damped")
        """Names of the values in a reading."""
        self.command = env.action_names
        """Names of the values in a command."""

    def action(self, values: Floats) -> Floats:
        """Return the action of a command: its own values."""
        return values.copy()

    def values(self, robot: SimulatedRobot, clean: Floats, noisy: Floats) -> list[float]:
        """Return a reading; ``noisy`` ``(obs,)`` is the observation of the last control step."""
        return [*noisy.tolist(), robot.reward, float(robot.terminated), float(robot.damped)]


class LeggedSignals:
    """Signals of a legged robot: its joints, IMU and feet, and its operator's command.

    Which observations carry which sensor's noise, and which MJCF sensors measure torques and
    contact forces, is declared in ``Hardware.sensors``. The trunk is the body on the model's free
    joint. A robot whose command is hidden in the observation publishes its reward instead.

    Raises:
        MetarobotError: The family declares hardware without ``sensors``.
    """

    def __init__(self, env: Env, hardware: Hardware) -> None:
        sensors = hardware.sensors
        if sensors is None:
            raise MetarobotError(
                f"{env.family.name} declares no Hardware.sensors: no legged robot can be simulated"
            )
        model = env.model(env.tasks[0])
        joints = [int(model.actuator(name).trnid[0]) for name in hardware.joints]

        # where the joints, the trunk and the sensors are in qpos, qvel and sensordata
        self._joint_qpos = model.jnt_qposadr[joints]
        self._joint_qvel = model.jnt_dofadr[joints]
        trunk_joint = int(np.flatnonzero(model.jnt_type == mujoco.mjtJoint.mjJNT_FREE)[0])
        trunk_qpos = int(model.jnt_qposadr[trunk_joint])
        trunk_qvel = int(model.jnt_dofadr[trunk_joint])
        # a free joint is a position and a quaternion, a linear and an angular velocity
        self._trunk_quat = slice(trunk_qpos + 3, trunk_qpos + 7)
        self._trunk_gyro = slice(trunk_qvel + 3, trunk_qvel + 6)
        self._torque_data = [int(model.sensor(name).adr[0]) for name in sensors.joint_torque]
        self._force_data = [int(model.sensor(name).adr[0]) for name in sensors.foot_force.values()]

        # where the sensors are in the observation
        observations = env.family.observations
        self._gravity_obs = [observations.index(name) for name in sensors.gravity]
        self._gyro_obs = [observations.index(name) for name in sensors.gyro]
        self._joint_position_obs = [observations.index(name) for name in sensors.joint_position]
        self._joint_velocity_obs = [observations.index(name) for name in sensors.joint_velocity]
        self._command_obs = [observations.index(name) for name in hardware.commands]

        self._pose = np.array(hardware.pose)
        self._scale = np.array(hardware.scale)
        self.command = tuple(f"{name}.pos" for name in hardware.joints)
        """Names of the values in a command."""
        self.reading = (
            *(f"{name}.pos" for name in hardware.joints),
            *(f"{name}.vel" for name in hardware.joints),
            *(f"{name}.tau" for name in hardware.joints),
            *(f"{leg}.force" for leg in sensors.foot_force),
            *QUAT,
            *GYRO,
            *(OPERATOR_COMMAND if hardware.commands else ("reward",)),
            "damped",
        )
        """Names of the values in a reading."""

    def action(self, values: Floats) -> Floats:
        """Return the action whose joint targets, rad, are the command's."""
        # target = pose + scale · action
        action: Floats = (values - self._pose) / self._scale
        return action

    def values(self, robot: SimulatedRobot, clean: Floats, noisy: Floats) -> list[float]:
        """Return a reading of the current state, with the noise of the last observation.

        ``clean`` and ``noisy`` ``(obs,)`` are the observation without and with noise.
        """
        noise = noisy - clean
        state = robot.env.state
        qpos = state.qpos[0].numpy()
        qvel = state.qvel[0].numpy()
        sensors = state.sensors[0].numpy()

        # an IMU measures attitude against gravity, which the simulator turns on slopes
        gravity = robot.env.model(robot.task).opt.gravity
        attitude = attitude_against_gravity(qpos[self._trunk_quat], gravity)
        attitude = disturb_attitude(attitude, noise[self._gravity_obs])

        command_or_reward = clean[self._command_obs].tolist() or [robot.reward]
        return [
            *(qpos[self._joint_qpos] + noise[self._joint_position_obs]),
            *(qvel[self._joint_qvel] + noise[self._joint_velocity_obs]),
            *sensors[self._torque_data],
            *sensors[self._force_data],
            *attitude,
            *(qvel[self._trunk_gyro] + noise[self._gyro_obs]),
            *command_or_reward,
            float(robot.damped),
        ]


def quaternion_product(a: Floats, b: Floats) -> Floats:
    """Return the Hamilton product of two quaternions ``(4,)``, w first."""
    # (w_a, v_a)(w_b, v_b) = (w_a w_b − v_a · v_b, w_a v_b + w_b v_a + v_a × v_b)
    w = a[0] * b[0] - a[1:] @ b[1:]
    v = a[0] * b[1:] + b[0] * a[1:] + np.cross(a[1:], b[1:])
    return np.array([w, *v])


def rotation_between(a: Floats, b: Floats) -> Floats:
    """Return the shortest rotation from the direction of ``a`` to that of ``b``.

    The rotation is a unit quaternion, w first; ``a`` and ``b`` ``(3,)`` must not be opposite.
    """
    a = a / np.linalg.norm(a)
    b = b / np.linalg.norm(b)
    # half-angle formula: q ∝ (1 + a · b, a × b)
    quaternion = np.array([1 + a @ b, *np.cross(a, b)])
    unit: Floats = quaternion / np.linalg.norm(quaternion)
    return unit


def attitude_against_gravity(quat: Floats, gravity: Floats) -> Floats:
    """Return a body's attitude in a world frame whose −z axis is the direction of ``gravity``.

    ``quat`` ``(4,)`` is the attitude in the simulator's frame, ``gravity`` ``(3,)`` in the same
    frame.
    """
    return quaternion_product(rotation_between(gravity, np.array([0.0, 0.0, -1.0])), quat)


def disturb_attitude(quat: Floats, noise: Floats) -> Floats:
    """Return an attitude whose gravity direction, in the body's frame, has ``noise`` added."""
    if not noise.any():
        return quat
    w, x, y, z = quat
    # the third row of the rotation matrix is the world's z axis in the body's frame
    up = np.array([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)])
    down = -up
    return quaternion_product(quat, rotation_between(down + noise, down))
