"""MuJoCo Warp on Warp's CPU device: the physics of the CPU backend to the precision of float32."""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from metarobot.env.base import Env
from metarobot.sim.cpu import CpuSim
from metarobot.tasks.family import families
from metarobot.tasks.space import Task
from metarobot.training.collect import collect
from metarobot.training.run_folder import build_learner

mjw = pytest.importorskip("mujoco_warp")

from metarobot.agents.ppo import PPOConfig  # noqa: E402
from metarobot.env.device import DeviceEnv, measure_buffer_sizes  # noqa: E402
from metarobot.sim import warp  # noqa: E402
from metarobot.sim.warp import BufferSizes, WarpError  # noqa: E402

DEVICE = os.environ.get("METAROBOT_WARP_DEVICE", "cpu")
"""Warp's device; scripts/gpu_report.sh says cuda."""
WarpSim = partial(warp.WarpSim, device=DEVICE)
FAST = ("CheetahTerrain", "QuadrupedDamage")
"""Families of the fast suite: Warp compiles its kernels for each, some minutes for all of them."""
UNSUPPORTED = {
    "HumanoidDir": "mjSOL_PGS",
    **dict.fromkeys(("GraspMix", "GraspShapes", "Placement", "PlacementShown"), "geom_type"),
}
SLOW = [n for n in families.names() if n not in (*FAST, *UNSUPPORTED)]
ONE, FIFTY = (
    {"GraspFragile": 1e-3},
    {"AntDir": 0.5, "AntGoal": 0.5, "QuadrupedMix": 0.5, "QuadrupedTerrain": 0.5},
)
"""How far joint positions may be apart, rad or m, after one control step and after 50 physics
steps, where that is more than 1e-5 and 1e-3: an ant integrated by Runge and Kutta meets the floor
between steps, and of a foot's contacts with a height field Warp keeps four."""


@cache
def tasks(name: str, worlds: int = 3, seed: int = 0) -> list[Task]:
    return families.get(name).space.sample("train", worlds, seed)


@cache
def models(name: str, seed: int = 0) -> list[Any]:
    env = Env(families.get(name), tasks(name, seed=seed), threads=1)
    return [env.model(t) for t in env.tasks]


def both(name: str) -> tuple[CpuSim, warp.WarpSim, Tensor]:
    """The two backends at the same starts; and actions to move them by."""
    family = families.get(name)
    env = Env(family, tasks(name), threads=1)
    sims = CpuSim(models(name), 1), WarpSim(models(name))
    for sim in sims:
        if models(name)[0].nsensordata:
            sim.bind("sensordata")
        sim.reset(env.state.qpos.clone(), env.state.qvel.clone())
        if family.interaction.controller is not None:
            sim.bind("ctrl").copy_(family.interaction.controller.rest(env.state.qpos))
            sim.bind("act").copy_(family.interaction.controller.rest(env.state.qpos))
    low, high = torch.from_numpy(models(name)[0].actuator_ctrlrange.T.copy())
    shape = (50, len(tasks(name)), len(low))
    return *sims, low + (high - low) * torch.rand(shape, generator=torch.Generator().manual_seed(0))


