from collections.abc import Callable
from functools import cache

import mujoco
import numpy as np
import pytest
import torch
from grasping import (
    CLOSE,
    FORCES,
    FRAGILE,
    NAMES,
    PADS,
    SHAPES,
    STRENGTH,
    clever,
    each_family,
    need,
    small,
    strength,
    up,
    wild,
)
from torch import Tensor

from metarobot.env.autoreset import AutoresetEnv
from metarobot.env.base import Env, StepResult
from metarobot.envs import grasp
from metarobot.envs.robots import panda
from metarobot.envs.robots.arm_control import ArmState
from metarobot.tasks.family import Family, families
from metarobot.training.collect import ExpertAgent, collect


@each_family
def test_the_expert_succeeds(family: Family) -> None:
    tasks = family.space.sample("train", 60, 0)
    env = Env(family, tasks, threads=1)
    trials = collect(ExpertAgent(env), env, tasks, episodes=1, seed=0)
    success = trials.totals("success")
    assert set(success.unique().tolist()) <= {0.0, 1.0}
    assert success.mean() >= 0.95
    assert trials.faults() == 0


@cache
def held(name: str) -> tuple[Env, Tensor, list[StepResult], Tensor]:
    """Objects held still in the air by the expert.

    The worlds, where in the hand each object was after 100 and 225 steps, all steps, and which
    worlds were never terminated.
    """
    env = small(families.get(name), 16, 5, horizon=230)
    alive, steps, within = torch.ones(16, dtype=torch.bool), [], []
    for k in range(1, 226):
        steps.append(env.step(clever(env)))
        alive &= ~steps[-1].terminated
        if k in (100, 225):
            within.append(ArmState(env.state).object_in_hand)
    return env, torch.stack(within), steps, alive


@each_family
def test_a_held_object_does_not_creep(family: Family) -> None:
    env, within, _, alive = held(family.name)
    assert alive.float().mean() >= 0.9
    assert (up(env)[alive] > grasp.LIFT_HEIGHT).all()
    assert (within[1] - within[0])[alive].norm(dim=1).max() < 2e-3


@each_family
def test_success_comes_once_an_episode(family: Family) -> None:
    _, _, steps, alive = held(family.name)
    success = torch.stack([s.terms["success"] for s in steps])[:, alive]
    assert success.unique().tolist() == [0, 1]
    assert (success.sum(0) == 1).all()
    lifted = torch.stack([s.terms["hold"] for s in steps])[:, alive]
    first = success.argmax(0)
    assert (first >= grasp.HOLD_STEPS).all()
    for world, step in enumerate(first.tolist()):
        expected = torch.arange(1, grasp.HOLD_STEPS + 1) / grasp.HOLD_STEPS
        assert lifted[step - grasp.HOLD_STEPS + 1 : step + 1, world].tolist() == pytest.approx(
            expected.tolist()
        )


def pressed(env: Env, world: int) -> tuple[float, dict[str, float]]:
    """What the pads do to the object, by MuJoCo's contacts: the force upwards, and by pad the force
    into it, N."""
    model, data = env.sim.snapshot(world)
    upwards, into = 0.0, {"left_pad": 0.0, "right_pad": 0.0}
    for i, contact in enumerate(data.contact):
        names = [model.geom(int(g)).name for g in contact.geom]
        pad = next(n for n in names if n != "object")
        assert set(names) <= {"object", *into}, "it hangs in the air"
        force = np.zeros(6)
        mujoco.mj_contactForce(model, data, i, force)
        world_frame = contact.frame.reshape(3, 3).T @ force[:3]
        upwards += world_frame[2] * (1 if names[1] == "object" else -1)
        into[pad] += force[0]
    return upwards, into


