#!/usr/bin/env bash
# Make an environment with Unitree's own SDK (unitree_sdk2_python, as PyPI carries it) for
# scripts/unitree_peer.py, and print its Python.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${UNITREE_VENV:-.unitree}
if [ ! -e "$venv/.ready" ]; then
    "${PYTHON:-python3}" -m venv "$venv"
    # without opencv, which only its camera needs
    "$venv/bin/pip" install --quiet --disable-pip-version-check -c constraints.txt cyclonedds numpy
    "$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps unitree-sdk2py-dimos==1.0.3
    touch "$venv/.ready"
fi
echo "$venv/bin/python"
