import mujoco
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metarobot.env.base import Env
from metarobot.envs.robots import go2
from metarobot.envs.scenery import terrain
from metarobot.tasks.family import families
from metarobot.tasks.model_edits import compile_spec
from metarobot.tasks.task_models import TaskModels

KINDS = range(len(terrain.TERRAIN_KINDS))
GRID = np.linspace(-terrain.HALF_LENGTH, terrain.HALF_LENGTH, terrain.CELLS)
Y, X = np.meshgrid(GRID, GRID, indexing="ij")
FAR = np.hypot(X, Y)
SEEN = np.array([1, 1, 1, 0, 0, 0], np.uint8)
kinds, seeds, roughnesses = st.sampled_from(KINDS), st.integers(0, 2**31), st.floats(1e-3, 0.5)


@given(kinds, seeds, roughnesses)
@settings(max_examples=40, deadline=None)
def test_the_same_seed_gives_the_same_ground_and_another_seed_another(
    kind: int, seed: int, roughness: float
) -> None:
    ground = terrain.heights(kind, roughness, seed)
    assert (terrain.heights(kind, roughness, seed) == ground).all()
    assert (terrain.heights(kind, roughness, seed + 1) != ground).any()
    for other in KINDS:
        assert other == kind or (terrain.heights(other, roughness, seed) != ground).any()


@given(kinds, seeds, roughnesses)
@settings(max_examples=40, deadline=None)
def test_ground_stays_within_its_roughness_and_is_level_where_the_robot_starts(
    kind: int, seed: int, roughness: float
) -> None:
    ground = terrain.heights(kind, roughness, seed)
    assert ground.shape == (terrain.CELLS, terrain.CELLS)
    assert ground.dtype == np.float64
    assert abs(ground).max() <= roughness / 2 + 1e-12
    assert np.ptp(ground) > 0.8 * roughness
    assert (ground[FAR < 0.35] == 0).all()
    assert ground == pytest.approx(roughness * terrain.heights(kind, 1.0, seed), abs=1e-12)