@each_family
def test_friction_carries_the_weight(family: Family) -> None:
    env, _, _, alive = held(family.name)
    for world in alive.nonzero()[:, 0].tolist():
        upwards, into = pressed(env, world)
        assert upwards == pytest.approx(env.tasks[world]["mass"] * 9.81, rel=0.03)
        assert min(into.values()) >= float(need(env)[world]) / 1.02
        assert ArmState(env.state).pad_forces[world].tolist() == pytest.approx(
            list(into.values()), rel=0.02
        )
        assert list(into.values()) == pytest.approx(
            [float(env.state.statistics[world, grasp.STAT_GRIP_FORCE])] * 2, rel=0.05
        )


def held_with(
    family: Family, multiple: float | Tensor, worlds: int = 24
) -> tuple[Env, dict[str, Tensor], Tensor, Tensor]:
    """The expert's episodes, but with another grip: a multiple of what just holds the object.

    The worlds, each term's sum over the first episode, the highest lift, m, and whether it ended
    early.
    """
    tasks = [
        t for t in family.space.sample("train", 3 * worlds, 5) if t["mass"] / t["friction"] > 0.2
    ][:worlds]
    env = Env(family, tasks, threads=1)
    sums, top = (
        dict.fromkeys(family.weights, torch.zeros(len(tasks)).double()),
        torch.zeros(len(tasks)).double(),
    )
    alive, early = (
        torch.ones(len(tasks), dtype=torch.bool),
        torch.zeros(len(tasks), dtype=torch.bool),
    )
    force = strength((need(env) * multiple).clamp(*FORCES))
    for _ in range(family.horizon):
        action = clever(env)
        action[:, STRENGTH] = force
        step = env.step(action, alive)
        sums = {k: v + step.terms[k] * alive for k, v in sums.items()}
        early |= step.terminated & alive
        alive &= ~(step.terminated | step.truncated)
        top = torch.where(alive, torch.maximum(top, up(env)), top)
    return env, sums, top, early


@each_family
@pytest.mark.parametrize("multiple", [0.6, 0.95])
def test_a_grip_too_weak_for_the_friction_slips(family: Family, multiple: float) -> None:
    env, sums, top, _ = held_with(family, multiple, 12)
    assert (need(env) * multiple > FORCES[0]).all()
    assert (sums["success"] == 0).all()
    assert (sums["hold"] == 0).all()
    assert top.max() < (0.02 if multiple < 0.9 else grasp.LIFT_HEIGHT / 2)


@each_family
def test_a_grip_half_again_as_strong_as_needed_holds(family: Family) -> None:
    _, sums, top, _ = held_with(family, 1.5, 12)
    assert (sums["success"] == 1).all()
    assert (top > grasp.LIFT_HEIGHT).all()


def test_a_grip_over_the_limit_crushes_the_object() -> None:
    room = torch.tensor([t["room"] for t in held_with(FRAGILE, 1.5, 12)[0].tasks]).double()
    env, sums, _, early = held_with(FRAGILE, 1.2 * room, 12)
    assert (need(env) * 1.2 * room < FORCES[1]).all()
    assert early.all()
    assert sums["crush"].tolist() == [-1] * env.worlds
    assert sums["success"].tolist() == [0] * env.worlds


def test_only_fragile_objects_break() -> None:
    _, sums, _, early = held_with(SHAPES, 8.0, 12)
    assert not early.any()
    assert (sums["crush"] == 0).all()
    assert sums["success"].mean() > 0.9


@each_family
def test_a_dropped_object_ends_the_episode_cleanly(family: Family) -> None:
    env = small(family, 8, 1)
    stepped = AutoresetEnv(env)
    expected = [Env(family, env.tasks, threads=1).restart(k) for k in range(2)]
    assert torch.equal(env.reset(0), expected[0])
    over, opened = torch.zeros(8, dtype=torch.bool), torch.zeros(8, dtype=torch.bool)
    for _ in range(family.horizon):
        action = clever(env)
        opened |= up(env) > 0.08
        action[opened, CLOSE], action[opened, :4] = -1.0, 0.0
        step = stepped.step(action, ~over)
        ended = step.terminated & ~over
        assert not step.faulted.any()
        assert not (ended & ~opened).any()
        assert step.terms["drop"][~over].tolist() == (-ended[~over].double()).tolist()
        assert (step.terms["success"] == 0).all()
        assert torch.equal(step.obs[ended], expected[1][ended])
        assert torch.equal(
            env.state.statistics[ended], family.interaction.statistics.begin(env.state)[ended]
        )
        assert (env.elapsed[ended] == 0).all()
        over |= ended
        if over.all():
            break
    assert over.all()


