"""Memory of 4,096 cheetah worlds, and whether 1,000 training iterations leave any behind.

python scripts/memory.py --json memory.json
"""

import argparse
import json
import resource
from dataclasses import replace
from pathlib import Path

import torch
from rich.progress import track

from metarobot.env.base import Env
from metarobot.learning.agent_interface import agents
from metarobot.tasks.family import families
from metarobot.training.collect import collect
from metarobot.training.run_folder import build_learner

EPISODE_STEPS = 10
"""Steps of an episode: what may leak is counted in episodes and iterations, not in steps."""


def resident_mb() -> float:
    """Return the resident memory of this process, MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def memory_of_worlds(family_name: str, worlds: int) -> float:
    """Return the resident memory, MB, with so many worlds that have begun an episode.

    Each task has a model of its own.
    """
    family = families.get(family_name)
    env = Env(family, family.space.sample("train", worlds))
    for _ in range(EPISODE_STEPS):
        env.step(torch.zeros(worlds, env.act_dim))
    return resident_mb()


def growth(iterations: int) -> tuple[float, float]:
    """Return the resident memory, MB, after a tenth of the iterations and after all of them.

    An iteration collects in new tasks and learns.
    """
    family = replace(families.get("CheetahTerrain"), horizon=EPISODE_STEPS)
    config = agents.get("rl2").config(worlds=16, epochs=1, minibatches=2)
    learner = build_learner("rl2", config, family, seed=0)
    env = Env(family, family.space.sample("train", config.worlds))
    early_mb = 0.0
    for i in track(range(iterations), description="iterations"):
        tasks = family.space.sample("train", config.worlds, i)
        trials = collect(learner.agent, env, tasks, episodes=2, seed=i)
        learner.update(trials, 0.0, i)
        if i == iterations // 10:
            early_mb = resident_mb()
    return early_mb, resident_mb()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worlds", type=int, default=4096)
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    torch.set_num_threads(1)
    early_mb, late_mb = growth(options.iterations)
    report = {
        "worlds": options.worlds,
        "cheetah_vel_mb": memory_of_worlds("CheetahVel", options.worlds),
        "cheetah_terrain_mb": memory_of_worlds("CheetahTerrain", options.worlds),
        "iterations": options.iterations,
        "after_a_tenth_mb": early_mb,
        "after_all_mb": late_mb,
    }
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
