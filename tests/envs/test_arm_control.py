"""How the hand is commanded, and where it gets to."""

from dataclasses import replace
from functools import cache

import mujoco
import numpy as np
import pytest
import torch
from grasping import BOX, FORCES, LOOSE, SHAPES, clever, need, small, strength, tilt, up, wild
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metarobot.env.base import Env
from metarobot.envs import grasp
from metarobot.envs.robots import panda
from metarobot.envs.robots.arm_control import ArmState
from metarobot.types import Floats


def grasped() -> Env:
    """A box held in the air, the hand at rest."""
    env = Env(replace(LOOSE, horizon=1000), [BOX], threads=1)
    for _ in range(70):
        env.step(clever(env))
    assert float(up(env)) > grasp.LIFT_HEIGHT
    return env


def test_a_force_once_asked_for_stays_until_the_hand_opens() -> None:
    env = grasped()
    asked, felt = (
        float(env.state.statistics[0, grasp.STAT_GRIP_FORCE]),
        ArmState(env.state).pad_forces.clone(),
    )
    assert asked == pytest.approx(2 * float(need(env)), rel=1e-5)
    for k in range(30):
        # closing again, and neither closing nor opening
        still = [0, 0, 0, 0, (1.0, 0.0, -0.45, 0.6)[k % 4], (-1.0, 1.0, 0.3)[k % 3]]
        env.step(torch.tensor([still]))
        assert float(env.state.statistics[0, grasp.STAT_GRIP_FORCE]) == asked
        assert float(env.sim.bind("ctrl")[0, 7]) == asked
    assert ArmState(env.state).pad_forces == pytest.approx(felt, rel=0.05)


def test_a_hand_that_opened_closes_with_the_force_asked_for_anew() -> None:
    env = Env(LOOSE, [BOX], threads=1)
    for force in (5.0, 0.5, 60.0, 12.3):
        for close in (0.0, 0.5, -0.5):
            env.step(torch.tensor([[0, 0, 0, 0, close, float(strength(torch.tensor(force)))]]))
            assert env.state.statistics[0, grasp.STAT_GRIP_FORCE] == 0
        env.step(torch.tensor([[0, 0, 0, 0, 0.6, float(strength(torch.tensor(force)))]]))
        assert float(env.state.statistics[0, grasp.STAT_GRIP_FORCE]) == pytest.approx(
            force, rel=1e-5
        )
        env.step(torch.tensor([[0, 0, 0, 0, -0.6, 1.0]]))
        assert env.state.statistics[0, grasp.STAT_GRIP_FORCE] == 0
        assert env.state.statistics[0, grasp.STAT_GRIPPED] == 0


def test_the_hand_closes_gently_until_it_meets_something_and_presses_then() -> None:
    env, forces = Env(SHAPES, [BOX], threads=1), set()
    for _ in range(60):
        met, force = (
            bool(env.state.statistics[0, grasp.STAT_GRIPPED]),
            float(env.state.statistics[0, grasp.STAT_GRIP_FORCE]),
        )
        env.step(clever(env))
        commanded = float(env.sim.bind("ctrl")[0, 7])
        forces.add(round(commanded, 9))
        if force == 0:
            assert commanded < 0
        elif met:
            assert commanded == force
        else:
            assert 0 < commanded < 1
    assert len(forces) == 3


def anywhere(rng: np.random.Generator, model: mujoco.MjModel) -> tuple[Floats, Floats]:
    """Any pose of the arm, singular ones too, moving at any speed it can have."""
    qpos, qvel = SHAPES.start(rng, model)
    qpos[:7] = (
        rng.uniform(panda.JOINT_LOW, panda.JOINT_HIGH)
        if rng.random() < 0.8
        else rng.choice([panda.JOINT_LOW, panda.JOINT_HIGH])
    )
    qvel[:7] = rng.uniform(-panda.SPEED_LIMITS, panda.SPEED_LIMITS)
    return qpos, qvel


@cache
def flung() -> Env:
    return small(SHAPES, 4, terminate=None, start=anywhere)


@given(st.integers(0, 2**32), st.floats(0, 3), st.integers(1, 10))
@settings(max_examples=20, deadline=None)
def test_targets_stay_within_the_limits_of_joints_and_grip(
    seed: int, magnitude: float, repeat: int
) -> None:
    env = flung()
    env.reset(seed)
    rng = torch.Generator().manual_seed(seed)
    low, high = torch.from_numpy(panda.JOINT_LOW), torch.from_numpy(panda.JOINT_HIGH)
    for k in range(12):
        if k % repeat == 0:
            action = magnitude * torch.randn(4, 6, generator=rng)
        direct = SHAPES.interaction.controller.targets(
            env.state, action.double().clamp(-1, 1), env.sim.bind("ctrl")
        )
        step = env.step(action)
        commanded = env.sim.bind("ctrl")
        if not (step.terminated | step.truncated).any():
            assert torch.equal(commanded, direct)
        for targets in (commanded, direct):
            assert targets.isfinite().all()
            assert ((targets[:, :7] >= low) & (targets[:, :7] <= high)).all()
            assert (targets[:, 7].abs() <= 70).all()
        assert (env.state.statistics[:, grasp.STAT_GRIP_FORCE] <= FORCES[1] + 1e-9).all()