@each_family
def test_an_object_off_the_table_and_a_jammed_hand_end_the_episode_cleanly(family: Family) -> None:
    env = small(family, 4, 1)
    qpos, qvel = env.snapshot.qpos.clone(), env.snapshot.qvel.clone()
    qpos[1, -7] += 0.35
    env.set_state(qpos, qvel)
    step = AutoresetEnv(env).step(torch.zeros(4, env.act_dim))
    assert step.terminated.tolist() == [False, True, False, False]
    assert not step.faulted.any()
    assert all(x.isfinite().all() for x in (step.obs, step.reward, step.final_obs))
    assert env.elapsed.tolist() == [1, 0, 1, 1]
    pads = env.snapshot.sensors.clone()
    pads[2, PADS] = torch.tensor([10.0, 4 * panda.MAX_GRIP_FORCE]).double()
    jammed = env.snapshot._replace(sensors=pads)
    jammed = jammed._replace(derived=ArmState(jammed._replace(derived=None)))
    assert family.interaction.terminate(jammed).tolist() == [False, False, True, False]


@pytest.mark.parametrize("name", NAMES)
def test_the_observation_tells_nothing_that_is_hidden(name: str) -> None:
    family = families.get(name)
    task = family.space.sample("train", 1, 0)[0].as_dict()
    assert len(set(family.observations)) == len(family.interaction.noise) == 19
    visible = ("kind", "shape_seed", "width", "length", "height")
    hidden = {
        p.name: p.train.low if task[p.name] > p.train.low else p.train.high
        for p in family.space.params
    }
    other = task | {k: x for k, x in hidden.items() if k not in visible}
    assert {k for k in task if task[k] != other[k]} >= {"mass", "friction"}
    first = [Env(family, [t], seed=3, threads=1).reset(3) for t in (task, other)]
    assert first[0].shape == (1, 19)
    assert torch.equal(*first)
    assert not torch.equal(first[0], Env(family, [task], threads=1).reset(4))


def test_the_observation_is_what_its_names_say() -> None:
    env = small(SHAPES, 4, noise=(), horizon=1000, terminate=None)
    for _ in range(45):
        env.step(clever(env))
    for _ in range(12):
        step = env.step(torch.tensor([[0.2, -0.1, 0.15, 0.3, 0, 0]] * 4))
    for world in range(4):
        _, data = env.sim.snapshot(world)
        observed = dict(zip(SHAPES.observations, step.obs[world].tolist(), strict=True))
        tip, thing = data.site("tip"), data.body("object")
        turned = thing.xmat.reshape(3, 3)
        expected = {f"hand_{a}_m": x for a, x in zip("xyz", tip.xpos - [0.5, 0, 0.1], strict=True)}
        expected |= {f"object_{a}_m": x for a, x in zip("xyz", thing.xpos - tip.xpos, strict=True)}
        expected |= {f"object_x_axis_{a}": x for a, x in zip("xyz", turned[:, 0], strict=True)}
        expected |= {f"object_z_axis_{a}": x for a, x in zip("xyz", turned[:, 2], strict=True)}
        expected |= {"opening_m": data.qpos[7:9].sum()}
        expected |= {
            "closing": env.state.statistics[world, grasp.STAT_GRIP_FORCE] > 0,
            "grasped": env.state.statistics[world, grasp.STAT_GRIPPED],
        }
        assert {k: observed[k] for k in expected} == pytest.approx(
            {k: float(v) for k, v in expected.items()}, abs=2e-3
        )
        jacobian = np.zeros((3, len(data.qvel)))
        mujoco.mj_jacSite(*env.sim.snapshot(world), jacobian, None, tip.id)
        assert [observed[f"hand_{a}_m/s"] for a in "xyz"] == pytest.approx(
            jacobian @ data.qvel, abs=0.05
        )
        assert observed["opening_m/s"] == pytest.approx(data.qvel[7:9].sum(), abs=0.05)


