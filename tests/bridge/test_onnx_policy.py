import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from bridging import ABOUT, LIMIT
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from policy_fuzzing import fuzz_policy

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.policy.metadata import (
    FORMAT,
    HASH_KEY,
    PolicyMetadata,
    content_digest,
    model_properties,
)
from metarobot.bridge.policy.onnx_file_check import check_onnx_file
from metarobot.bridge.policy.onnx_policy import OnnxPolicy, run_trial
from metarobot.training.run_folder import Run

ROOT = Path(__file__).parents[2]
Exported = Callable[[str], tuple[Run, Path]]


@pytest.fixture
def folder(exported: Exported, tmp_path: Path) -> Path:
    """A policy folder of one's own, of an agent with a memory of two tensors."""
    shutil.copytree(exported("lstm")[1], tmp_path / "policy")
    return tmp_path / "policy"


@pytest.fixture
def policy(exported: Exported) -> OnnxPolicy:
    return OnnxPolicy.load(exported("lstm")[1])


def observations(policy: OnnxPolicy, steps: int = 10, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(steps, len(policy.meta.observation_names)))


def acted(policy: OnnxPolicy, obs: Any) -> list[Any]:
    return [policy.act(o, 0.1, False) for o in obs]


def test_a_trial_begins_anew(policy: OnnxPolicy) -> None:
    obs = observations(policy)
    first = acted(policy, obs)
    assert not np.array_equal(first, acted(policy, obs))
    policy.begin()
    np.testing.assert_array_equal(first, acted(policy, obs))


def test_actions_are_clipped_but_the_agent_is_told_what_it_chose(exported: Exported) -> None:
    _, path = exported("rl2")
    meta, model = PolicyMetadata.load(path), (path / "policy.onnx").read_bytes()
    tight = OnnxPolicy(
        replace(meta, action=replace(meta.action, low=(-1e-3,) * 6, high=(1e-3,) * 6)), model
    )
    free, obs = OnnxPolicy(meta, model), observations(tight)
    for o in obs:
        sent, chosen = tight.act(o, 0.0, False), free.act(o, 0.0, False)
        np.testing.assert_array_equal(tight.chosen, free.chosen)
        np.testing.assert_array_equal(sent, np.clip(chosen, np.float32(-1e-3), np.float32(1e-3)))
    assert float(np.abs(tight.chosen).max()) > 1e-3


def test_what_is_returned_is_not_touched_again(policy: OnnxPolicy) -> None:
    sent = acted(policy, observations(policy))
    assert len({s.tobytes() for s in sent}) == len(sent)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
@pytest.mark.parametrize("where", ["obs", "reward"])
@pytest.mark.filterwarnings("ignore:overflow")
def test_what_is_not_finite_is_refused_and_leaves_no_trace(
    policy: OnnxPolicy, where: str, value: float
) -> None:
    obs = observations(policy)
    whole = acted(policy, obs)
    policy.begin()
    begun = acted(policy, obs[:5])
    bad = obs[5].copy()
    bad[3] = value if where == "obs" else 0.0
    with pytest.raises(
        BridgeError, match=policy.meta.observation_names[3] if where == "obs" else "the reward"
    ):
        policy.act(bad, value if where == "reward" else 0.1, False)
    np.testing.assert_array_equal(whole, begun + acted(policy, obs[5:]))


def test_an_answer_that_is_not_finite_is_refused(exported: Exported) -> None:
    _, path = exported("lstm")
    model = onnx.load(path / "policy.onnx")
    bias = next(i for i in model.graph.initializer if list(i.dims) == [6])
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(6, np.nan, np.float32), bias.name))
    policy = OnnxPolicy(PolicyMetadata.load(path), model.SerializeToString())
    before = policy.context()
    with pytest.raises(BridgeError, match="answer is not finite"):
        policy.act(observations(policy)[0], 0.0, False)
    for name, kept in policy.context().items():
        np.testing.assert_array_equal(kept, before[name])


