from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise

import mujoco
import numpy as np
import pytest
import torch
from torch import Tensor

from metarobot.env.base import Env, StepResult
from metarobot.envs import placement
from metarobot.envs.robots import arm_control
from metarobot.tasks.family import Family, families
from metarobot.tasks.space import Task
from metarobot.training.collect import ExpertAgent, collect
from metarobot.types import Floats

PLACES = torch.from_numpy(placement.PLACES)


def class_codes() -> Tensor:
    return torch.from_numpy(placement.class_codes())


FAMILY, SHOWN = families.get("Placement"), families.get("PlacementShown")
CLASSES, CODE = placement.CLASSES, placement.CODE_LENGTH
CODES = slice(-CODE, None)
"""Where in an observation the code is."""
CLOSE = 4
"""Of the action."""
ORDERS = range(24)
each_family = pytest.mark.parametrize("family", [FAMILY, SHOWN], ids=lambda f: f.name)
each_split = pytest.mark.parametrize("split", ["train", "extrapolate"])


def every_variant(worlds: int) -> Tensor:
    return torch.arange(worlds) % CLASSES


def otherwise(task: Task, **values: float) -> dict[str, float]:
    """The same task but for some values."""
    return {**task.as_dict(), **values}


def presented(
    family: Family, tasks: Sequence[Task | dict[str, float]], seed: int = 0
) -> tuple[Env, Tensor]:
    """A world for every variant of each task, and its first observations, ``(task, variant,
    obs)``."""
    env = Env(family, [t for t in tasks for _ in range(CLASSES)], threads=1)
    env.reset(seed)
    return env, env.set_variant(every_variant(env.worlds)).view(len(tasks), CLASSES, -1)


def class_numbers(tasks: Sequence[Task | dict[str, float]]) -> Tensor:
    """Which classes a task's objects are of, by their looks: the codes' rows, ``(task,
    variant)``."""
    _, obs = presented(FAMILY.replace(noise=()), tasks)
    gaps = torch.cdist(obs[..., CODES].double(), class_codes())
    assert gaps.amin(-1).max() < 1e-6
    return gaps.argmin(-1)


def wild(env: Env, rng: torch.Generator) -> Tensor:
    return 2 * torch.rand(env.worlds, env.act_dim, generator=rng) - 1


def expert_action(env: Env, order: int) -> Tensor:
    """What the expert does if it believes this order."""
    task = {**env.state.task, "order": torch.full((env.worlds,), float(order)).double()}
    return env.family.teaching.expert(env.state._replace(task=task)).float()


@each_family
@each_split
def test_the_expert_succeeds(family: Family, split: str) -> None:
    tasks = family.space.sample(split, 40, 0)
    env = Env(family, tasks, threads=1)
    trials = collect(ExpertAgent(env), env, tasks, episodes=2, seed=0)
    success = trials.totals("success")
    assert success.shape == (2, 40)
    assert set(success.unique().tolist()) <= {0.0, 1.0}
    assert success.mean() >= 0.95
    assert trials.faults() == 0


def test_every_class_of_a_task_has_a_place_of_its_own_and_every_order_occurs() -> None:
    (task,) = FAMILY.space.sample("train", 1, 0)
    env, _ = presented(FAMILY, [otherwise(task, order=float(o)) for o in ORDERS])
    where = torch.cdist(placement.right_place(env.state), PLACES).view(len(ORDERS), CLASSES, -1)
    assert where.amin(-1).max() == 0
    orders = where.argmin(-1)
    assert orders.sort(1).values.tolist() == [[0, 1, 2, 3]] * 24
    assert len(orders.unique(dim=0)) == 24
    assert {t["order"] for t in FAMILY.space.sample("train", 400, 0)} == set(map(float, ORDERS))


def test_places_are_apart_from_each_other_from_the_start_and_within_reach() -> None:
    assert torch.pdist(PLACES).min() > 4 * placement.PLACE_RADIUS
    env = Env(FAMILY, FAMILY.space.sample("train", 40, 0), threads=1)
    assert torch.cdist(env.state.qpos[:, -7:-5], PLACES).min() > 2 * placement.PLACE_RADIUS
    assert (torch.from_numpy(arm_control.WORKSPACE_LOW)[:2] + 0.02 < PLACES).all()
    assert (torch.from_numpy(arm_control.WORKSPACE_HIGH)[:2] - 0.02 > PLACES).all()


