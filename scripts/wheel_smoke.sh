#!/usr/bin/env bash
# Build the sdist, the wheel from it, install that in a clean environment, import everything and compile one model.
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
from metarobot.agent import agents
from metarobot.checkpoint import open_run, pretrained
from metarobot.env import Env, families

optional = {"metarobot.sb3"}
names = [m.name for m in pkgutil.walk_packages(metarobot.__path__, "metarobot.")]
for name in names:
    if name not in optional:
        importlib.import_module(name)
assert {"metarobot.envs.cheetah", "metarobot.agents.rl2", "metarobot.sim.cpu"} <= set(names), names
for name in agents.names():
    agents.get(name)
for name in families.names():
    Env(families.get(name), families.get(name).space.sample("train", 1))
for name in pretrained():
    open_run(name).load_agent()
print(f"wheel: {len(names)} modules, {len(families.names())} families, {len(pretrained())} trained agents")
PY
"$work/venv/bin/metarobot" families >/dev/null