def test_inputs_of_the_wrong_length_are_refused(policy: OnnxPolicy) -> None:
    for obs in (np.zeros(3), np.zeros((1, 17)), 0.0):
        with pytest.raises(BridgeError, match=r"obs must be of shape \(17,\)"):
            policy.act(obs, 0.0, False)


def test_noise_explores(exported: Exported) -> None:
    policy = OnnxPolicy.load(exported("maml")[1])
    obs = observations(policy)[0]
    quiet = policy.act(obs, 0.0, False).copy()
    np.testing.assert_array_equal(quiet, policy.act(obs, 0.0, False, np.zeros(6)))
    assert not np.array_equal(quiet, policy.act(obs, 0.0, False, np.ones(6)))
    with pytest.raises(BridgeError, match="noise must be of shape"):
        policy.act(obs, 0.0, False, np.ones(7))


def test_a_context_is_adopted_whole_or_not_at_all(exported: Exported) -> None:
    policy = OnnxPolicy.load(exported("maml")[1])
    obs, first = observations(policy)[0], policy.context()
    before = policy.act(obs, 0.0, False)
    for context, line in [
        ({}, "a context of nothing is none of this policy"),
        ({"h": first["weights"]}, "a context of h"),
        ({"weights": first["weights"][:, 1:]}, "weights is of shape"),
        ({"weights": first["weights"] * np.nan}, "weights is not finite"),
    ]:
        with pytest.raises(BridgeError, match=line):
            policy.set_context(context)
        np.testing.assert_array_equal(policy.act(obs, 0.0, False), before)
    policy.set_context({"weights": first["weights"] * 1.5})
    assert not np.array_equal(policy.act(obs, 0.0, False), before)
    policy.begin()
    np.testing.assert_array_equal(policy.act(obs, 0.0, False), before)


def content(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "policy.json").read_text())
    return data


def rewrite(folder: Path, data: dict[str, Any], model: bytes | None = None) -> None:
    """Write a folder as an attacker would: with the hashes and metadata that go with it."""
    model = (folder / "policy.onnx").read_bytes() if model is None else model
    with contextlib.suppress(Exception):  # not every attack is a model
        described = onnx.load_model_from_string(model)
        helper.set_model_props(described, model_properties(data))
        model = described.SerializeToString()
    (folder / "policy.onnx").write_bytes(model)
    data = {**data, "sha256": hashlib.sha256(model).hexdigest()}
    with contextlib.suppress(ValueError):  # NaN has no canonical form
        data[HASH_KEY] = content_digest(data)
    (folder / "policy.json").write_text(json.dumps(data))


def seal(folder: Path, model: bytes) -> None:
    """Put another model into a folder."""
    rewrite(folder, content(folder), model)


def tell(folder: Path, **said: Any) -> None:
    """Change what policy.json says."""
    rewrite(folder, {**content(folder), **said})


def forget(key: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = content(folder)
        del data[key]
        rewrite(folder, data)

    return change


def tampered(folder: Path) -> None:
    data = bytearray((folder / "policy.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "policy.onnx").write_bytes(data)


def model(
    *nodes: onnx.NodeProto, tensors: tuple[onnx.TensorProto, ...] = (), **more: Any
) -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 1]) for n in ("obs", "actions"))
    graph = helper.make_graph(list(nodes), "g", [x], [y], list(tensors))
    return helper.make_model(graph, ir_version=10, **more)


def outside() -> onnx.TensorProto:
    tensor = TensorProto(
        name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL
    )
    tensor.external_data.add(key="location", value="/etc/hostname")
    return tensor


