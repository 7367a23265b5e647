"""Memory: what 4,096 Cheetah worlds take, and whether 1,000 training iterations leave any behind.

python scripts/memory.py --json memory.json
"""

import argparse
import json
import resource
from pathlib import Path

import torch
from rich.progress import track

from metarobot.env.base import Env
from metarobot.learning.agent_interface import agents
from metarobot.tasks.family import families
from metarobot.training.collect import collect
from metarobot.training.run_folder import build_learner


def resident_mb() -> float:
    """Resident memory of this process, MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def many_worlds(family_name: str, worlds: int) -> float:
    """Resident memory with that many worlds, each task with a model of its own, after an episode's
    start."""
    family = families.get(family_name)
    env = Env(family, family.space.sample("train", worlds))
    for _ in range(10):
        env.step(torch.zeros(worlds, env.act_dim))
    return resident_mb()


def growth(iterations: int) -> tuple[float, float]:
    """Resident memory after a tenth of the iterations and after all of them: collecting, learning,
    new tasks."""
    from dataclasses import replace

    family = replace(families.get("CheetahTerrain"), horizon=10)
    config = agents.get("rl2").config(worlds=16, epochs=1, minibatches=2)
    learner = build_learner("rl2", config, family, seed=0)
    env = Env(family, family.space.sample("train", config.worlds))
    early = 0.0
    for i in track(range(iterations), description="iterations"):
        tasks = family.space.sample("train", config.worlds, i)
        learner.update(collect(learner.agent, env, tasks, episodes=2, seed=i), 0.0, i)
        if i == iterations // 10:
            early = resident_mb()
    return early, resident_mb()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worlds", type=int, default=4096)
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    early, late = growth(options.iterations)
    report = {
        "worlds": options.worlds,
        "cheetah_vel_mb": many_worlds("CheetahVel", options.worlds),
        "cheetah_terrain_mb": many_worlds("CheetahTerrain", options.worlds),
        "iterations": options.iterations,
        "after_a_tenth_mb": early,
        "after_all_mb": late,
    }
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
