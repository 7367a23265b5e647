import re
from collections.abc import Callable
from functools import cache
from typing import Any

import mujoco
import numpy as np
import pytest
import torch

from metarobot.env.base import Env
from metarobot.envs.scenery import graspable_objects
from metarobot.errors import MetarobotError
from metarobot.tasks.family import families
from metarobot.tasks.model_edits import compile_spec
from metarobot.tasks.task_models import TaskModels

SHAPES, MIX = families.get("GraspShapes"), families.get("GraspMix")
EASY = {
    "kind": 0.0,
    "shape_seed": 7.0,
    "width": 0.05,
    "length": 1.2,
    "height": 0.06,
    "mass": 0.3,
    "friction": 0.7,
}
UNBALANCED = {"centre_x": 0.4, "centre_y": -0.3}
KINDS = range(len(graspable_objects.OBJECT_KINDS))
each_kind = pytest.mark.parametrize("kind", KINDS, ids=graspable_objects.OBJECT_KINDS)


def model(**task: float) -> mujoco.MjModel:
    """A world with a task's object, whatever the task spaces allow."""
    spec = SHAPES.spec()
    graspable_objects.edit_object(spec, {**EASY, **task})
    return compile_spec(spec)


def hull(of: mujoco.MjModel) -> tuple[np.ndarray, np.ndarray]:
    """The mesh's corners, and the corners of each face of its convex hull ``(face, 3)``, as MuJoCo
    computed it."""
    start = of.mesh_graphadr[0]
    corners, faces = of.mesh_graph[start : start + 2]
    end = start + 2 + 3 * corners + 6 * faces
    return of.mesh_vert[: of.mesh_vertnum[0]].astype(float), of.mesh_graph[
        end - 3 * faces : end
    ].reshape(-1, 3)


def test_a_superquadric_is_drawn_from_its_seed_alone() -> None:
    drawn = [graspable_objects.superquadric(seed) for seed in range(30)]
    np.random.default_rng(0).random()
    for seed, points in enumerate(drawn):
        assert points.shape == (graspable_objects.SUPERQUADRIC_VERTICES, 3)
        assert (graspable_objects.superquadric(seed) == points).all()
        assert np.abs(points).max(0).tolist() == [1, 1, 1], (
            "it fills the cube and does not leave it"
        )
        assert points.min(0)[2] == -1
        assert all(np.abs(points - other).max() > 1e-3 for other in drawn[:seed])


def test_superquadrics_range_from_round_to_boxy() -> None:
    corner = [
        np.linalg.norm(graspable_objects.superquadric(seed), axis=1).max() for seed in range(200)
    ]
    assert min(corner) < 1.15, "a sphere's are at 1"
    assert np.ptp(corner) > 0.2


def test_a_superquadric_is_strictly_convex() -> None:
    """Every corner off a face lies truly beneath it, so none is lost and every face is a
    triangle."""
    for seed in range(0, 1000, 25):
        of = model(kind=5.0, shape_seed=float(seed))
        corners, faces = hull(of)
        assert len(corners) == graspable_objects.SUPERQUADRIC_VERTICES
        assert set(faces.ravel()) == set(range(graspable_objects.SUPERQUADRIC_VERTICES)), seed
        assert len(faces) == 2 * graspable_objects.SUPERQUADRIC_VERTICES - 4
        a, b, c = (corners[faces[:, i]] for i in range(3))
        normal = np.cross(b - a, c - a)
        normal /= np.linalg.norm(normal, axis=1, keepdims=True)
        beneath = np.einsum("fi,fpi->fp", normal, a[:, None] - corners[None])
        on = (np.arange(graspable_objects.SUPERQUADRIC_VERTICES) == faces[:, :, None]).any(1)
        assert (beneath[~on] > 1e-8).all(), seed
        assert np.abs(beneath[on]).max() < 1e-8


TYPES = ("BOX", "CYLINDER", "SPHERE", "ELLIPSOID", "CAPSULE", "MESH")


@each_kind
def test_every_kind_compiles_to_its_shape(kind: int) -> None:
    of = model(kind=float(kind))
    assert of.geom("object").type[0] == getattr(mujoco.mjtGeom, f"mjGEOM_{TYPES[kind]}")
    assert of.geom("object").friction[0] == EASY["friction"]
    assert of.geom("object").condim[0] == 6
    assert of.geom("object").rgba[:3] == pytest.approx(graspable_objects.KIND_COLOURS[kind])