ADD = helper.make_node("Add", ["obs", "w"], ["actions"])
FOREIGN = model(helper.make_node("Gelu", ["obs"], ["actions"], domain="com.microsoft"))
HIDDEN = model(
    helper.make_node(
        "If", ["c"], ["actions"],
        then_branch=helper.make_graph([], "t", [], [], [outside()]),
        else_branch=helper.make_graph([], "e", [], []),
    )
)  # fmt: skip
FUNCTION = helper.make_function(
    "f", "F", ["a"], ["b"], [helper.make_node("Tanh", ["a"], ["b"])], []
)
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "is no policy folder: cannot read"),
    "no JSON": (lambda f: (f / "policy.json").write_text("{"), "policy.json is damaged"),
    "not text": (
        lambda f: (f / "policy.json").write_bytes(b"\xff\xfe\x00"),
        "policy.json is damaged",
    ),
    "a list": (lambda f: (f / "policy.json").write_text("[]"), "is not metarobot's"),
    "another's": (
        lambda f: tell(f, kind="run"),
        "is not metarobot's: it is not of kind 'metarobot-policy'",
    ),
    "newer": (
        lambda f: tell(f, format=FORMAT + 1),
        f"is of format {FORMAT + 1}, this metarobot reads format {FORMAT}: upgrade",
    ),
    "older": (
        lambda f: tell(f, format=1),
        "is of format 1, which had no content_sha256: export the policy again",
    ),
    "no format": (forget("format"), "lacks 'format'"),
    "no hash": (
        lambda f: (f / "policy.json").write_text(
            json.dumps({k: v for k, v in content(f).items() if k != HASH_KEY})
        ),
        "was changed or is damaged",
    ),
    "a digit is wrong": (
        lambda f: (f / "policy.json").write_text(
            (f / "policy.json").read_text().replace('"horizon": 1', '"horizon": 2')
        ),
        "was changed or is damaged",
    ),
    "format of words": (lambda f: tell(f, format="new"), "policy.json is damaged"),
    "a key is missing": (forget("limits"), "lacks 'limits': export the policy again"),
    "no context": (forget("context"), "lacks 'context'"),
    "a number for a list": (lambda f: tell(f, joint_names=3), "policy.json is damaged"),
    "joints without gains": (
        lambda f: tell(f, joint_names=["hip"]),
        "joint_stiffness has 0 entries, not 1",
    ),
    "a rate of nothing": (
        lambda f: tell(f, control_hz=0),
        "control_hz is 0, not a number from 0.1 to 10000",
    ),
    "an endless rate": (
        lambda f: tell(f, control_hz=math.inf),
        "Infinity is not a number of JSON",
    ),
    "bounds without room": (
        lambda f: tell(f, action={"names": ["a"], "low": [1], "high": [1]}),
        "the action 'a' has no room from 1 to 1",
    ),
    "a layout of its own": (
        lambda f: tell(f, layout="snake"),
        "layout is 'snake'; it may be: direct, legged",
    ),
    "adapts somehow": (
        lambda f: tell(f, adapts="often"),
        "adapts is 'often'; it may be: acting, between, none",
    ),
    "outputs are missing": (
        lambda f: tell(f, outputs=[]),
        "the outputs are not the action and the context",
    ),
    "fewer observations": (lambda f: tell(f, observation_names=["one"]), "obs is of shape"),
    "other inputs": (
        lambda f: tell(f, inputs=[{"name": "obs", "shape": [1, 17]}]),
        "the model's inputs are",
    ),
    "no model": (lambda f: (f / "policy.onnx").unlink(), "cannot read"),
    "a bit is wrong": (tampered, "is damaged or another policy's: not the SHA-256"),
    "empty": (lambda f: seal(f, b""), "policy.onnx: "),
    "no ONNX": (lambda f: seal(f, b"MZ" * 999), "policy.onnx: "),
    "cut off": (lambda f: seal(f, (f / "policy.onnx").read_bytes()[:-999]), "policy.onnx: "),
    "another model": (
        lambda f: seal(
            f, model(helper.make_node("Tanh", ["obs"], ["actions"])).SerializeToString()
        ),
        "the model's inputs are obs",
    ),
    "operators of others": (
        lambda f: seal(f, FOREIGN.SerializeToString()),
        "uses operators of 'com.microsoft'",
    ),
    "numbers elsewhere": (
        lambda f: seal(f, model(ADD, tensors=(outside(),)).SerializeToString()),
        "has numbers in another file",
    ),
    "numbers elsewhere, hidden": (
        lambda f: seal(f, HIDDEN.SerializeToString()),
        "has a subgraph",
    ),
    "functions": (
        lambda f: seal(f, model(ADD, functions=[FUNCTION]).SerializeToString()),
        "has functions of its own",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_with_a_fault_is_refused_in_one_line(folder: Path, fault: str) -> None:
    breaks, line = FAULTS[fault]
    breaks(folder)
    with pytest.raises(BridgeError) as caught:
        OnnxPolicy.load(folder)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


LEG = {"hip": [0.2, 0.05, 0], "thigh": [0, 0.1, 0], "calf": [0, 0, -0.2], "foot": [0, 0, -0.2]}
REWARD = {
    "kind": "quadruped",
    "legs": dict.fromkeys(("FR", "FL", "RR", "RL"), LEG),
    "foot_radius": 0.02,
    "step_height": 0.1,
    "touch": 5.0,
    "lowest": 0.1,
    "upright": 0.5,
    "weights": {"track": 1.0, "effort": 0.1},
}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("family", "--publish-hz=1e9"),
        ("run_path", "-x"),
        ("agent", ""),
        ("joint_stiffness", [-1000.0, 40.0]),
        ("joint_stiffness", [1e9, 40.0]),
        ("joint_stiffness", [40.0]),
        ("joint_stiffness", {"hip": 40.0}),
        ("joint_damping", [1.0, -50.0]),
        ("joint_damping", [math.nan, 1.0]),
        ("default_joint_pos", [1e6, 0.0]),
        ("default_joint_pos", [0.0, 1.5]),
        ("action_scale", [0.25, math.inf]),
        ("action_scale", [0.25, -0.25]),
        ("action_scale", [0.25, True]),
        ("control_hz", 1e6),
        ("control_hz", "50"),
        ("trial", {"horizon": 0, "episodes": 2}),
        ("trial", {"horizon": 10, "episodes": 2.5}),
        ("trial", {"horizon": 10**6, "episodes": 2, "rollouts": 10**4}),
        ("trial", [10, 2]),
        ("joint_names", ["hip", "hip"]),
        ("joint_names", ["hip", ""]),
        ("joint_names", ["hip", "kn\nee"]),
        ("joint_names", "hk"),
        ("observation_names", []),
        ("command_names", ["speed"]),
        ("limits", {}),
        ("limits", {"hip": LIMIT, "knee": {**LIMIT, "torque": math.inf}}),
        ("limits", {"hip": LIMIT, "knee": {**LIMIT, "torque": -1.0}}),
        ("limits", {"hip": LIMIT, "knee": {**LIMIT, "velocity": 0}}),
        ("limits", {"hip": LIMIT, "knee": {**LIMIT, "low": 2.0}}),
        ("limits", {"hip": LIMIT, "knee": [-1, 1, 10, 20]}),
        ("action", {"names": ["a"], "low": [-1], "high": [math.nan]}),
        ("action", {"names": [], "low": [], "high": []}),
        ("noise", -1),
        ("noise", 10**17),
        ("explores", "no"),
        ("inputs", [{"name": "obs", "shape": [1, -4]}]),
        ("inputs", [{"name": "obs", "shape": [10**9, 10**9]}]),
        ("inputs", [{"name": "obs", "shape": [1, 4]}] * 2),
        ("context", [{"name": "h", "in": None, "out": None, "shape": [-1], "begin": "zeros"}]),
        ("context", [{"name": "h", "in": None, "out": None, "shape": [1], "begin": ["0"]}]),
        ("context", [{"name": "h", "in": None, "out": None, "shape": [1], "begin": [1e300]}]),
        ("reward", [1, 2]),
        ("reward", {**REWARD, "upright": math.nan}),
        ("reward", {**REWARD, "upright": 2}),
        ("reward", {**REWARD, "step_height": 0}),
        ("reward", {**REWARD, "weights": {"track": 1e300}}),
        ("reward", {**REWARD, "weights": {"bribe": 1}}),
        ("reward", {**REWARD, "legs": {"FR": LEG}}),
        ("reward", {**REWARD, "legs": {leg: {**LEG, "hip": [0, 0]} for leg in "abcd"}}),
        ("parity", {"tolerance": "small"}),
        ("surprise", 1),
    ],
)
def test_a_value_out_of_its_bounds_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(BridgeError) as caught:
        PolicyMetadata.parse_file("folder", {**ABOUT, "reward": REWARD, key: value})
    assert re.search(r"damaged|contradicts", str(caught.value))
    assert str(caught.value).isprintable()