REWARDED = ("reach", "grip", "lift", "hold", "success")


def rolled(name: str, policy: Callable[[Env], Tensor]) -> list[StepResult]:
    env = small(families.get(name), 8, 2)
    stepped = AutoresetEnv(env)
    return [stepped.step(policy(env)) for _ in range(80)]


@pytest.mark.parametrize("name", NAMES)
def test_every_term_of_the_reward_is_bounded(name: str) -> None:
    rng = torch.Generator().manual_seed(0)
    policies = (clever, lambda env: wild(env, rng), lambda env: 3 * wild(env, rng).sign())
    steps = [s for policy in policies for s in rolled(name, policy)]
    for step in steps:
        assert step.terms.keys() == families.get(name).weights.keys()
        for term, value in step.terms.items():
            low, high = (0, 1) if term in REWARDED else (-1, 0)
            assert ((value >= low) & (value <= high)).all(), term
    for term in REWARDED:
        assert torch.stack([s.terms[term] for s in steps]).max() > 0.5, f"{term} can be earned"


@pytest.mark.parametrize("name", NAMES)
def test_the_statistics_start_anew_with_every_episode(name: str) -> None:
    family = families.get(name)
    env, episodes = small(family, 6, horizon=45), torch.zeros(6)
    stepped = AutoresetEnv(env)
    first = family.interaction.statistics.begin(env.state).clone()
    assert torch.equal(env.state.statistics, first)
    for _ in range(3 * 45):
        step = stepped.step(clever(env))
        ended = step.terminated | step.truncated
        fresh = family.interaction.statistics.begin(env.state)
        assert torch.equal(env.state.statistics[ended], fresh[ended])
        assert (env.state.statistics[~ended] != fresh[~ended]).any(1).all()
        assert (fresh[ended] != first[ended]).any(1).all(), "the hand starts elsewhere"
        episodes += ended
    assert episodes.min() >= 3
    env.reset(0)
    assert torch.equal(env.state.statistics, first)


BROKEN = {
    "all positions": lambda env, action: env.state.qpos[1].fill_(torch.nan),
    "one joint": lambda env, action: env.state.qpos[1, 3].fill_(torch.nan),
    "the object": lambda env, action: env.state.qpos[1, -7:].fill_(torch.nan),
    "speed": lambda env, action: env.state.qvel[1].fill_(1e30),
    "action": lambda env, action: action[1].fill_(torch.nan),
}


@pytest.mark.parametrize("harm", BROKEN)
def test_broken_physics_ends_one_worlds_episode_and_is_felt_nowhere_else(harm: str) -> None:
    sound, harmed = (small(SHAPES, 3, horizon=40) for _ in range(2))
    rng = torch.Generator().manual_seed(0)
    for k in range(60):
        action = wild(sound, rng)
        a = AutoresetEnv(sound).step(action)
        if k == 20:
            BROKEN[harm](harmed, action)
        b = AutoresetEnv(harmed).step(action)
        assert b.faulted.tolist() == [False, k == 20, False]
        assert b.terminated[1] >= b.faulted[1]
        for x, y in zip(a._replace(terms=a.reward), b._replace(terms=b.reward), strict=True):
            assert torch.equal(x[[0, 2]], y[[0, 2]])
            assert y.isfinite().all()
        assert all(v.isfinite().all() for v in b.terms.values())
        assert torch.equal(sound.state.statistics[[0, 2]], harmed.state.statistics[[0, 2]])
    assert harmed.state.statistics.isfinite().all()