@each_kind
def test_a_shape_is_written_in_full_whatever_was_there_before(kind: int) -> None:
    """One spec serves all tasks, one after the other."""
    spec, fresh = SHAPES.spec(), model(kind=float(kind))
    for other in (*KINDS, *reversed(KINDS)):
        graspable_objects.edit_object(
            spec,
            {
                **EASY,
                "kind": float(other),
                "shape_seed": 3.0,
                "mass": 0.1,
                "width": 0.04,
                **UNBALANCED,
            },
        )
        compile_spec(spec)
        graspable_objects.edit_object(spec, {**EASY, "kind": float(kind)})
        again = compile_spec(spec)
        for field in (
            "geom_type",
            "geom_size",
            "geom_pos",
            "geom_quat",
            "geom_friction",
            "mesh_vert",
            "site_pos",
        ):
            assert (getattr(again, field) == getattr(fresh, field)).all(), field
        for field in ("body_mass", "body_inertia", "body_ipos", "body_iquat"):
            assert (getattr(again, field) == getattr(fresh, field)).all(), field


def test_all_kinds_live_in_one_batch() -> None:
    tasks = [{**EASY, "kind": float(k), "shape_seed": float(s)} for s in (0, 1, 999) for k in KINDS]
    env = Env(SHAPES, tasks, threads=1)
    for _ in range(5):
        step = env.step(torch.zeros(len(tasks), env.act_dim))
        assert not (step.faulted | step.terminated | ~step.obs.isfinite().all(1)).any()
    env.set_tasks(tasks[1:] + tasks[:1])
    env.reset(0)
    assert not env.step(torch.zeros(len(tasks), env.act_dim)).faulted.any()
    alone = Env(SHAPES, tasks[2:3], threads=1)
    env.set_tasks(tasks[2:3] * len(tasks))
    assert torch.equal(env.reset(3)[:1], alone.reset(3))


@each_kind
def test_a_balanced_object_lives_in_a_batch_with_others(kind: int) -> None:
    task = {**EASY, "kind": float(kind), "room": 2.5}
    tasks = [
        task | {"centre_x": x, "centre_y": y} for x, y in ((0.3, -0.2), (0.0, 0.0), (0.0, 0.1))
    ]
    for order in (tasks, tasks[::-1], tasks[1:]):
        env = Env(MIX, order, threads=1)
        assert not env.step(torch.zeros(len(order), env.act_dim)).faulted.any()


@each_kind
def test_an_object_weighs_what_the_task_says(kind: int) -> None:
    for mass in (0.05, 0.3, 0.8):
        for balance in ({}, UNBALANCED):
            assert model(kind=float(kind), mass=mass, **balance).body("object").mass[
                0
            ] == pytest.approx(mass, rel=1e-9)


@each_kind
def test_an_object_is_balanced_unless_the_task_says_otherwise(kind: int) -> None:
    half = EASY["width"] / 2
    long = half * EASY["length"]
    even, odd = model(kind=float(kind)), model(kind=float(kind), **UNBALANCED)
    off = [0.2 * UNBALANCED["centre_x"] * long, 0.2 * UNBALANCED["centre_y"] * half, 0]
    assert even.body("object").ipos == pytest.approx([0, 0, 0], abs=1e-4)
    assert odd.body("object").ipos == pytest.approx(off, abs=1e-4)


@each_kind
def test_what_shapes_a_task_is_part_of_its_key(kind: int) -> None:
    models, task = TaskModels(MIX), {**EASY, "kind": float(kind), "room": 2.5, **UNBALANCED}
    key = models.key(MIX.space.coerce(task))
    assert models.key(MIX.space.coerce({**task, "room": 2.9})) == key
    for name in set(task) - {"room", "kind"}:
        other = {**task, name: 0.9 * task[name] if name != "shape_seed" else 8.0}
        assert models.key(MIX.space.coerce(other)) != key, name


def nearest(of: mujoco.MjModel, height: float) -> list[float]:
    """How far the object's contacts with the table are apart, m, with its middle so high and the
    arm out of the way."""
    data = mujoco.MjData(of)
    data.qpos[-7:] = [0.5, 0.3, height, 1, 0, 0, 0]
    data.qpos[:7] = 0
    mujoco.mj_forward(of, data)
    names = [{of.geom(int(g)).name for g in c.geom} for c in data.contact]
    return [c.dist for c, n in zip(data.contact, names, strict=True) if n == {"object", "table"}]