def test_a_direct_policy_reaches_no_further_than_its_joints() -> None:
    data = {**ABOUT, "layout": "direct"}
    action = {"names": ["hip.pos", "lamp"], "low": [-1, 0], "high": [1, 9]}
    assert PolicyMetadata.parse_file("folder", {**data, "action": action}).layout == "direct"
    action["high"] = [1.1, 9]
    with pytest.raises(BridgeError, match=r"the action 'hip\.pos' reaches -1 to 1\.1, beyond"):
        PolicyMetadata.parse_file("folder", {**data, "action": action})


def test_values_within_their_bounds_are_read() -> None:
    meta = PolicyMetadata.parse_file("folder", {**ABOUT, "reward": REWARD})
    assert meta.reward == REWARD
    assert meta.limits["hip"].torque == LIMIT["torque"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"kind": "metarobot-policy", "format": 1e999}', "is too large"),
        ('{"kind": "metarobot-policy", "format": NaN}', "is not a number of JSON"),
        ('{"kind": "metarobot-policy", "format": ' + "9" * 5000 + "}", "is too large"),
        ('{"kind": "metarobot-policy", "kind": "metarobot-policy"}', "is there twice"),
        ('{"kind": "metarobot-policy", "format": "2"}', "not an integer"),
        ('{"kind": "metarobot-policy", "format": 2, "a": "\\ud800"}', "was changed"),
        ("{}", "is not metarobot's"),
        ("null", "is not metarobot's"),
    ],
)
def test_odd_json_is_refused_in_one_line(tmp_path: Path, text: str, line: str) -> None:
    (tmp_path / "policy.json").write_text(text)
    with pytest.raises(BridgeError, match=line) as caught:
        OnnxPolicy.load(tmp_path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["policy.json", "policy.onnx"])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "large"])
