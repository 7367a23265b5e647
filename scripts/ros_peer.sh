#!/usr/bin/env bash
# An environment with a real ROS 2 (rclpy over Fast DDS, 260 MB, from PyPI) for scripts/ros_peer.py; prints its python.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${ROS_VENV:-.ros}
if [ ! -e "$venv/.ready" ]; then
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check -c constraints.txt \
        'ros-rclpy[fastrtps]==9.1.2' ros-std-msgs==5.5.1 ros-geometry-msgs==5.5.1 ros-sensor-msgs==5.5.1 mujoco numpy
    touch "$venv/.ready"
fi
echo "$venv/bin/python"
