import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metarobot.tasks.distributions import Choice, LogUniform, Mixture, TaskError, Uniform
from metarobot.tasks.family import families
from metarobot.tasks.model_edits import Edit
from metarobot.tasks.space import Param, TaskSpace

FAMILIES = families.names()
SPLITS = [(name, split) for name in FAMILIES for split in families.get(name).space.splits]
CONTINUOUS = [name for name in FAMILIES if families.get(name).space.finite is None]

numbers = st.floats(-1e3, 1e3).map(lambda x: round(x, 4))
widths = st.floats(0.01, 100).map(lambda x: round(x, 4))
uniforms = st.builds(lambda low, width: Uniform(low, round(low + width, 4)), numbers, widths)
log_uniforms = st.builds(lambda low, width: LogUniform(low, round(low + width, 4)), widths, widths)
choices = st.lists(numbers, min_size=1, max_size=4, unique=True).map(lambda v: Choice(tuple(v)))
simple = uniforms | log_uniforms | choices
mixtures = st.lists(st.tuples(st.floats(0.1, 5), simple), min_size=1, max_size=3).map(
    lambda pairs: Mixture(tuple(w for w, _ in pairs), tuple(d for _, d in pairs))
)
distributions = simple | mixtures


@st.composite
def params(draw, name: str) -> Param:
    """A parameter over a range, with or without a hole inside it and a stretch beyond it."""
    train = draw(uniforms | log_uniforms)
    width = train.high - train.low
    hole = (train.low + 0.25 * width, train.low + 0.5 * width) if draw(st.booleans()) else None
    beyond = Uniform(train.high + 1, train.high + 2) if draw(st.booleans()) else None
    edits = (
        (Edit(element="geom", name="floor", field="friction", index=0),)
        if draw(st.booleans())
        else ()
    )
    return Param(
        name=name, train=train, held_out=hole, extrapolation=beyond, edits=edits, unit="m", doc="α"
    )


@st.composite
def spaces(draw) -> TaskSpace:
    return TaskSpace(
        "Space", tuple(draw(params(name)) for name in "abc"[: draw(st.integers(1, 3))])
    )