def test_only_regular_files_of_a_sane_size_are_read(folder: Path, name: str, kind: str) -> None:
    path = folder / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.touch()
        os.truncate(path, 1 << 34)  # a sparse file
    with pytest.raises(BridgeError, match=r"regular file|directory|larger than") as caught:
        OnnxPolicy.load(folder)
    assert name in str(caught.value)


def sparse() -> onnx.ModelProto:
    """A model whose sparse constant reads its numbers from another file."""
    attacked = model(ADD)
    attacked.graph.sparse_initializer.add().values.CopyFrom(outside())
    return attacked


def node(operator: str, *inputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, list(inputs), ["actions"], **attributes)


def declared(*names_and_shapes: tuple[str, list[int]]) -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in names_and_shapes]


def growing(shape: list[int]) -> onnx.ModelProto:
    """A model that makes a matrix of 16 billion numbers, and declares another shape of it."""
    row = helper.make_tensor("row", TensorProto.FLOAT, [1, 126_000], bytes(504_000), raw=True)
    column = helper.make_tensor("col", TensorProto.FLOAT, [126_000, 1], bytes(504_000), raw=True)
    index = helper.make_tensor("zero", TensorProto.INT64, [1], bytes(8), raw=True)
    attacked = model(
        helper.make_node("Mul", ["row", "col"], ["large"]),
        helper.make_node("Gather", ["large", "zero"], ["line"], axis=0),
        helper.make_node("Gather", ["line", "zero"], ["one"], axis=1),
        node("Add", "one", "obs"),
        tensors=(row, column, index),
    )
    shapes = declared(("large", shape), ("line", [1, 126_000]), ("one", [1, 1]))
    attacked.graph.value_info.extend(shapes)
    return attacked