def test_over_episodes_all_variants_occur_as_often() -> None:
    env = Env(FAMILY, FAMILY.space.sample("train", 20, 0), threads=1)
    drawn = torch.stack([(env.restart(k), env.state.variant.clone())[1] for k in range(30)])
    counts = drawn.flatten().bincount(minlength=CLASSES)
    assert len(counts) == CLASSES
    assert ((counts - 150).abs() < 50).all()
    assert (drawn[:, :-1] != drawn[:, 1:]).any(0).all()
    assert all(len(world.unique()) == CLASSES for world in drawn.T)


@each_split
def test_the_classes_of_a_task_are_four_and_what_is_in_training_is_not_in_what_is_kept_for_tests(
    split: str,
) -> None:
    tasks = FAMILY.space.sample(split, 100, 0)
    classes = class_numbers(tasks)
    assert all(len(row.unique()) == CLASSES for row in classes)
    if split == "train":
        assert classes.max() < placement.TRAINING_CLASSES
        assert len(classes.unique()) > 250
    else:
        assert classes[classes >= placement.TRAINING_CLASSES].unique().numel() > 50
        assert {tuple(t.values) for t in tasks}.isdisjoint(
            tuple(t.values) for t in FAMILY.space.sample("train", 100)
        )


def test_tasks_to_extrapolate_to_share_no_class_with_training() -> None:
    """What K shots are worth is tested on classes of which none was trained on."""
    trained, kept = (
        set(class_numbers(FAMILY.space.sample(s, 200, 0)).flatten().tolist())
        for s in ("train", "extrapolate")
    )
    assert trained.isdisjoint(kept)


def test_codes_are_distinct_unit_vectors_and_always_the_same() -> None:
    codes = class_codes()
    assert codes.shape == (2 * placement.TRAINING_CLASSES, CODE)
    assert torch.allclose(codes.norm(dim=1), torch.ones(len(codes)).double())
    assert torch.pdist(codes, p=torch.inf).min() > placement.NOISE[-1]
    placement.class_codes.cache_clear()
    assert torch.equal(class_codes(), codes)
    assert codes[0].tolist()[:3] == pytest.approx([-0.10693, 0.35786, 0.41530], abs=1e-4)


def test_a_class_looks_the_same_wherever_it_occurs() -> None:
    first, *others = FAMILY.space.sample("train", 12, 0)
    names = [n for n in FAMILY.space.names if n.startswith("class_")]
    alike = [first, *(otherwise(t, **{n: first[n] for n in names}) for t in others)]
    assert len({t["order"] for t in alike}) > 5
    assert len({t["width"] for t in alike}) == 12
    plain = torch.cat([presented(FAMILY.replace(noise=()), alike, seed)[1] for seed in (0, 1)])[
        ..., CODES
    ]
    assert torch.equal(plain, plain[:1].expand_as(plain))
    assert torch.equal(plain[0], class_codes()[class_numbers([first])[0]].float())
    noisy = torch.cat([presented(FAMILY, alike, seed)[1] for seed in (0, 1)])[..., CODES]
    off = (noisy - plain).abs()
    assert off.max() <= 0.05 + 1e-6
    assert off.max() > 0.045
    assert off.mean() == pytest.approx(0.025, rel=0.1)


@each_family
def test_what_belongs_where_is_seen_by_those_alone_who_are_shown_it(family: Family) -> None:
    tasks = FAMILY.space.sample("train", 4, 0)
    envs = [
        Env(family, [otherwise(t, order=order) for t in tasks], threads=1) for order in (0.0, 23.0)
    ]
    rng, observations = torch.Generator().manual_seed(0), [[env.reset(3)] for env in envs]
    for _ in range(40):
        action = wild(envs[0], rng)
        for env, obs in zip(envs, observations, strict=True):
            obs.append(env.step(action).obs)
    assert torch.equal(envs[0].elapsed, envs[1].elapsed)
    same = [torch.equal(a, b) for a, b in zip(*observations, strict=True)]
    assert same == [family is FAMILY] * 41
    n = len(arm_control.OBSERVATIONS)
    body = [torch.equal(a[:, :n], b[:, :n]) for a, b in zip(*observations, strict=True)]
    assert all(body)