@given(kinds, seeds)
@settings(max_examples=20, deadline=None)
def test_ground_without_roughness_is_level(kind: int, seed: int) -> None:
    assert (terrain.heights(kind, 0.0, seed) == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_ground_is_rough_all_over(kind: int) -> None:
    ground = terrain.heights(kind, 0.1, 3)
    for rows in np.split(np.arange(terrain.CELLS), 6):
        for columns in np.split(np.arange(terrain.CELLS), 6):
            assert np.ptp(ground[np.ix_(rows, columns)]) > 0.02


def test_the_ground_is_level_where_robots_start() -> None:
    """Starts press feet no deeper into the roughest ground than into level ground."""
    family = families.get("QuadrupedTerrain")
    tasks = [t.as_dict() for t in family.space.sample("train", 40, 0)]
    deepest = []
    for roughness in (0.02, 0.12):
        env = Env(family, [{**t, "roughness": roughness} for t in tasks], threads=1)
        deepest.append(
            [
                min(data.contact.dist, default=0.0)
                for _, data in map(env.sim.snapshot, range(env.worlds))
            ]
        )
    assert np.subtract(*deepest).max() < 2e-3


def level() -> mujoco.MjSpec:
    return terrain.add_height_field(go2.go2())


def height(model: mujoco.MjModel, x: float, y: float) -> float:
    """Height of the floor at a place, by a ray from above; just off the point, as a ray may slip
    between triangles."""
    data, hit = mujoco.MjData(model), np.zeros(1, np.int32)
    mujoco.mj_kinematics(model, data)
    above = np.array([x + 1e-6, y + 2e-6, 2.0])
    far = mujoco.mj_ray(
        model, data, above, np.array([0, 0, -1.0]), SEEN, 1, model.body("base").id, hit, None
    )
    assert hit[0] == model.geom("floor").id
    return 2.0 - far


def places(seed: int, number: int = 25) -> list[tuple[int, int]]:
    """Points of the grid, away from its edge and from the robot."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(1, terrain.CELLS - 1, (4 * number, 2))
    return [(i, j) for i, j in drawn.tolist() if FAR[i, j] > 1][:number]


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_the_compiled_floor_has_these_heights(kind: int, seed: int) -> None:
    spec = level()
    for roughness in (0.3, 0.05):
        ground = terrain.heights(kind, roughness, seed)
        terrain.set_heights(spec, ground)
        model = compile_spec(spec)
        for i, j in places(seed):
            assert height(model, GRID[j], GRID[i]) == pytest.approx(ground[i, j], abs=1e-3)


@pytest.mark.parametrize("roughness", [0.0, 1e-9, 1e-4, 5e-4])
def test_almost_level_ground_compiles_too(roughness: float) -> None:
    spec = level()
    terrain.set_heights(spec, ground := terrain.heights(2, roughness, 0))
    model = compile_spec(spec)
    for i, j in places(0, 5):
        assert height(model, GRID[j], GRID[i]) == pytest.approx(ground[i, j], abs=1e-3)


def test_the_floor_is_level_until_it_is_shaped() -> None:
    model = compile_spec(level())
    assert all(
        height(model, GRID[j], GRID[i]) == pytest.approx(0, abs=1e-3) for i, j in places(0, 5)
    )


@pytest.mark.parametrize("name", ["QuadrupedTerrain", "QuadrupedMix"])
def test_a_tasks_model_has_the_tasks_ground(name: str) -> None:
    family = families.get(name)
    models = TaskModels(family)
    for task in family.space.sample("train", 3, 0) + family.space.sample("extrapolate", 3, 0):
        ground = terrain.heights(int(task["terrain"]), task["roughness"], int(task["terrain_seed"]))
        model = models.compile(task)
        assert model.geom("floor").friction[0] == task["friction"]
        for i, j in places(1, 10):
            assert height(model, GRID[j], GRID[i]) == pytest.approx(ground[i, j], abs=1e-3)


def test_tasks_on_other_ground_have_other_models_and_on_the_same_the_same() -> None:
    family = families.get("QuadrupedTerrain")
    task = family.space.sample("train", 1, 0)[0].as_dict()
    env = Env(family, [task], threads=1)
    same = {**task, "command_x": 0.5}
    others = [
        {**task, "terrain_seed": (task["terrain_seed"] + 1) % 100},
        {**task, "roughness": 0.05},
    ]
    first, again, *rest = (env.model(family.space.coerce(t)) for t in (task, same, *others))
    assert again is first
    assert all(
        (m.hfield_data != first.hfield_data).any() or m.hfield_size[0, 2] != first.hfield_size[0, 2]
        for m in rest
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_ball_comes_to_rest_on_the_ground_it_is_dropped_on(kind: int) -> None:
    """Collisions see the same floor as rays."""
    spec = level()
    terrain.set_heights(spec, terrain.heights(kind, 0.1, 5))
    spec.geom("floor").friction[0] = 2.0
    rng = np.random.default_rng(0)
    for k in range(8):
        x, y = rng.uniform(-4, 4, 2)
        post = spec.worldbody.add_body(name=f"post{k}", pos=[x, y, 1])
        post.add_joint(
            name=f"post{k}", type=mujoco.mjtJoint.mjJNT_SLIDE, axis=[0, 0, 1], damping=[2, 0, 0]
        )
        post.add_geom(
            name=f"post{k}",
            size=[go2.FOOT_RADIUS, 0, 0],
            mass=0.1,
            contype=2,
            conaffinity=1,
            group=3,
        )
    model = compile_spec(spec)
    data = mujoco.MjData(model)
    data.qpos[:4] = [0, 0, 5, 1]
    mujoco.mj_step(model, data, 800)
    for k in range(8):
        x, y, z = data.body(f"post{k}").xpos
        assert -2e-3 < z - go2.FOOT_RADIUS - height(model, x, y) < go2.FOOT_RADIUS