SHAPE = helper.make_tensor("n", TensorProto.INT64, [1], np.array([1 << 30]).tobytes(), raw=True)
EMPTY = helper.make_graph([], "g", [], [])
HOSTILE: dict[str, tuple[onnx.ModelProto, str]] = {
    "sparse numbers elsewhere": (sparse(), "has sparse numbers"),
    "4 GB of constants": (
        model(node("ConstantOfShape", "n"), tensors=(SHAPE,)),
        "uses the operator 'ConstantOfShape'",
    ),
    "a constant of its own": (
        model(node("Constant", value=helper.make_tensor("v", TensorProto.FLOAT, [1], [1.0]))),
        "has numbers in an attribute",
    ),
    "an endless loop": (model(node("Loop", "", "", "obs", body=EMPTY)), "has a subgraph"),
    "a loop without a body": (model(node("Loop", "", "", "obs")), "uses the operator 'Loop'"),
    "noise of its own": (model(node("RandomNormalLike", "obs")), "uses the operator"),
    "a shape that is computed": (model(node("Reshape", "obs", "obs")), "which is no constant"),
    "no shapes": (
        model(helper.make_node("Tanh", ["obs"], ["x"]), node("Tanh", "x")),
        "does not declare the shape of 'x'",
    ),
    "16 billion numbers": (growing([126_000, 126_000]), "more than 16,000,000"),
    "16 billion numbers, hidden": (growing([1, 126_000]), "onnxruntime cannot run the model"),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_model_is_refused(folder: Path, attack: str) -> None:
    attacked, line = HOSTILE[attack]
    seal(folder, attacked.SerializeToString())
    with pytest.raises(BridgeError) as caught:
        OnnxPolicy.load(folder)
    assert line in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_tag_of_more_than_32_bits_hides_nothing(folder: Path) -> None:
    # field 7 of a model, its graph, with bit 32 set: some readers take the lower 32 bits
    tag, size = (1 << 32) | (7 << 3) | 2, 0
    varint = b""
    while tag:
        varint += bytes([(tag & 0x7F) | (0x80 if tag > 0x7F else 0)])
        tag >>= 7
    with pytest.raises(BridgeError, match="more than 32 bits"):
        check_onnx_file((folder / "policy.onnx").read_bytes() + varint + bytes([size]))


def test_metadata_in_the_model_must_be_those_of_the_folder(folder: Path) -> None:
    data = content(folder)
    data["trial"] = {**data["trial"], "episodes": 7}
    data[HASH_KEY] = content_digest(data)
    (folder / "policy.json").write_text(json.dumps(data))
    with pytest.raises(BridgeError, match=r"'trial\.episodes' is '2', policy\.json says"):
        OnnxPolicy.load(folder)


def test_a_first_step_that_takes_too_long_is_ended(folder: Path) -> None:
    started = time.monotonic()
    with pytest.raises(BridgeError, match=r"took over 0\.01 s"):
        run_trial((folder / "policy.onnx").read_bytes(), limit_s=0.01)
    assert time.monotonic() - started < 5


def test_damaged_folders_are_refused_or_mean_the_same(folder: Path, tmp_path: Path) -> None:
    table = fuzz_policy(folder, tmp_path / "scratch", 300, seed=0)
    assert table.broken == []
    assert sum(table.refused.values()) > 100


def test_a_context_that_begins_with_something_else_is_refused(folder: Path) -> None:
    context = json.loads((folder / "policy.json").read_text())["context"]
    for begin in ([1.0, 2.0], "ones", [[1.0], [2.0, 3.0]], None):
        tell(folder, context=[{**context[0], "begin": begin}, context[1]])
        with pytest.raises(BridgeError, match="context h begins with"):
            OnnxPolicy.load(folder)


def complaint(data: bytes) -> str:
    try:
        check_onnx_file(data)
    except BridgeError as e:
        return str(e)
    return ""


@given(st.binary(max_size=200))
def test_any_bytes_are_looked_through(data: bytes) -> None:
    assert "\n" not in complaint(data)


@given(st.data())
def test_so_is_a_model_with_a_byte_changed_and_its_end_cut_off(data: st.DataObject) -> None:
    whole = bytearray(HIDDEN.SerializeToString())
    whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    assert "\n" not in complaint(bytes(whole[: data.draw(st.integers(0, len(whole)))]))


BARE = """
import sys

FORBIDDEN = ("torch", "mujoco", "gymnasium", "tyro", "onnx", "safetensors", "scipy", "yaml")

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in FORBIDDEN:
            raise ImportError(f"a robot has no {name}")

sys.meta_path.insert(0, Refuse())
import importlib, pkgutil
import metarobot.bridge
for module in pkgutil.walk_packages(metarobot.bridge.__path__, "metarobot.bridge."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from metarobot.bridge.policy.onnx_policy import OnnxPolicy
policy = OnnxPolicy.load(sys.argv[1])
print(policy.act([0.0] * 17, 0.0, False).shape)
"""


def test_a_robot_needs_neither_torch_nor_mujoco(exported: Exported) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BARE, str(exported("lstm")[1])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout.strip(), done.stderr) == ("(6,)", "")