def test_who_is_shown_the_place_sees_it_and_not_the_class() -> None:
    family = SHOWN.replace(noise=())
    tasks = FAMILY.space.sample("train", 6, 0)
    env, obs = presented(family, [otherwise(t) for t in tasks])
    place = placement.right_place(env.state) - torch.from_numpy(arm_control.WORKSPACE_CENTRE)[:2]
    assert obs.shape[-1] == len(arm_control.OBSERVATIONS) + 2
    assert torch.equal(obs[..., -2:], place.float().view(6, CLASSES, 2))
    other = [
        otherwise(
            t,
            **{f"class_{i}": (t[f"class_{i}"] + 4) % placement.TRAINING_CLASSES for i in range(4)},
        )
        for t in tasks
    ]
    assert torch.equal(presented(family, other)[1], obs)
    assert not torch.equal(*(presented(FAMILY, x)[1] for x in (tasks, other)))


@cache
def carried(order: int) -> tuple[Env, list[StepResult], list[Tensor]]:
    """The expert in tasks of order 23, believing in another: all steps, and which worlds were in
    their first episode.

    Orders 0 and 23 put no class in the same place.
    """
    tasks = [
        otherwise(t, order=23.0) for t in FAMILY.space.sample("train", 6, 1) for _ in range(CLASSES)
    ]
    env = Env(FAMILY, tasks, threads=1)
    env.reset(1)
    env.set_variant(every_variant(env.worlds))
    alive, steps, awake = torch.ones(env.worlds, dtype=torch.bool), [], []
    while alive.any():
        awake.append(alive.clone())
        steps.append(env.step(expert_action(env, order), alive))
        alive &= ~(steps[-1].terminated | steps[-1].truncated)
    return env, steps, awake


def total(order: int, term: str) -> Tensor:
    """Sum of a term over each world's first episode."""
    _, steps, awake = carried(order)
    return torch.stack([s.terms[term] * a for s, a in zip(steps, awake, strict=True)]).sum(0)


def ends(order: int) -> Tensor:
    """Whether each step ended an episode as a failure or success does, ``(time, world)``."""
    _, steps, awake = carried(order)
    return torch.stack([s.terminated & a for s, a in zip(steps, awake, strict=True)])


def test_put_down_in_its_place_is_a_success_once_and_ends_the_episode() -> None:
    _, steps, _ = carried(23)
    assert (total(23, "success") == 1).float().mean() > 0.95
    assert (total(23, "wrong") == 0).all()
    success = torch.stack([s.terms["success"] for s in steps])
    assert success.unique().tolist() == [0, 1]
    assert torch.equal(success * ends(23) > 0, ends(23) & (total(23, "success") == 1))
    assert len(steps) < FAMILY.horizon


def test_put_down_in_anothers_place_is_wrong_once_and_ends_the_episode() -> None:
    _, steps, _ = carried(0)
    assert (total(0, "wrong") == -1).float().mean() > 0.95
    assert (total(0, "success") == 0).all()
    wrong = torch.stack([s.terms["wrong"] for s in steps])
    assert wrong.unique().tolist() == [-1, 0]
    assert torch.equal(wrong * ends(0) < 0, ends(0) & (total(0, "wrong") == -1))
    assert len(steps) < FAMILY.horizon


def test_what_is_right_is_rewarded_more_than_what_is_wrong_and_both_count_until_the_end_alone() -> (
    None
):
    gains = [
        torch.stack([s.reward * a for s, a in zip(*carried(o)[1:], strict=True)]).sum(0)
        for o in (23, 0)
    ]
    assert (gains[0] > gains[1] + 20).all()
    for order in (23, 0):
        _, _, awake = carried(order)
        assert all((a | ~b).all() for a, b in pairwise(awake))
        assert torch.equal(ends(order).sum(0), torch.ones(24, dtype=torch.int64))