def cleared(rng: np.random.Generator, model: mujoco.MjModel) -> tuple[Floats, Floats]:
    """As usual, but with the object out of the way."""
    qpos, qvel = SHAPES.start(rng, model)
    qpos[-7:-5] = [0.1, 0.6]
    return qpos, qvel


FREE = replace(LOOSE, start=cleared)
MOVES = [(axis, sign) for axis in range(3) for sign in (1, -1)]


def moved(speed: float, steps: int) -> Tensor:
    """How far each hand moved in each step, m, ``(move, step, 3)``: one hand along each of
    ``MOVES``."""
    env, action = Env(FREE, [BOX] * 6, threads=1), torch.zeros(6, 6)
    tips = [ArmState(env.state).tip_position.clone()]
    for world, (axis, sign) in enumerate(MOVES):
        action[world, axis] = sign * speed
    for _ in range(steps):
        env.step(action)
        tips.append(ArmState(env.state).tip_position.clone())
    return torch.stack(tips, 1).diff(dim=1)


@pytest.mark.parametrize("speed", [0.25, 0.5])
def test_an_action_moves_the_hand_by_its_reach_a_step(speed: float) -> None:
    for along, (axis, sign) in zip(moved(speed, 10)[:, 4:], MOVES, strict=True):
        expected = torch.zeros(6, 3).double()
        expected[:, axis] = sign * speed * 0.02
        assert (along - expected).abs().max() < 0.2 * speed * 0.02, (axis, sign)


def test_a_full_action_moves_the_hand_straight_and_fast() -> None:
    for along, (axis, sign) in zip(moved(1.0, 7), MOVES, strict=True):
        ahead = sign * along[:, axis]
        assert ahead[3:].min() > 0.65 * 0.02, (axis, sign)
        assert ahead.max() < 1.05 * 0.02, (axis, sign)
        aside = along.sum(0)[[i for i in range(3) if i != axis]]
        assert aside.norm() < 0.03 * ahead.sum(), (axis, sign)


@pytest.mark.parametrize("turn", [0.5, -0.25])
def test_an_action_turns_the_hand(turn: float) -> None:
    env, angles = Env(FREE, [BOX], threads=1), []
    for _ in range(10):
        env.step(torch.tensor([[0, 0, 0, turn, 0, 0]]))
        x = ArmState(env.state).hand_axes[0, 0]
        angles.append(torch.atan2(x[1], x[0]))
    assert torch.stack(angles).diff()[4:].tolist() == pytest.approx([0.12 * turn] * 5, rel=0.2)


def test_a_hand_without_orders_stays_where_it_is() -> None:
    env = small(LOOSE, 8)
    before = ArmState(env.state).tip_position.clone()
    for _ in range(50):
        env.step(torch.zeros(8, 6))
    assert (ArmState(env.state).tip_position - before).norm(dim=1).max() < 2e-3
    assert tilt(env).max() < 0.1


@pytest.mark.parametrize(("extreme", "repeat"), [(False, 1), (True, 1), (True, 6)])
def test_the_hand_keeps_pointing_down(extreme: bool, repeat: int) -> None:
    env, rng = small(FREE, 16), torch.Generator().manual_seed(0)
    assert tilt(env).max() < 5, "as it is put there"
    for k in range(60):
        if k % repeat == 0:
            action = wild(env, rng).sign() if extreme else wild(env, rng)
        env.step(action)
        assert k < 5 or tilt(env).max() < 2, k


@pytest.mark.parametrize("speed", [0.4, 1.0])
def test_the_hand_reaches_every_corner_of_its_part_of_the_table(speed: float) -> None:
    env = Env(FREE, [BOX] * 8, threads=1)
    corners = torch.tensor(
        [[x, y, z] for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)]
    )
    for _ in range(80):
        env.step(torch.cat([speed * corners, torch.zeros(8, 3)], 1))
        assert (ArmState(env.state).pad_forces == 0).all(), "the table is not touched"
    tip, aim = ArmState(env.state).tip_position, env.state.statistics[:, grasp.STAT_TARGET_POSITION]
    assert (tip - aim).abs().max() < 2e-3
    for axis, (low, high) in enumerate(((0.35, 0.65), (-0.2, 0.2), (0.02, 0.25))):
        assert (tip[corners[:, axis] < 0, axis] < low + 1e-3).all()
        assert (tip[corners[:, axis] > 0, axis] > high - 1e-3).all()