def test_memory_stays_flat(policy: OnnxPolicy) -> None:
    obs = observations(policy)[0]
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1])  # noqa: E731
    for _ in range(2000):
        policy.act(obs, 0.0, False)
    before = resident()
    for _ in range(20_000):
        policy.act(obs, 0.0, False)
    assert resident() - before < 64  # pages


HEADERS = Path(os.environ.get("ONNXRUNTIME_INCLUDE", "/usr/include/onnxruntime"))


@pytest.mark.parametrize("name", ["lstm", "maml"])
def test_the_loop_in_cpp_gives_the_same(exported: Exported, tmp_path: Path, name: str) -> None:
    if shutil.which("g++") is None or not (HEADERS / "onnxruntime_cxx_api.h").exists():
        pytest.skip(
            "no g++, or no headers of onnxruntime: "
            "Debian's libonnxruntime-dev, or say ONNXRUNTIME_INCLUDE"
        )
    library = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*"))
    (tmp_path / "libonnxruntime.so.1").symlink_to(library)
    (tmp_path / "libonnxruntime.so").symlink_to(library)
    source, loop = str(ROOT / "docs" / "loop.cpp"), str(tmp_path / "loop")
    where = [f"-I{HEADERS}", f"-L{tmp_path}", "-lonnxruntime", f"-Wl,-rpath,{tmp_path}"]
    subprocess.run(
        ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", source, *where, "-o", loop], check=True
    )

    policy, steps = OnnxPolicy.load(exported(name)[1]), 350
    obs, rng = observations(policy, steps).astype(np.float32), np.random.default_rng(1)
    reward, ended = rng.normal(size=steps).astype(np.float32), rng.random(steps) < 0.02
    lines = [
        f"{int(e)} {r:.9g} {' '.join(f'{x:.9g}' for x in o)}"
        for e, r, o in zip(ended, reward, obs, strict=True)
    ]
    path = exported(name)[1] / "policy.onnx"
    done = subprocess.run(
        [loop, path, "0"], input="\n".join(lines), capture_output=True, text=True, check=True
    )
    told = np.array([[float(x) for x in line.split()] for line in done.stdout.splitlines()])
    np.testing.assert_allclose(told, list(by_hand(policy, ended, reward, obs)), atol=1e-8)


def by_hand(policy: OnnxPolicy, ended: Any, reward: Any, obs: Any) -> Any:
    """What the same readings give in Python."""
    step = episode = 0
    for e, r, o in zip(ended, reward, obs, strict=True):
        if over := bool(e) or step == policy.meta.trial.horizon:
            step, episode = 0, (episode + 1) % policy.meta.trial.episodes
            if episode == 0:
                policy.begin()
        new = step == episode == 0
        yield policy.act(o, 0.0 if new else float(r), over and not new)
        step += 1


LOOP_METADATA = {
    "actions": "2",
    "action.low": "-1,-0.5",
    "action.high": "1,0.5",
    "default_joint_pos": "0.3,-0.2",
    "action_scale": "2,3",
    "trial.horizon": "7",
    "trial.episodes": "3",
    "control_hz": "50",
    "context.h.begin": "0.5,0.25,1",
}