@given(distributions, st.integers(0, 2**63))
def test_a_distribution_contains_what_it_draws(distribution, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for x in (distribution.sample(rng) for _ in range(20)):
        assert distribution.contains(x)
        assert distribution.low <= x <= distribution.high


@pytest.mark.parametrize(
    "train", [Choice((1 / 3, 2 / 3)), Uniform(1 + 1e-10, 1 + 2e-10), LogUniform(0.1, 0.1 + 1e-12)]
)
def test_rounding_to_nine_digits_stays_within_the_bounds(train) -> None:
    space = TaskSpace("Narrow", (Param(name="x", train=train, extrapolation=Choice((5 / 3,))),))
    for task in space.sample("train", 20) + space.sample("extrapolate", 1):
        assert space.coerce(task) == task


def test_a_mixture_draws_its_parts_by_weight() -> None:
    rng = np.random.default_rng(0)
    mixture = Mixture((3.0, 1.0), (Uniform(0, 1), Choice((5.0,))))
    share = np.mean([mixture.sample(rng) == 5.0 for _ in range(4000)])
    assert share == pytest.approx(0.25, abs=0.03)


def test_a_log_uniform_range_is_as_likely_to_halve_as_to_double() -> None:
    rng = np.random.default_rng(0)
    below = np.mean([LogUniform(0.25, 4.0).sample(rng) < 1.0 for _ in range(4000)])
    assert below == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(("name", "split"), SPLITS)
def test_every_task_of_every_family_is_one_the_space_accepts(name: str, split: str) -> None:
    space = families.get(name).space
    for task in space.sample(split, 100, seed=3):
        assert space.coerce(task) == task


@pytest.mark.parametrize("name", CONTINUOUS)
def test_no_test_task_is_a_training_task(name: str) -> None:
    space = families.get(name).space
    for seed in (0, 1):
        assert not set(space.sample("train", 500, seed)) & set(space.sample("test", 500, seed))


@given(spaces(), st.integers(0, 2**32))
@settings(max_examples=50)
def test_training_and_test_avoid_the_holes_and_interpolate_fills_them(
    space: TaskSpace, seed: int
) -> None:
    holed = [p for p in space.params if p.held_out]
    for split in ("train", "test"):
        for task in space.sample(split, 20, seed):
            assert not any(p.in_held_out(task[p.name]) for p in space.params)
            assert all(p.train.contains(task[p.name]) for p in space.params)
    assert ("interpolate" in space.splits) == bool(holed)
    if holed:
        for task in space.sample("interpolate", 20, seed):
            assert all(p.in_held_out(task[p.name]) for p in holed)
            assert all(p.train.contains(task[p.name]) for p in space.params)


def outside(space: TaskSpace, task) -> list[str]:
    spared = {name for few in space.sparse_faults for name in few.extrapolation_params}
    odd = [
        p.name
        for p in space.params
        if p.name in spared and not p.train.parts[0].contains(task[p.name])
    ]
    return odd + [p.name for p in space.params if not p.train.contains(task[p.name])]


@given(spaces(), st.integers(0, 2**32))
@settings(max_examples=50)
def test_extrapolate_has_exactly_one_parameter_outside(space: TaskSpace, seed: int) -> None:
    assert ("extrapolate" in space.splits) == any(p.extrapolation for p in space.params)
    if "extrapolate" in space.splits:
        for task in space.sample("extrapolate", 20, seed):
            assert len(outside(space, task)) == 1


@pytest.mark.parametrize(
    "name", [n for n in FAMILIES if "extrapolate" in families.get(n).space.splits]
)
def test_extrapolate_takes_every_parameter_out_in_turn(name: str) -> None:
    space = families.get(name).space
    found = [outside(space, t) for t in space.sample("extrapolate", 300, 0)]
    spared = {name for few in space.sparse_faults for name in few.extrapolation_params}
    assert all(len(f) == 1 or (f and spared >= set(f)) for f in found)
    assert {n for f in found for n in f} == {
        p.name for p in space.params if p.extrapolation
    } | spared


@pytest.mark.parametrize(("name", "split"), SPLITS)
def test_the_same_seed_gives_the_same_tasks_and_another_seed_others(name: str, split: str) -> None:
    space = families.get(name).space
    tasks = space.sample(split, 20, seed=5)
    assert space.sample(split, 20, seed=5) == tasks
    assert space.sample(split, 10, seed=5) == tasks[:10]
    if space.finite is None:
        assert not set(space.sample(split, 20, seed=6)) & set(tasks)
        assert not set(space.sample(split, 20, seed=[5, 1])) & set(tasks)


GOLDEN = TaskSpace(
    "Golden",
    (
        Param(name="a", train=Uniform(-5, 5), held_out=(1.0, 2.0), extrapolation=Uniform(5, 10)),
        Param(name="b", train=LogUniform(0.25, 4)),
        Param(name="c", train=Mixture((3, 1), (Uniform(1, 2), Choice((0.0, -1.0))))),
    ),
)


@pytest.mark.parametrize(
    ("split", "values"),
    [
        (
            "train",
            [
                2.50478612,
                0.372910725,
                1.49251024,
                -1.80452904,
                0.391014461,
                -1.0,
                3.34245565,
                0.750718851,
                1.57289099,
            ],
        ),
        (
            "test",
            [
                -2.27573095,
                0.820854578,
                0.0,
                -4.88243589,
                3.16435119,
                1.31846393,
                -3.82970154,
                2.96724546,
                0.0,
            ],
        ),
        (
            "interpolate",
            [
                1.31564092,
                0.307053187,
                0.0,
                1.31431484,
                1.36102371,
                0.0,
                1.58088315,
                0.848936641,
                1.56661494,
            ],
        ),
        (
            "extrapolate",
            [
                6.79039192,
                0.836983997,
                1.7854576,
                7.06910097,
                0.678028167,
                0.0,
                6.1428564,
                0.783368959,
                1.87138903,
            ],
        ),
    ],
)
def test_tasks_are_the_same_on_every_machine(split: str, values: list[float]) -> None:
    assert [v for t in GOLDEN.sample(split, 3, 7) for v in t.as_dict().values()] == values


def test_two_spaces_draw_different_tasks_from_the_same_ranges() -> None:
    space = TaskSpace("A", (Param(name="x", train=Uniform(0, 1)),))
    assert (
        space.sample("train", 3, 0)[0]["x"]
        != replace(space, name="B").sample("train", 3, 0)[0]["x"]
    )


def test_sampling_leaves_the_global_generators_alone() -> None:
    numpy_before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()
    families.get("CheetahTerrain").space.sample("train", 20, 0)
    assert (np.random.get_state()[1] == numpy_before).all()
    assert torch.equal(torch.get_rng_state(), torch_before)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_space_survives_json(name: str) -> None:
    space = families.get(name).space
    back = TaskSpace.from_json(json.loads(json.dumps(space.to_json())))
    assert back == space
    assert back.hash == space.hash


@given(spaces(), mixtures)
@settings(max_examples=50)
def test_any_space_survives_json(space: TaskSpace, mixture: Mixture) -> None:
    space = replace(
        space,
        params=(*space.params, Param(name="mixed", train=mixture, extrapolation=Choice((9999.0,)))),
    )
    back = TaskSpace.from_json(json.loads(json.dumps(space.to_json())))
    assert back == space
    assert back.hash == space.hash


@pytest.mark.parametrize("change", ["high", "name", "edit", "hole"])
def test_a_changed_file_is_refused(change: str) -> None:
    data = families.get("CheetahTerrain").space.to_json()
    slope = data["params"][1]
    if change == "high":
        slope["train"]["high"] = 9
    elif change == "name":
        data["name"] = "Other"
    elif change == "edit":
        slope["edits"][0]["op"] = "set"
    else:
        slope["hole"] = None
    with pytest.raises(TaskError, match="changed after it was written"):
        TaskSpace.from_json(data)


@pytest.mark.parametrize(
    "data", [{}, {"name": "A"}, [], "text", {"name": "A", "params": [], "hash": ""}]
)
def test_what_is_no_task_space_is_refused(data) -> None:
    with pytest.raises(TaskError, match=r"^(not a task space|the task space 'A' was changed)"):
        TaskSpace.from_json(data)


def test_anything_that_changes_a_space_changes_its_hash() -> None:
    space = families.get("CheetahVel").space
    (param,) = space.params
    others = [
        replace(space, name="Other"),
        replace(space, params=(replace(param, name="v"),)),
        replace(space, params=(replace(param, train=Uniform(0, 3.5)),)),
        replace(space, params=(replace(param, train=LogUniform(0.1, 3)),)),
        replace(space, params=(replace(param, held_out=(1, 2)),)),
        replace(space, params=(replace(param, extrapolation=None),)),
        replace(space, params=(replace(param, edits=(Edit(element="option", field="timestep"),)),)),
    ]
    assert len({s.hash for s in [space, *others]}) == 1 + len(others)


VEL, TERRAIN = families.get("CheetahVel").space, families.get("CheetahTerrain").space


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (
            lambda: VEL.sample("trian", 1),
            "CheetahVel has no split 'trian'; it has: train, test, extrapolate",
        ),
        (
            lambda: VEL.sample("interpolate", 1),
            "CheetahVel has no split 'interpolate'; it has: train, test, extrap",
        ),
        (lambda: VEL.sample("train", 0), "the number of tasks must be at least 1, not 0"),
        (lambda: VEL.task(speed=1), "CheetahVel has no parameter 'speed'; it has: target_speed"),
        (lambda: TERRAIN.task(friction=1), "a CheetahTerrain task needs a value for 'slope'"),
        (lambda: VEL.task(target_speed=float("nan")), "target_speed = nan is not a finite number"),
        (lambda: VEL.task(target_speed=float("inf")), "target_speed = inf is not a finite number"),
        (lambda: VEL.task(target_speed="1"), "target_speed = '1' is not a finite number"),
        (lambda: VEL.task(target_speed=True), "target_speed = True is not a finite number"),
        (
            lambda: VEL.task(target_speed=-0.1),
            "target_speed = -0.1 is outside its bounds: U[0, 3], or U[3, 4] to",
        ),
        (
            lambda: VEL.coerce(TERRAIN.sample("train", 1)[0]),
            "that is a task of CheetahTerrain, not of CheetahVel",
        ),
        (lambda: VEL.coerce([1.0]), "a CheetahVel task maps target_speed to values, unlike [1.0]"),
        (lambda: LogUniform(0, 1), "a log-uniform range needs 0 < low <= high, not [0, 1]"),
        (lambda: Mixture((1.0,), ()), "a mixture needs one positive weight a part"),
        (
            lambda: TaskSpace("A", (VEL.params[0], VEL.params[0])),
            "A has two parameters called 'target_speed'",
        ),
        (
            lambda: TaskSpace("A", (Param(name="x", train=Uniform(0, 1), held_out=(2, 3)),)).sample(
                "interpolate", 1
            ),
            "x: nothing can be drawn inside the held-out interval (2, 3)",
        ),
    ],
)
def test_a_mistake_is_one_line_that_says_what_exists(mistake, message: str) -> None:
    with pytest.raises(TaskError) as error:
        mistake()
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", FAMILIES)
def test_tasks_survive_pickling_and_compare_and_hash_by_value(name: str) -> None:
    space = families.get(name).space
    for task in space.sample("train", 5, 0):
        back = pickle.loads(pickle.dumps(task))
        again = space.task(**task.as_dict())
        assert back == task == again
        assert hash(back) == hash(task) == hash(again)
        assert len({back, task, again}) == 1