SIZES = [
    {},
    {"height": 0.04},
    {"width": 0.064, "height": 0.041},
    {"width": 0.03, "length": 1.5, "height": 0.08},
]


@each_kind
def test_an_object_rests_as_high_as_its_shape_says(kind: int) -> None:
    for i, size in enumerate(SIZES):
        task = {**EASY, "kind": float(kind), "shape_seed": float(i), **size}
        of = model(**task)
        low = float(
            graspable_objects.resting_height({k: torch.tensor(v).double() for k, v in task.items()})
        )
        assert of.site("bottom").pos == pytest.approx([0, 0, -low])
        assert nearest(of, low + 2e-5) == []
        assert min(nearest(of, low - 1e-4)) == pytest.approx(-1e-4, abs=1e-5)


def test_a_task_without_a_kind_is_a_box() -> None:
    task = {"width": torch.tensor([0.05]), "height": torch.tensor([0.07])}
    assert graspable_objects.resting_height(task).tolist() == pytest.approx([0.035])
    of = model(**{"width": 0.05, "height": 0.07})
    assert of.geom("object").size == pytest.approx([0.03, 0.025, 0.035])


@cache
def lain() -> tuple[Env, torch.Tensor]:
    """Objects of all kinds and sizes after a second beside a still arm, and where they had been
    put."""
    rng = np.random.default_rng(0)
    drawn = SHAPES.space.sample("train", 60, 0)
    tasks = [
        {**t.as_dict(), "kind": float(i % 6), "shape_seed": float(rng.integers(1000))}
        for i, t in enumerate(drawn)
    ]
    env = Env(SHAPES.replace(terminate=None), tasks, threads=1)
    put = env.state.qpos[:, -7:].clone()
    for _ in range(round(env.control_hz)):
        env.step(torch.zeros(env.worlds, env.act_dim))
    return env, put


@each_kind
def test_an_object_that_is_put_down_rests(kind: int) -> None:
    env, put = lain()
    moved = (env.state.qpos[:, -7:-4] - put[:, :3])[kind::6]
    assert moved[:, 2].abs().max() < 1e-3
    assert moved[:, :2].norm(dim=1).max() < 2e-3
    for world in range(kind, env.worlds, 6):
        of, data = env.sim.snapshot(world)
        touching = [c for c in data.contact if of.geom("object").id in c.geom]
        assert touching, "it lies on the table"
        assert min(c.dist for c in touching) > -1e-3
        assert all(c.friction[0] == env.tasks[world]["friction"] for c in touching), (
            "the object's friction counts"
        )


def test_objects_are_put_down_at_different_places_within_reach() -> None:
    _, put = lain()
    assert ((put[:, :2] - torch.tensor([0.5, 0.0])).abs() <= 0.05).all()
    assert (put[:, :2].std(0) > 0.02).all()
    yaw = 2 * torch.atan2(put[:, 6], put[:, 3])
    assert yaw.abs().max() <= 0.5
    assert yaw.std() > 0.2


BAD = [
    (name, value)
    for name in ("width", "height", "length", "mass")
    for value in (0.0, -0.05, float("nan"))
]


def refused(call: Callable[[], Any], value: float) -> None:
    """In one line that names the value."""
    with pytest.raises(MetarobotError) as error:
        call()
    assert "\n" not in str(error.value)
    assert re.search(rf"(?<![\w.-]){value:g}(?![\w.])", str(error.value)), error.value


WIDER = [
    ("width", float("inf")),
    ("width", 0.081),
    ("length", 4.0),
    ("friction", 0.0),
    ("kind", 6.0),
]
"""Than the hand's stroke of 0.08 m, and what else cannot be grasped."""


@pytest.mark.parametrize(("name", "value"), [*BAD, *WIDER])
def test_a_family_refuses_an_object_that_cannot_be(name: str, value: float) -> None:
    refused(lambda: Env(SHAPES, [{**EASY, name: value}], threads=1), value)


@pytest.mark.parametrize(("name", "value"), BAD)
def test_an_object_that_cannot_be_is_not_built(name: str, value: float) -> None:
    for kind in KINDS:
        refused(lambda kind=kind: model(**{"kind": float(kind), name: value}), value)