def played(act: str) -> tuple[Env, list[StepResult]]:
    """Some seconds of worlds whose hand does as it likes, nothing, or the right thing without ever
    letting go."""
    env = Env(FAMILY, FAMILY.space.sample("train", 8, 2), threads=1)
    rng, steps = torch.Generator().manual_seed(0), []
    for _ in range(FAMILY.horizon):
        action = (
            env.family.teaching.expert(env.state).float() if act == "hold" else torch.zeros(8, 6)
        )
        if act == "hold":
            action[env.state.statistics[:, placement.STAT_CARRIED] > 0, CLOSE] = 1.0
        steps.append(env.step(wild(env, rng) if act == "wild" else action))
    return env, steps


@pytest.mark.parametrize("act", ["nothing", "hold"])
def test_what_is_not_put_down_counts_for_nothing(act: str) -> None:
    _, steps = played(act)
    assert not torch.stack([s.terminated for s in steps]).any()
    assert steps[-1].truncated.all()
    for term in ("success", "wrong"):
        assert (torch.stack([s.terms[term] for s in steps]) == 0).all()
    near = torch.stack([s.terms["carry"] for s in steps])[-1]
    assert (near > 0.8).all() if act == "hold" else (near == 0).all()


def test_reward_terms_are_between_minus_one_and_one() -> None:
    steps = [*carried(23)[1], *carried(0)[1], *played("wild")[1], *played("hold")[1]]
    for name in FAMILY.weights:
        values = torch.cat([s.terms[name] for s in steps])
        assert values.min() >= (-1 if name in ("wrong", "calm") else 0), name
        assert values.max() <= (0 if name in ("wrong", "calm") else 1), name
        assert len(values.unique()) > 1, name


def lost(rng: np.random.Generator, model: mujoco.MjModel) -> tuple[Floats, Floats]:
    """As usual, but with the object beyond the table's end."""
    qpos, qvel = FAMILY.start(rng, model)
    qpos[-7:-5] = [0.5, 0.4]
    return qpos, qvel


def test_an_object_that_left_the_table_ends_the_episode_without_success() -> None:
    env = Env(replace(FAMILY, start=lost), FAMILY.space.sample("train", 4, 0), threads=1)
    step = env.step(torch.zeros(4, 6))
    assert step.terminated.all()
    assert (step.terms["success"] == 0).all()
    assert (step.terms["wrong"] == 0).all()


def test_presenting_makes_exactly_those_variants_and_the_next_episode_draws_its_own() -> None:
    tasks = FAMILY.space.sample("train", 12, 0)
    env, free = (Env(FAMILY, tasks, threads=1) for _ in range(2))
    drawn = free.reset(5)
    for variant in (every_variant(12), torch.full((12,), 2), every_variant(12).flip(0)):
        env.reset(5)
        obs = env.set_variant(variant)
        assert torch.equal(env.state.variant, variant)
        assert torch.equal(obs[:, :-CODE], drawn[:, :-CODE])
        named = class_numbers(tasks)[torch.arange(12), variant]
        assert (obs[:, CODES] - class_codes()[named]).abs().max() <= 0.05 + 1e-6
        env.step(torch.zeros(12, 6))
        assert torch.equal(env.state.variant, variant)
        assert torch.equal(env.restart(1), free.restart(1))
        assert torch.equal(env.state.variant, free.state.variant)


def test_a_trial_begins_with_the_variants_asked_for_and_goes_on_with_its_own() -> None:
    tasks = FAMILY.space.sample("train", 6, 0)
    family, kept = replace(FAMILY, horizon=3), []
    env = Env(family, [t for t in tasks for _ in range(CLASSES)], threads=1)
    for variant in (every_variant(24), (every_variant(24) + 1) % CLASSES, None):
        now: list[Tensor] = []

        def watch(_: int, env: Env, __: StepResult, now: list[Tensor] = now) -> None:
            if (env.elapsed > 0).all():
                now.append(env.state.variant.clone())

        agent, settings = ExpertAgent(env), {"episodes": 2, "seed": 0, "rollouts": CLASSES}
        collect(agent, env, tasks, **settings, variant=variant, watch=watch)
        kept.append(now)
    assert torch.equal(kept[0][0], every_variant(24))
    assert torch.equal(kept[1][0], (every_variant(24) + 1) % CLASSES)
    assert len(kept[2][0].unique()) == CLASSES
    assert torch.equal(kept[0][-1], kept[1][-1])
    assert torch.equal(kept[0][-1], kept[2][-1])
    assert not torch.equal(kept[2][0], kept[2][-1])
