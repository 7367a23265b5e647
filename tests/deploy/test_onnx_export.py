import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from helpers import run as command
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from metarobot.bridge.policy.metadata import HASH_KEY, PolicyMetadata, flatten
from metarobot.bridge.policy.onnx_file_check import EXPORTED_OPERATORS
from metarobot.bridge.policy.onnx_policy import OnnxPolicy
from metarobot.deploy import onnx_export as exporting
from metarobot.deploy.onnx_export import (
    TOLERANCE,
    ExportError,
    ParityCheck,
    convert,
    describe,
    export,
    parity,
)
from metarobot.env.base import Env
from metarobot.envs.robots import go2
from metarobot.files import read_json
from metarobot.training.run_folder import Run, open_run
from metarobot.types import Percept

ROOT = Path(__file__).parents[2]
Exported = Callable[[str], tuple[Run, Path]]
ALL = ["obs", "action_in", "reward_in", "done_in", "first_in"]


@pytest.mark.parametrize(
    ("name", "reads", "answers", "adapts"),
    [
        ("rl2", [*ALL, "h_in"], ["actions", "h_out"], "acting"),
        pytest.param("gru", [*ALL, "h_in"], ["actions", "h_out"], "acting", marks=pytest.mark.slow),
        ("lstm", [*ALL, "h_in", "c_in"], ["actions", "h_out", "c_out"], "acting"),
        ("blind", ["obs"], ["actions"], "none"),
        ("maml", ["obs", "weights_in", "noise_in"], ["actions"], "between"),
        ("varibad", [*ALL, "h_in"], ["actions", "h_out", "mean_out", "variance_out"], "acting"),
        pytest.param(
            "pearl",
            ["obs", "done_in", "first_in", "mean_in", "z_in"],
            ["actions", "z_out"],
            "between",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "Placement-imitation",
            ["obs", "weights_in"],
            ["actions"],
            "none",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_each_kind_of_agent_acts_as_it_did(
    exported: Exported, name: str, reads: list[str], answers: list[str], adapts: str
) -> None:
    run, folder = exported(name)
    meta, told = PolicyMetadata.load(folder), read_json(folder / "policy.json")
    assert (list(meta.inputs), list(meta.outputs), meta.adapts) == (reads, answers, adapts)
    assert meta.trial.episodes == run.config["agent_config"]["episodes"]
    assert told["parity"]["difference"] <= TOLERANCE
    assert told["parity"]["steps"] == 2 * meta.trial.episodes * meta.trial.horizon
    assert sorted(p.name for p in folder.iterdir()) == ["policy.json", "policy.onnx"]


def test_a_trial_by_hand_gives_the_same_actions(exported: Exported) -> None:
    run, folder = exported("lstm")
    agent, policy, episodes = run.load_agent(), OnnxPolicy.load(folder), 2
    assert float((agent.norm.scale - 1).abs().max()) > 0.1
    env = Env(run.family, run.family.space.sample("test", 1), seed=5, threads=1)
    obs, context = env.reset(5), agent.begin(1)
    action, reward, done, first = torch.zeros(1, env.act_dim), *torch.tensor([[0.0], [0.0], [1.0]])
    policy.begin()
    for _ in range(episodes * run.family.horizon):
        with torch.no_grad():
            action, context = agent.act(Percept(obs, action, reward, done, first), context)
        sent = policy.act(obs[0].numpy(), float(reward), bool(done))
        np.testing.assert_allclose(sent, action[0].clamp(-1, 1), atol=TOLERANCE)
        step = env.step(torch.from_numpy(sent)[None])
        obs, reward, done, first = (
            step.obs,
            step.reward,
            (step.terminated | step.truncated).float(),
            torch.zeros(1),
        )
    for kept, tensor in zip(policy.context().values(), context, strict=True):
        np.testing.assert_allclose(kept, tensor, atol=TOLERANCE)


def check(run: Run, policy: OnnxPolicy, agent: Any = None) -> None:
    parity(agent or run.load_agent(), policy, run.family, tasks=1, seed=0, tick=lambda: None)


def without_norm(agent: Any, policy: OnnxPolicy) -> None:
    agent.norm.scale.fill_(1.0)


def without_memory(agent: Any, policy: OnnxPolicy) -> None:
    del policy._carried[1]


def deaf_to_boundaries(agent: Any, policy: OnnxPolicy) -> None:
    act = policy.act
    policy.act = lambda obs, reward, done, noise=None: act(obs, reward, False, noise)  # type: ignore[method-assign]


@pytest.mark.parametrize("mutate", [without_norm, without_memory, deaf_to_boundaries])
def test_what_is_left_out_is_found(
    exported: Exported, mutate: Callable[[Any, OnnxPolicy], None]
) -> None:
    run, folder = exported("lstm")
    agent, policy = run.load_agent(), OnnxPolicy.load(folder)
    check(run, policy, agent)
    mutate(agent, policy)
    with pytest.raises(
        ExportError,
        match=r"differs from torch's by [\d.e-]+ at step \d+ of a trial, more than 1e-05",
    ):
        check(run, policy, agent)


def test_a_weight_that_is_off_by_a_little_is_found(exported: Exported) -> None:
    run, folder = exported("rl2")
    model = onnx.load(folder / "policy.onnx")
    bias = next(i for i in model.graph.initializer if list(i.dims) == [6])
    bias.CopyFrom(
        onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32(3e-5), bias.name)
    )
    with pytest.raises(ExportError, match=r"by 3e-05 at step 0 of"):
        check(run, OnnxPolicy(PolicyMetadata.load(folder), model.SerializeToString()))


def test_a_step_that_is_no_number_is_found(exported: Exported) -> None:
    run, folder = exported("rl2")
    agent = run.load_agent()
    agent.actor[0].bias.data.fill_(torch.nan)
    with pytest.raises(ExportError, match="by nan at step 0"):
        check(run, OnnxPolicy.load(folder), agent)


def test_the_exported_agent_takes_over_what_was_learned(exported: Exported) -> None:
    run, folder = exported("maml")
    policy = OnnxPolicy.load(folder)
    both = ParityCheck(run.load_agent(), policy, exported_leads=True)
    env = Env(run.family, run.family.space.sample("train", 1), threads=1)
    before = both.begin(1)
    np.testing.assert_array_equal(policy.context()["weights"], before[0])
    from metarobot.training.collect import collect

    collect(both, env, env.tasks, episodes=2, seed=0)
    assert both.learned
    assert not np.array_equal(policy.context()["weights"], before[0])


def test_a_check_that_fails_leaves_what_was_there(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder = exported("blind")
    shutil.copytree(folder, tmp_path / "policy")
    before = (tmp_path / "policy" / "policy.onnx").read_bytes()
    monkeypatch.setattr(exporting, "TOLERANCE", -1.0)
    with pytest.raises(ExportError, match="nothing was exported"):
        export(run, tmp_path / "policy", tasks=1)
    assert (tmp_path / "policy" / "policy.onnx").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]


def test_a_policy_gives_way_to_a_newer_one(exported: Exported, tmp_path: Path) -> None:
    run, _ = exported("blind")
    shutil.copytree(exported("rl2")[1], tmp_path / "policy")
    assert (
        export(run, tmp_path / "policy", tasks=1)["agent"]
        == PolicyMetadata.load(tmp_path / "policy").agent
        == "blind"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]


def test_refusals_are_one_line(
    runs: dict[str, Run],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    for words, line in [
        (
            [str(runs["oracle"].folder), "--out", str(tmp_path / "x")],
            "oracle is an oracle: it is shown the task",
        ),
        ([str(runs["blind"].folder), "--out", str(tmp_path / "mine")], "is no policy folder"),
        ([str(runs["blind"].folder), "--out", str(tmp_path / "file")], "is no policy folder"),
        ([str(runs["blind"].folder), "--out", str(tmp_path / "file" / "x")], "cannot write"),
        (
            [str(runs["blind"].folder), "--out", str(tmp_path / "x"), "--tasks", "0"],
            "tasks must be at least 1",
        ),
        (
            [str(runs["blind"].folder), "--out", str(tmp_path / "x"), "--robot", "a.xml"],
            "has no other robot",
        ),
        (["nobody", "--out", str(tmp_path / "x")], "no run folder 'nobody'"),
    ]:
        code, _, err = command(capsys, "export", *words)
        assert (code, err.count("\n")) == (2, 1)
        assert line in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "mine"]
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_the_command_says_what_it_found(
    runs: dict[str, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = command(
        capsys, "export", str(runs["blind"].folder), "--out", str(tmp_path / "p"), "--tasks", "1"
    )
    assert code == 0
    assert "of torch's over 400 steps" in out


def test_a_quadruped_tells_its_drives_what_it_was_trained_with() -> None:
    run = open_run("QuadrupedMix-rl2")
    meta = describe(run, run.load_agent())
    assert meta["joint_names"] == meta["action"]["names"] == list(go2.JOINTS)
    assert set(meta["joint_stiffness"]) == {25.0}
    assert set(meta["joint_damping"]) == {0.5}
    assert meta["default_joint_pos"] == go2.DEFAULT_POSE.tolist()
    assert set(meta["action_scale"]) == {0.25}
    assert meta["limits"]["RL_calf"] == {
        "low": -2.7227,
        "high": -0.83776,
        "velocity": 15.7,
        "torque": 45.43,
    }
    assert (meta["control_hz"], meta["trial"], meta["layout"]) == (
        50.0,
        {"horizon": 200, "episodes": 2, "rollouts": 1},
        "legged",
    )
    assert meta["command_names"] == ["command_x_m/s", "command_y_m/s", "command_turn_rad/s"]
    assert meta["reward"]["weights"] == dict(run.family.weights)
    assert meta["run_path"] == "QuadrupedMix-rl2"


def test_metadata_in_the_model_say_the_same_at_full_precision(exported: Exported) -> None:
    run, folder = exported("maml")
    told = read_json(folder / "policy.json")
    inside = {p.key: p.value for p in onnx.load(folder / "policy.onnx").metadata_props}
    assert {k.partition(".")[0] for k in inside} == told.keys() - {
        "sha256",
        HASH_KEY,
        "limits",  # there are none
    }
    assert [float(x) for x in inside["context.weights.begin"].split(",")] == told["context"][0][
        "begin"
    ][0]
    weights = np.array(told["context"][0]["begin"], np.float32)
    np.testing.assert_array_equal(weights, run.load_agent().begin(1)[0])
    assert inside["observation_names"].split(",") == told["observation_names"]
    assert (inside["control_hz"], inside["trial.horizon"], inside["explores"]) == (
        "20.0",
        "100",
        "true",
    )
    assert (inside["inputs.noise_in.shape"], inside["context.weights.out"]) == ("1,6", "null")


def test_a_policy_folder_tells_nothing_of_the_machine(exported: Exported) -> None:
    run, folder = exported("maml")
    assert run.folder.is_absolute()
    names = (str(Path.home()), str(run.folder.parent), socket.gethostname(), str(ROOT))
    for file in folder.iterdir():
        data = file.read_bytes()
        for name in names:
            assert name.encode() not in data, (file.name, name)
    assert read_json(folder / "policy.json")["run_path"] == run.folder.name


def test_a_run_in_the_working_folder_is_found_from_there(
    runs: dict[str, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs["blind"]
    monkeypatch.chdir(run.folder.parent.parent)
    path = describe(run, run.load_agent())["run_path"]
    assert path == f"{run.folder.parent.name}/{run.folder.name}"
    assert open_run(path).folder.resolve() == run.folder.resolve()


def test_the_exporter_uses_no_operator_that_the_robot_refuses(exported: Exported) -> None:
    for name in ("lstm", "maml", "varibad"):
        model = onnx.load(exported(name)[1] / "policy.onnx")
        assert {node.op_type for node in model.graph.node} <= EXPORTED_OPERATORS


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1))
def test_numbers_survive_the_metadata_exactly(numbers: list[float]) -> None:
    word = flatten({"joint_stiffness": numbers})["joint_stiffness"]
    assert [float(x) for x in word.split(",")] == numbers


class Odd(nn.Module):
    """Its context: a counter of whole numbers, something that only adapting reads, and a sum."""

    privileged = explores = False

    def begin(self, worlds: int, task: Tensor | None = None) -> tuple[Tensor, ...]:
        return (
            torch.zeros(worlds, dtype=torch.int64),
            torch.full((worlds, 2), 7.0),
            torch.zeros(worlds, 3),
        )

    def act(
        self, percept: Percept, context: Any, noise: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        count, aside, total = context
        total = total + percept.obs[:, :3] * count[:, None] * 1e-3
        return torch.cat([total, total.sin()], 1), (count + 1, aside, total)

    def adapt(self, context: Any, episode: Any) -> Any:
        return context


class Whim(Odd):
    def act(
        self, percept: Percept, context: Any, noise: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        return (
            percept.obs[:, :6] if float(percept.obs.sum()) > 0 else percept.obs[:, 6:12]
        ), context


def test_any_context_travels(exported: Exported, runs: dict[str, Run]) -> None:
    run = runs["rl2"]
    with torch.no_grad():
        model, meta = convert(Odd(), describe(run, Odd()))
    counter, aside, total = meta["context"]
    assert (counter["in"], counter["out"], total["in"]) == (
        "context_0_in",
        "context_0_out",
        "context_2_in",
    )
    assert (aside["in"], aside["out"], aside["begin"]) == (None, None, [[7.0, 7.0]])
    policy = OnnxPolicy(PolicyMetadata.parse({**meta, "sha256": ""}), model.SerializeToString())
    check(run, policy, Odd())
    assert policy.context()["context_0"] == 200


def test_a_step_that_onnx_has_no_words_for_is_refused(
    exported: Exported, runs: dict[str, Run]
) -> None:
    with (
        pytest.raises(ExportError, match="this agent's step has no ONNX form") as caught,
        torch.no_grad(),
    ):
        convert(Whim(), describe(runs["rl2"], Whim()))
    assert "\n" not in str(caught.value)
