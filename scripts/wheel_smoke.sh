#!/usr/bin/env bash
# Build the sdist, the wheel from it, install that in a clean environment, import everything and compile one model; then
# in an environment with numpy and onnxruntime alone, as on a robot, and act there.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python -m build --outdir "$work/dist" . >"$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }
python -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check -c constraints.txt "$work"/dist/*.whl
cd "$work"
"$work/venv/bin/python" - <<'PY'
import importlib
import pkgutil

import metarobot
from metarobot.training.run_folder import pretrained_names

optional = (
    "metarobot.agents.sb3.",
    "metarobot.bench.device_",
    "metarobot.bridge.",
    "metarobot.deploy.onnx_export",
    "metarobot.env.device",
    "metarobot.env.sb3_vec_env",
    "metarobot.learning.linear_recurrence_kernels",
    "metarobot.sim.warp",
)
names = [module.name for module in pkgutil.walk_packages(metarobot.__path__, "metarobot.")]
for name in names:
    if not name.startswith(optional):
        importlib.import_module(name)
assert {"metarobot.envs.cheetah", "metarobot.agents.rl2", "metarobot.sim.cpu"} <= set(names), names

from metarobot.learning.agent_interface import agents

for name in agents.names():
    if not name.startswith("sb3:"):
        agents.get(name)
for name in metarobot.families():
    metarobot.make_env(name)
for name in pretrained_names():
    metarobot.load_agent(name)
print(
    f"wheel: {len(names)} modules, {len(metarobot.families())} families, "
    f"{len(pretrained_names())} trained agents"
)
PY
"$work/venv/bin/metarobot" families >/dev/null

metarobot_dev=$(cd "$OLDPWD" && pwd)
(cd "$metarobot_dev" && metarobot export CheetahDir-blind --out "$work/policy" --tasks 1 >/dev/null)
python -m venv "$work/robot"
"$work/robot/bin/pip" install --quiet --disable-pip-version-check -c "$metarobot_dev/constraints.txt" numpy onnxruntime
"$work/robot/bin/pip" install --quiet --disable-pip-version-check --no-deps "$work"/dist/*.whl
"$work/robot/bin/python" - "$work/policy" <<'PY'
import importlib
import pkgutil
import sys
from importlib.util import find_spec

import metarobot.bridge
from metarobot.bridge.policy.onnx_policy import OnnxPolicy

assert not [name for name in ("torch", "mujoco", "gymnasium", "tyro", "rich") if find_spec(name)]
dds_modules = ("dds", "ros2_messages", "unitree_messages")
needs_dds = {f"metarobot.bridge.robots.{name}" for name in dds_modules}
names = [m.name for m in pkgutil.walk_packages(metarobot.bridge.__path__, "metarobot.bridge.")]
for name in names:
    if name not in needs_dds:
        importlib.import_module(name)
policy = OnnxPolicy.load(sys.argv[1])
print(f"robot: {len(names)} modules, {policy.act([0.0] * len(policy.meta.observation_names), 0.0, False).size} actions")
PY
