"""That nothing of a family is tied to the CPU, seen without a GPU: torch's ``meta`` device refuses
to mix."""

import importlib.util
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from helpers import run

from metarobot.env.base import Env
from metarobot.learning.linear_recurrence import linear_scan
from metarobot.tasks.family import Family, WorldState, families
from metarobot.types import constant_like


def elsewhere(env: Env) -> WorldState:
    """The present moment of an environment, on a device that holds no numbers, in the float32 of a
    GPU."""
    now = env.snapshot

    def moved(x: Any) -> Any:
        return x.to("meta", torch.float32 if x.is_floating_point() else x.dtype)

    task = {k: moved(v) for k, v in now.task.items()}
    state = WorldState(
        *(moved(x) for x in now[:4]), task, moved(now.statistics), moved(now.variant)
    )
    return (
        state
        if env.family.interaction.derive is None
        else state._replace(derived=env.family.interaction.derive(state))
    )


@pytest.mark.parametrize("name", families.names())
def test_a_familys_functions_stay_on_the_device_and_in_its_precision(name: str) -> None:
    family: Family = families.get(name)
    env = Env(family, family.space.sample("train", 3, 0), threads=1)
    state = elsewhere(env)
    seen = {"observe": family.observe(state)}
    if family.teaching.critic_observe is not None:
        seen["critic_observe"] = family.teaching.critic_observe(state)
    if family.interaction.terminate is not None:
        seen["terminate"] = family.interaction.terminate(state)
    if family.interaction.statistics is not None:
        seen |= {
            "begin": family.interaction.statistics.begin(state),
            "count": family.interaction.statistics.update(state, state),
        }
    if family.interaction.controller is not None:
        told = env.sim.bind("ctrl").to("meta", torch.float32)
        seen |= {
            "targets": family.interaction.controller.targets(state, state.action, told),
            "rest": family.interaction.controller.rest(state.qpos),
        }
    for program in filter(None, (family.teaching.expert, family.teaching.teacher_action)):
        seen[program.__name__] = program(state)
    seen |= family.reward(state, state, env.dt)
    seen |= family.display.readout(state, state, env.dt)
    for key, value in seen.items():
        assert value.is_meta, key
        assert value.dtype in (torch.float32, torch.bool), key


def test_a_constant_is_copied_to_a_device_once() -> None:
    constant, x = torch.arange(3.0), torch.zeros(2, device="meta")
    assert constant_like(constant, constant) is constant
    assert constant_like(constant, x) is constant_like(constant, x)
    assert constant_like(constant, x.double()).dtype == torch.float64


def test_without_a_gpu_cuda_is_refused_in_a_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    code, _, err = run(
        capsys, "train", "CheetahVel", "--device", "cuda", "--out", str(tmp_path / "x")
    )
    assert code == 2
    assert (
        "CUDA; use --device cpu" in err
        or "torch finds no CUDA device here; use --device cpu" in err
    )
    assert not (tmp_path / "x").exists()


FUSED = """
import torch
from metarobot.learning.linear_recurrence import _FusedScan, linear_scan
torch.manual_seed(0)
for time, lanes in ((1, 3), (7, 130), (40, 260)):
    a, b = torch.rand(time, lanes).requires_grad_(), torch.randn(time, lanes).requires_grad_()
    weight = torch.randn(time, lanes)
    outs = [linear_scan(a, b), _FusedScan.apply(a, b)]
    slopes = [torch.autograd.grad((h * weight).sum(), (a, b)) for h in outs]
    for one, other in zip((outs[0], *slopes[0]), (outs[1], *slopes[1])):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
print("the same")
"""


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install triton"
)
def test_the_gpus_kernel_of_the_recurrence_equals_the_cpus_as_triton_interprets_it() -> None:
    said = subprocess.run(
        [sys.executable, "-c", FUSED],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert "the same" in said.stdout, said.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_the_recurrence_on_the_gpu_equals_the_cpus() -> None:
    torch.manual_seed(0)
    a, b, weight = torch.rand(400, 64, 128), torch.randn(400, 64, 128), torch.randn(400, 64, 128)
    found = []
    for device in ("cpu", "cuda"):
        x, y = (v.to(device).requires_grad_() for v in (a, b))
        h = linear_scan(x, y)
        found.append(
            [v.cpu() for v in (h, *torch.autograd.grad((h * weight.to(device)).sum(), (x, y)))]
        )
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("time", [1, 2, 7, 50])
def test_the_recurrence_equals_a_loop_over_time(time: int) -> None:
    torch.manual_seed(0)
    a, b = (
        torch.rand(time, 2, 3).double().requires_grad_(),
        torch.randn(time, 2, 3).double().requires_grad_(),
    )
    h, states = torch.zeros(2, 3).double(), []
    for t in range(time):
        h = a[t] * h + b[t]
        states.append(h)
    torch.testing.assert_close(linear_scan(a, b), torch.stack(states))
    assert torch.autograd.gradcheck(linear_scan, (a, b))