def test_a_task_does_not_depend_on_the_order_its_values_are_named_in() -> None:
    values = TERRAIN.sample("train", 1)[0].as_dict()
    assert TERRAIN.task(**dict(reversed(values.items()))) == TERRAIN.task(**values)


def test_the_test_split_of_a_finite_space_is_balanced() -> None:
    tasks = families.get("CheetahDir").space.sample("test", 20, seed=1)
    assert sorted(t["direction"] for t in tasks) == [-1.0] * 10 + [1.0] * 10


def test_a_finite_space_leaves_its_hole_out() -> None:
    space = TaskSpace(
        "Grid", (Param(name="x", train=Choice((0.0, 1.0, 2.0)), held_out=(0.5, 1.5)),)
    )
    assert (
        {t["x"] for t in space.sample("test", 4)}
        == {t["x"] for t in space.sample("train", 50)}
        == {0.0, 2.0}
    )
    assert {t["x"] for t in space.sample("interpolate", 4)} == {1.0}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_encoding_maps_the_training_range_to_one(name: str) -> None:
    space = families.get(name).space
    codes = space.encode(space.sample("train", 500, 0))
    assert codes.dtype == torch.float32
    assert codes.abs().max() <= 1.0 + 1e-6
    spared = {name for few in space.sparse_faults for name in few.extrapolation_params}
    varied = [p.name not in spared for p in space.params if not p.nuisance]
    assert (codes.max(0).values > 0.9).all()
    assert (codes.min(0).values[varied] < -0.9).all()
    for edge, corner in ((-1.0, "low"), (1.0, "high")):
        end = space.task(**{p.name: getattr(p.train, corner) for p in space.params})
        assert torch.allclose(space.encode([end]), torch.full((1, space.width), edge))


def test_a_log_uniform_parameter_is_encoded_on_a_log_scale() -> None:
    space = TaskSpace(
        "Log", (Param(name="x", train=LogUniform(0.25, 4)), Param(name="y", train=Choice((2.0,))))
    )
    assert space.encode([space.task(x=1, y=2)]).tolist() == [[0.0, 0.0]]


def test_the_description_names_every_parameter_and_where_it_enters() -> None:
    text = TERRAIN.describe()
    assert all(p.name in text for p in TERRAIN.params)
    assert "set geom floor friction[0]" in text
    assert "enters: the reward" in VEL.describe()