def apart(a: CpuSim, b: warp.WarpSim, field: str = "qpos") -> float:
    return float((a.bind(field) - b.bind(field).cpu()).abs().max())


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_warp_moves_as_the_cpu_does(name: str) -> None:
    cpu, device, actions = both(name)
    family = families.get(name)
    if models(name)[0].nsensordata:
        assert apart(cpu, device, "sensordata") < 1e-5
    for i in range(50 // family.substeps):
        for sim in (cpu, device):
            if family.interaction.controller is None:
                sim.bind("ctrl").copy_(actions[i])
            assert not sim.step(family.substeps).any()
        if i == 0:
            assert apart(cpu, device) < ONE.get(name, 1e-5)
    assert apart(cpu, device) < FIFTY.get(name, 1e-3)
    assert not device.overflows()


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_warp_cannot_do_is_named(name: str) -> None:
    with pytest.raises(WarpError, match=f"{UNSUPPORTED[name]}.*use --sim cpu"):
        WarpSim(models(name, seed=0) + models(name, seed=1))


def lived(sim: warp.WarpSim, steps: int = 4) -> Tensor:
    qpos, qvel = torch.zeros_like(sim.bind("qpos")), torch.full_like(sim.bind("qvel"), 0.1)
    sim.reset(qpos, qvel)
    sim.bind("ctrl").fill_(0.5)
    sim.step(steps)
    return sim.bind("qpos").clone()


def test_a_world_that_changes_its_task_is_as_one_that_had_it_from_the_start() -> None:
    name = FAST[0]
    sim, other = WarpSim(models(name)), WarpSim(models(name, seed=5))
    before, there = lived(sim), lived(other)
    sim.set_models([models(name, seed=5)[2]], [2])
    changed = lived(sim)
    assert torch.equal(changed[:2], before[:2])
    assert torch.equal(changed[2], there[2])
    assert not torch.equal(changed[2], before[2])
    known = len(sim._library.rows["gravity"])
    sim.set_models([models(name)[2]], [2])
    assert torch.equal(lived(sim), before)
    assert len(sim._library.rows["gravity"]) == known


def test_worlds_are_reset_alone_by_number_or_mask() -> None:
    sim = WarpSim(models(FAST[0]))
    lived(sim)
    before, start = sim.bind("qpos").clone(), torch.ones_like(sim.bind("qpos"))
    sim.reset(start[:1], start[:1], [1])
    assert torch.equal(sim.bind("qpos")[[0, 2]], before[[0, 2]])
    assert torch.equal(sim.bind("qpos")[1], start[1])
    assert sim.bind("time")[1] == 0
    assert sim.bind("time")[0] > 0
    sim.reset(2 * start, start, torch.tensor([False, False, True], device=start.device))
    assert torch.equal(sim.bind("qpos")[2], 2 * start[2])
    assert torch.equal(sim.bind("qpos")[1], start[1])


def test_broken_physics_of_one_world_is_seen_there_and_harms_no_other() -> None:
    sim = WarpSim(models(FAST[0]))
    sound = lived(sim)
    lived(sim, 0)
    sim.bind("ctrl").fill_(0.5)
    sim.bind("qvel")[1] = float("nan")
    assert sim.step(4).tolist() == [False, True, False]
    assert torch.equal(sim.bind("qpos")[[0, 2]], sound[[0, 2]])


def test_an_overflow_is_counted_and_ends_the_episode() -> None:
    name = "QuadrupedDamage"
    env = Env(families.get(name), tasks(name), threads=1)
    sim = WarpSim(models(name), buffer_sizes=BufferSizes(contacts=16, constraints=3))
    low = env.state.qpos.clone()
    low[:, 2] = 0.2
    sim.reset(low, env.state.qvel)
    assert sim.step(1).all()
    assert sim.overflows() == {"NEFC": 3}
    assert sim.overflows() == {}


@cache
def measured() -> BufferSizes:
    return measure_buffer_sizes(families.get("CheetahTerrain"), steps=20)


def world(family: Any, drawn: Sequence[Task], seed: int = 0) -> DeviceEnv:
    return DeviceEnv(family, drawn, device=DEVICE, seed=seed, buffer_sizes=measured())


def test_a_whole_trial_is_lived_on_the_device_and_the_same_call_gives_the_same_bits() -> None:
    family = replace(families.get("CheetahTerrain"), horizon=3)
    agent = build_learner("blind", PPOConfig(worlds=3, width=8), family, 0).agent.to(DEVICE)
    env = world(family, tasks(family.name))
    trials = [collect(agent, env, tasks(family.name), episodes=2, seed=s) for s in (1, 1, 2)]
    first, again, other = (t.episodes[1].obs for t in trials)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert trials[0].faults() == 0
    assert trials[0].steps() == 2 * 3 * 3
    assert trials[0].episodes[0].truncated[-1].all()


def test_the_device_earns_what_the_cpu_earns_from_the_same_start() -> None:
    family = families.get("CheetahTerrain")
    host, device = Env(family, tasks(family.name), threads=1), world(family, tasks(family.name))
    device.set_state(*(x.to(device.state.qpos) for x in host.state[:2]))
    for k in range(3):
        action = torch.full((3, host.act_dim), 0.3 * (-1) ** k)
        ours, theirs = device.step(action.to(device.device)), host.step(action)
        torch.testing.assert_close(ours.reward.cpu(), theirs.reward, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(ours.obs.cpu(), theirs.obs, atol=1e-3, rtol=1e-3)


def test_a_world_whose_physics_broke_waits_at_a_start_and_is_counted() -> None:
    family = replace(families.get("CheetahTerrain"), horizon=3)
    env = world(family, tasks(family.name))
    env.sim.bind("qvel")[1] = float("nan")
    step = env.step(torch.zeros(3, env.act_dim, device=env.device))
    assert step.faulted.tolist() == [False, True, False]
    assert step.terminated.tolist() == [False, True, False]
    assert step.reward[1] == 0
    assert step.obs.isfinite().all()
    assert torch.equal(env.state.qpos[1], env._parking[0][1])
    assert env.restart(1).isfinite().all()


def test_buffers_are_sized_from_what_the_robot_needs() -> None:
    assert measured().contacts > 8
    assert measured().constraints > 16