@pytest.fixture(scope="module")
def loop_over_stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """docs/loop.cpp over a stub of onnxruntime, whose model is a file of metadata."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    program = tmp_path_factory.mktemp("loop") / "loop"
    stub = Path(__file__).parent / "onnxruntime_stub"
    source = ROOT / "docs" / "loop.cpp"
    options = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsanitize=address", f"-I{stub}"]
    subprocess.run(["g++", *options, str(source), "-o", str(program)], check=True)
    return program


def run_loop(program: Path, readings: str, **changed: str) -> tuple[int, str, str]:
    metadata = {**LOOP_METADATA, **changed}
    model = program.with_name("model")
    model.write_text("\n".join(f"{key}={value}" for key, value in metadata.items()))
    done = subprocess.run(
        [program, model, "0"], input=readings, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


def test_the_loop_in_cpp_clips_and_scales(loop_over_stub: Path) -> None:
    code, out, err = run_loop(loop_over_stub, "0 0 0.25 2\n1 1 -3 0\n")
    assert (code, err) == (0, "")
    np.testing.assert_allclose(
        [[float(x) for x in line.split()] for line in out.splitlines()],
        [[0.3 + 2 * 0.25, -0.2 + 3 * 0.5], [0.3 - 2, -0.2]],
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    ("readings", "changed", "line"),
    [
        ("0 0 1 1 x", {}, "'x' where a number belongs"),
        ("0 0 1 1e999", {}, "where a number belongs"),
        ("0 nan 1 1", {}, "where a number belongs"),
        ("0 0 1 1 1", {}, "obs has 3 numbers, not 2"),
        ("0 0 1", {}, "obs has 1 numbers, not 2"),
        ("2 0 1 1", {}, "not 0 or 1"),
        ("0 0 1 1\n\n", {}, "not 0 or 1"),
        ("0 0 1 1", {"default_joint_pos": "0.3,-0.2,1"}, "default_joint_pos has 3 numbers, not 2"),
        ("0 0 1 1", {"default_joint_pos": "0.3"}, "default_joint_pos has 1 numbers, not 2"),
        ("0 0 1 1", {"action_scale": ""}, "action_scale has 0 numbers, not 2"),
        ("0 0 1 1", {"action_scale": "1,1e36"}, "out of its bounds"),
        ("0 0 1 1", {"action_scale": "1,2x"}, "'2x' where a number belongs"),
        ("0 0 1 1", {"action_scale": "1,,2"}, "'' where a number belongs"),
        ("0 0 1 1", {"action.low": "-1"}, "action.low has 1 numbers, not 2"),
        ("0 0 1 1", {"action.high": "-2,1"}, "no room"),
        ("0 0 1 1", {"action.high": "nan,1"}, "where a number belongs"),
        ("0 0 1 1", {"actions": "0"}, "no fixed shape"),
        ("0 0 1 1", {"actions": "-1"}, "no fixed shape"),
        ("0 0 1 1", {"actions": "99999999999"}, "too large"),
        ("0 0 1 1", {"trial.horizon": ""}, "trial.horizon has 0 numbers, not 1"),
        ("0 0 1 1", {"trial.horizon": "1.5"}, "no whole number"),
        ("0 0 1 1", {"trial.episodes": "0"}, "out of its bounds"),
        ("0 0 1 1", {"context.h.begin": "1,2"}, "h_in has 2 numbers, not 3"),
        ("0 0 1 1", {"context.h.begin": "1,2,inf"}, "where a number belongs"),
        ("0 0 1 1", {"nan": "yes"}, "the policy's answer is not finite"),
    ],
)
def test_the_loop_in_cpp_refuses_in_one_line(
    loop_over_stub: Path, readings: str, changed: dict[str, str], line: str
) -> None:
    code, out, err = run_loop(loop_over_stub, readings, **changed)
    assert (code, err.count("\n")) == (1, 1)
    assert line in err
    assert "inf" not in out
