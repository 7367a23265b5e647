from collections.abc import Sequence
from dataclasses import replace

import mujoco
import numpy as np
import pytest
import torch

from metarobot.env.autoreset import AutoresetEnv
from metarobot.env.base import Env, StepResult
from metarobot.tasks.distributions import Uniform
from metarobot.tasks.family import Family, families
from metarobot.tasks.space import Param, TaskSpace

FAMILIES = families.names()


def small(
    name: str,
    worlds: int = 4,
    seed: int = 0,
    threads: int = 1,
    horizon: int | None = None,
    **changes,
) -> Env:
    """A few worlds of a family, each on a task of its own."""
    family = families.get(name)
    family = family.replace(horizon=horizon or family.horizon, **changes)
    return Env(family, family.space.sample("train", worlds, 0), seed=seed, threads=threads)


def actions(env: Env, steps: int, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(steps, env.worlds, env.act_dim, generator=rng) - 1


def roll(env: Env, steps: int, seed: int = 0) -> list[StepResult]:
    """Steps under random actions; a world whose episode ends starts the next one."""
    stepped = AutoresetEnv(env)
    return [stepped.step(a) for a in actions(env, steps, seed)]


def same(a: StepResult, b: StepResult, worlds: Sequence[int] | slice = slice(None)) -> bool:
    """Whether two steps are equal bit for bit in those worlds."""
    assert a.terms.keys() == b.terms.keys()
    pairs = [*zip(a._replace(terms=a.reward), b._replace(terms=b.reward), strict=True)]
    pairs += [(a.terms[k], b.terms[k]) for k in a.terms]
    return all(torch.equal(x[worlds], y[worlds]) for x, y in pairs)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_has_the_names_and_shapes_the_family_declares(name: str) -> None:
    env = small(name)
    family, n = env.family, env.worlds
    assert family.name == name
    assert family.doc
    assert len(set(family.observations)) == len(family.observations)
    step = env.step(torch.zeros(n, env.act_dim))
    for obs in (env.reset(0), step.obs, step.final_obs):
        assert obs.shape == (n, len(family.observations))
        assert obs.dtype == torch.float32
        assert obs.isfinite().all()
    assert step.reward.shape == (n,)
    assert step.reward.dtype == torch.float32
    assert step.terms.keys() == family.weights.keys()
    assert all(v.shape == (n,) for v in step.terms.values())
    assert all(
        x.shape == (n,) and x.dtype == torch.bool
        for x in (step.terminated, step.truncated, step.faulted)
    )
    assert env.control_hz == pytest.approx(
        1 / (env.sim.snapshot(0)[0].opt.timestep * family.substeps)
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_no_observation_element_is_constant(name: str) -> None:
    env = small(name)
    # commands hold for an episode, some always; and who moves at random seldom grasps
    felt = [
        not n.startswith("command") and n not in ("closing", "grasped")
        for n in env.family.observations
    ]
    obs = torch.stack([s.obs for s in roll(env, 30)])[..., felt]
    assert (obs.std((0, 1)) > 1e-3).all()
    assert (obs.std(0) > 0).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_seed_gives_the_same_trajectory(name: str) -> None:
    a, b, c = (roll(small(name, seed=seed, horizon=8), 20) for seed in (3, 3, 4))
    assert all(same(x, y) for x, y in zip(a, b, strict=True))
    assert not any(same(x, y) for x, y in zip(a, c, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_reset_with_the_same_seed_begins_again(name: str) -> None:
    env = small(name, seed=3, horizon=8)
    first = [env.reset(3), *(s.obs for s in roll(env, 12))]
    again = [env.reset(3), *(s.obs for s in roll(env, 12))]
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_start_differs_from_world_to_world_and_from_episode_to_episode(name: str) -> None:
    env = small(name)
    unmoved = ("action", "opening_m", "opening_m/s", "closing", "grasped")
    given = [n.startswith("command") or n.endswith(unmoved) for n in env.family.observations]
    starts = torch.cat([env.reset() for _ in range(3)] + [env.reset(1)])
    assert len(starts.unique(dim=0)) == len(starts)
    assert (starts.std(0)[~torch.tensor(given)] > 0).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_observations_share_no_memory(name: str) -> None:
    env = small(name, horizon=5)
    rows = actions(env, 6)
    obs, live = (
        env.reset(),
        {env.sim.bind(f).untyped_storage().data_ptr() for f in ("qpos", "qvel", "ctrl")},
    )
    given = rows.clone()
    for row in rows:
        kept = obs.clone()
        step = env.step(row)
        assert torch.equal(obs, kept)
        for x in (step.obs, step.final_obs, *step.terms.values()):
            assert x.untyped_storage().data_ptr() not in live | {obs.untyped_storage().data_ptr()}
        obs = step.obs
    assert torch.equal(rows, given)


RARE = {"limits", "grip", "lift", "hold", "success", "crush", "drop", "effort", "carry", "wrong"}
"""Terms that no random action meets; tests of their family do."""


@pytest.mark.parametrize("name", FAMILIES)
def test_the_weighted_terms_sum_to_the_reward(name: str) -> None:
    env, met = small(name), set()
    for step in roll(env, 30):
        total = sum(w * step.terms[k] for k, w in env.family.weights.items())
        assert torch.allclose(step.reward.double(), total.double(), atol=1e-6)
        met |= {k for k, v in step.terms.items() if (v != 0).any()}
    assert met >= env.family.weights.keys() - RARE


@pytest.mark.parametrize("name", FAMILIES)
def test_every_split_compiles_and_steps(name: str) -> None:
    family = families.get(name)
    for split in family.space.splits:
        env = Env(family, family.space.sample(split, 3, 1), threads=1)
        assert not any(s.faulted.any() for s in roll(env, 5))


def test_the_batch_equals_a_serial_loop_bit_for_bit() -> None:
    env = small("CheetahTerrain", worlds=5, threads=2, horizon=60)
    models = [env.model(t) for t in env.tasks]
    assert len({m.body("payload").mass[0] for m in models}) == 5
    serial = [mujoco.MjData(m) for m in models]
    for d, qpos, qvel in zip(serial, env.sim.bind("qpos"), env.sim.bind("qvel"), strict=True):
        d.qpos, d.qvel = qpos.numpy(), qvel.numpy()
    for t, row in enumerate(actions(env, 60)):
        step = env.step(row)
        for i, (m, d) in enumerate(zip(models, serial, strict=True)):
            d.ctrl = row[i].double().numpy()
            mujoco.mj_step(m, d, nstep=env.family.substeps)
            theirs = np.concatenate([d.qpos[1:], d.qvel]).astype(np.float32)
            assert (step.final_obs[i].numpy() == theirs).all(), (t, i)


def test_the_number_of_threads_changes_nothing() -> None:
    one, two, five = (
        roll(small("CheetahTerrain", worlds=5, threads=n, horizon=20), 45) for n in (1, 2, 5)
    )
    assert all(same(x, y) and same(x, z) for x, y, z in zip(one, two, five, strict=True))


def test_a_world_does_not_depend_on_how_many_others_there_are() -> None:
    family = replace(families.get("CheetahTerrain"), horizon=10)
    tasks = family.space.sample("train", 6, 0)
    many, few = Env(family, tasks, threads=1), Env(family, tasks[:2], threads=1)
    for row in actions(many, 25):
        a, b = AutoresetEnv(many).step(row), AutoresetEnv(few).step(row[:2])
        assert same(a, b, slice(0, 2)) or pytest.fail("the other worlds were felt")


def test_actions_are_clipped_to_the_actuators_range() -> None:
    big, edge = small("CheetahVel"), small("CheetahVel")
    assert same(big.step(torch.full((4, 6), 7.0)), edge.step(torch.ones(4, 6)))


def test_a_time_limit_truncates_and_does_not_terminate() -> None:
    env = small("CheetahVel", horizon=3)
    for _ in range(2):
        ends = [(s.terminated.any().item(), s.truncated.all().item()) for s in roll(env, 3)]
        assert ends == [(False, False), (False, False), (False, True)]


def fallen(state) -> torch.Tensor:
    """An early end, which comes at another step in each world."""
    return state.qvel[:, 0] > 0.25


def test_a_fall_terminates_even_at_the_time_limit() -> None:
    env = small("CheetahVel", horizon=3, terminate=lambda state: state.qpos[:, 0] > -99)
    step = env.step(torch.zeros(4, 6))
    assert step.terminated.all()
    env = small("CheetahVel", horizon=1, terminate=lambda state: state.qpos[:, 0] > -99)
    step = env.step(torch.zeros(4, 6))
    assert step.terminated.all()
    assert not step.truncated.any()


def test_each_world_is_reset_on_its_own_and_shows_its_last_observation_first() -> None:
    env = small("CheetahVel", worlds=6, horizon=40, terminate=fallen)
    alone, ended_at = [], set()
    for t, action in enumerate(actions(env, 40)):
        step = AutoresetEnv(env).step(action)
        ended = step.terminated | step.truncated
        assert torch.equal(ended, env.elapsed == 0)
        assert torch.equal(step.obs[~ended], step.final_obs[~ended])
        assert (step.final_obs[step.terminated, 8] > 0.25).all()
        assert (step.obs[ended] != step.final_obs[ended]).any(1).all()
        if 0 < ended.sum() < 6:
            alone.append(t)
        ended_at |= {(t, i) for i in torch.nonzero(ended)[:, 0].tolist()}
    assert alone
    assert len(ended_at) > 6


def test_an_early_end_in_one_world_is_not_felt_in_another() -> None:
    calm, falling = small("CheetahTerrain", horizon=15), small("CheetahTerrain", horizon=15)
    falling.family = falling.family.replace(
        terminate=lambda s: torch.tensor([True, False, False, False])
    )
    for a, b in zip(roll(calm, 40), roll(falling, 40), strict=True):
        assert b.terminated.tolist() == [True, False, False, False]
        assert same(a, b, [1, 2, 3])


def nan_velocity(env: Env, action: torch.Tensor) -> None:
    env.sim.bind("qvel")[1, 0] = float("nan")


def nan_action(env: Env, action: torch.Tensor) -> None:
    action[1, 2] = float("nan")


def huge_velocity(env: Env, action: torch.Tensor) -> None:
    env.sim.bind("qvel")[1, 4] = 1e11


@pytest.mark.parametrize("name", ["CheetahTerrain", "CheetahVel"])
@pytest.mark.parametrize("harm", [nan_velocity, nan_action, huge_velocity])
def test_broken_physics_ends_one_worlds_episode_and_is_felt_nowhere_else(
    harm, name, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sound, harmed = (small(name, worlds=3, horizon=10, threads=2) for _ in range(2))
    for t, row in enumerate(actions(sound, 30)):
        ours = row.clone()
        if t == 5:
            harm(harmed, ours)
        expected, step = AutoresetEnv(sound).step(row), AutoresetEnv(harmed).step(ours)
        assert same(expected, step, [0, 2])
        assert not expected.faulted.any()
        assert step.faulted.tolist() == [False, t == 5, False]
        assert step.obs.isfinite().all()
        assert step.final_obs.isfinite().all()
        if t == 5:
            assert step.terminated.tolist() == [False, True, False]
            assert not step.truncated.any()
            assert step.reward[1] == 0
            assert all(v[1] == 0 for v in step.terms.values())
        assert step.truncated[1] == (t in (15, 25))
    assert not list(tmp_path.iterdir())


def test_a_faulted_world_starts_its_next_episode_as_if_nothing_had_happened() -> None:
    sound, harmed = small("CheetahVel", horizon=6), small("CheetahVel", horizon=6)
    rows = actions(sound, 12)
    for row in rows[:6]:
        AutoresetEnv(sound).step(row)
    for t, row in enumerate(rows[:6]):
        if t == 5:
            nan_action(harmed, row)
        AutoresetEnv(harmed).step(row)
    for row in rows[6:]:
        assert same(sound.step(row), harmed.step(row))


def test_new_tasks_take_effect_at_the_reset() -> None:
    family = families.get("CheetahTerrain")
    old, new = family.space.sample("train", 4, 0), family.space.sample("train", 4, 9)
    env, fresh = Env(family, old, threads=1), Env(family, new, threads=1)
    roll(env, 5)
    env.set_tasks(new)
    env.reset(0)
    assert env.tasks == new
    for a, b in zip(roll(env, 10), roll(fresh, 10), strict=True):
        assert same(a, b)


def test_some_worlds_can_be_given_new_tasks() -> None:
    family = families.get("CheetahTerrain")
    tasks = family.space.sample("train", 5, 0)
    env, fresh = (
        Env(family, tasks[:4], threads=1),
        Env(family, [tasks[0], tasks[4], *tasks[2:4]], threads=1),
    )
    env.set_tasks([tasks[4]], [1])
    env.reset(0)
    for a, b in zip(roll(env, 10), roll(fresh, 10), strict=True):
        assert same(a, b)


def test_resampling_draws_a_new_task_at_each_autoreset() -> None:
    family = replace(families.get("CheetahTerrain"), horizon=4)
    pool = family.space.sample("train", 20, 1)
    env = Env(family, pool[:2], threads=1)
    stepped = AutoresetEnv(env, next_task=lambda world, episode: pool[2 * episode + world])
    for episode in range(1, 4):
        for action in actions(env, 4):
            stepped.step(action)
        assert env.tasks == pool[2 * episode : 2 * episode + 2]
        assert env.task_values["payload"].tolist() == [t["payload"] for t in env.tasks]
        assert [
            env.sim.snapshot(i)[0].body("payload").mass[0] for i in range(2)
        ] == env.task_values["payload"].tolist()


def test_a_world_whose_episode_is_over_stays_where_it_is_until_it_is_restarted() -> None:
    env = small("CheetahVel", worlds=6, horizon=15, terminate=fallen)
    last: list[torch.Tensor | None] = [None] * 6
    for action in actions(env, 20):
        waiting, qpos = env.over.clone(), env.state.qpos.clone()
        step = env.step(action)
        assert torch.equal(step.obs, step.final_obs)
        assert torch.equal(env.state.qpos[waiting], qpos[waiting])
        assert not ((step.terminated | step.truncated | step.faulted) & waiting).any()
        for i in torch.nonzero(step.terminated | step.truncated)[:, 0].tolist():
            last[i] = step.obs[i]
    assert env.over.all()
    assert len(set(env.elapsed.tolist())) > 1
    assert torch.equal(step.obs, torch.stack(last))
    fresh = small("CheetahVel", worlds=6, horizon=15).restart(1)
    obs = env.restart_worlds([1, 4])
    assert torch.equal(obs[[1, 4]], fresh[[1, 4]])
    assert torch.equal(obs[[0, 2, 3, 5]], step.obs[[0, 2, 3, 5]])
    assert env.over.tolist() == [True, False, True, True, False, True]
    assert torch.equal(env.restart(1), fresh)
    assert not env.over.any()


def test_the_number_of_an_episode_decides_its_start() -> None:
    env, other = small("CheetahVel", horizon=6), small("CheetahVel", horizon=6)
    roll(env, 6)
    roll(other, 15)
    assert torch.equal(env.restart(1), other.restart(1))
    roll(env, 2)
    assert torch.equal(env.restart(2), other.restart(2))


def test_the_store_of_models_stays_bounded_and_shares_equal_ones() -> None:
    family = families.get("CheetahTerrain")
    env = Env(family, family.space.sample("train", 2, 0), threads=1)
    for seed in range(8):
        env.set_tasks(family.space.sample("train", 2, seed))
        for task in family.space.sample("train", 100, seed):
            env.model(task)
    assert len(env._models) <= 256
    vel = small("CheetahVel", worlds=20)
    assert len(vel._models) == 1


def shifting() -> Family:
    """A family whose start depends on what the task changes: the reference angle of a joint."""
    edit = families.get("CheetahTerrain").space.params[0].edits[0]
    edit = replace(edit, element="joint", name="bthigh", field="ref", index=None)
    space = TaskSpace("Shifting", (Param(name="ref", train=Uniform(0, 0.4), edits=(edit,)),))
    return replace(
        families.get("CheetahVel"),
        name="Shifting",
        space=space,
        reward=families.get("CheetahTerrain").reward,
    )


def test_each_world_starts_from_its_own_model() -> None:
    family = shifting()
    tasks = [{"ref": 0.0}, {"ref": 0.4}]
    env, swapped = Env(family, tasks, threads=1), Env(family, tasks[::-1], threads=1)
    assert torch.allclose(
        env.reset(0)[:, 2] - swapped.reset(0)[:, 2], torch.tensor([-0.4, 0.4]), atol=1e-6
    )


def test_an_environment_without_tasks_is_refused() -> None:
    with pytest.raises(Exception, match="an environment needs at least one task"):
        Env(families.get("CheetahVel"), [])
