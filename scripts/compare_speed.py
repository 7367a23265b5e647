"""Control steps a second of metarobot, Gymnasium and EnvPool on the same robot, in one run.

All step Gymnasium's half_cheetah.xml with 5 physics steps a control step and random actions drawn
beforehand. Each takes a turn of a quarter of a second, then the next, so that a busy machine slows
them alike. metarobot's worlds each have a model object of their own. Medians over the turns.

    python scripts/compare_speed.py --worlds 128 --seconds 120 --json speed.json
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from metarobot.env.autoreset import AutoresetEnv
from metarobot.env.base import Env
from metarobot.tasks.family import families

TURN_S = 0.25
ACTIONS_DRAWN = 50
"""Control steps whose actions are drawn beforehand, then repeated."""
ACT_DIM = 6
OURS = "metarobot Env"
CORES = len(os.sched_getaffinity(0))
PACKAGES = ("metarobot", "mujoco", "gymnasium", "envpool", "torch", "numpy")


@dataclass
class Rival:
    """One way to step many cheetahs."""

    name: str
    worlds: int
    step: Callable[[Any], object]
    actions: Any
    """Drawn beforehand: ``(time, world, act)``."""
    close: Callable[[], object] = lambda: None
    rates: list[float] = field(default_factory=list)
    """Control steps a second of each turn."""

    def take_turn(self) -> None:
        """Step for a while and note the rate."""
        steps = 0
        spent = 0.0
        began = time.perf_counter()
        while spent < TURN_S:
            self.step(self.actions[steps % len(self.actions)])
            steps += 1
            spent = time.perf_counter() - began
        self.rates.append(steps * self.worlds / spent)


def random_actions(worlds: int) -> np.ndarray:
    shape = (ACTIONS_DRAWN, worlds, ACT_DIM)
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


def metarobot(worlds: int) -> Rival:
    family = families.get("CheetahVel")
    env = Env(family, family.space.sample("train", worlds))
    env.sim.set_models([copy.copy(env.model(task)) for task in env.tasks])
    env.reset(0)
    actions = torch.from_numpy(random_actions(worlds))
    return Rival(OURS, worlds, AutoresetEnv(env).step, actions)


def gymnasium_vector(mode: str, worlds: int) -> Rival:
    envs = gymnasium.make_vec("HalfCheetah-v5", num_envs=worlds, vectorization_mode=mode)
    envs.reset(seed=0)
    return Rival(f"Gymnasium {mode}", worlds, envs.step, random_actions(worlds), envs.close)


def envpool(worlds: int) -> Rival:
    import envpool as pool  # an optional package

    known = pool.list_all_envs()
    name = next(name for name in ("HalfCheetah-v5", "HalfCheetah-v4") if name in known)
    envs = pool.make(name, env_type="gymnasium", num_envs=worlds, num_threads=CORES, seed=0)
    envs.reset()
    actions = random_actions(worlds).astype(np.float64)
    return Rival(f"EnvPool {name}", worlds, envs.step, actions, envs.close)


def make_rivals(worlds: int, console: Console) -> list[Rival]:
    """Build all that are installed, ours first."""
    # Forked workers come before other engines, which start threads.
    rivals = [gymnasium_vector("async", n) for n in (2, 8)]
    rivals.append(gymnasium_vector("sync", 8))
    if importlib.util.find_spec("envpool"):
        rivals.append(envpool(worlds))
    else:
        console.print("EnvPool is left out: pip install envpool")
    return [metarobot(worlds), *rivals]


def measure(rivals: list[Rival], seconds: float) -> None:
    for rival in rivals:
        rival.take_turn()
        rival.rates.clear()  # the first turn warms up
    rounds = max(3, round(seconds / (TURN_S * len(rivals))))
    for _ in track(range(rounds), description="measuring", transient=True):
        for rival in rivals:
            rival.take_turn()


def make_report(rivals: list[Rival]) -> dict[str, Any]:
    """Keep the best of each name; ratios are medians of ratios within a round."""
    ours = rivals[0]
    best: dict[str, Rival] = {}
    for rival in sorted(rivals, key=lambda rival: statistics.median(rival.rates)):
        best[rival.name] = rival  # a faster one replaces a slower one of the same name

    rows = []
    for rival in reversed(best.values()):
        ratios = [a / b for a, b in zip(ours.rates, rival.rates, strict=True)]
        rows.append(
            {
                "name": rival.name,
                "worlds": rival.worlds,
                "steps_per_s": round(statistics.median(rival.rates)),
                "slowest": round(min(rival.rates)),
                "fastest": round(max(rival.rates)),
                "metarobot_is_faster_by": statistics.median(ratios),
            }
        )
    installed = [package for package in PACKAGES if importlib.util.find_spec(package)]
    return {
        "rows": rows,
        "rounds": len(ours.rates),
        "turn_s": TURN_S,
        "cores": CORES,
        "versions": {package: importlib.metadata.version(package) for package in installed},
    }


def print_report(report: dict[str, Any], console: Console) -> None:
    table = Table(
        title=f"HalfCheetah, control steps/s, {report['cores']} cores, {report['rounds']} rounds"
    )
    for column in ("", "worlds", "steps/s", "slowest … fastest", "metarobot / it"):
        table.add_column(column, justify="right" if column else "left")
    for row in report["rows"]:
        table.add_row(
            row["name"],
            str(row["worlds"]),
            f"{row['steps_per_s']:,}",
            f"{row['slowest']:,} … {row['fastest']:,}",
            f"{row['metarobot_is_faster_by']:.2f}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worlds", type=int, default=128, help="of metarobot and EnvPool")
    parser.add_argument("--seconds", type=float, default=60.0, help="of measuring, all together")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    if options.worlds < 1 or options.seconds <= 0:
        parser.error("--worlds and --seconds must be positive")

    torch.set_num_threads(1)
    console = Console()
    rivals = make_rivals(options.worlds, console)
    try:
        measure(rivals, options.seconds)
    finally:
        for rival in rivals:
            rival.close()

    report = make_report(rivals)
    print_report(report, console)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
