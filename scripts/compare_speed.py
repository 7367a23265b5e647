"""Control steps a second of metarobot, Gymnasium and EnvPool on the same robot, measured in turns
in one run.

All step Gymnasium's half_cheetah.xml with 5 physics steps a control step and random actions drawn
beforehand; each takes a turn of a quarter of a second, then the next, so that a busy machine slows
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
OURS = "metarobot Env"
CORES = len(os.sched_getaffinity(0))


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

    def turn(self) -> None:
        """Step for a while and note the rate."""
        began, steps = time.perf_counter(), 0
        while (spent := time.perf_counter() - began) < TURN_S:
            self.step(self.actions[steps % len(self.actions)])
            steps += 1
        self.rates.append(steps * self.worlds / spent)


def actions(worlds: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (50, worlds, 6)).astype(np.float32)


def metarobot(worlds: int) -> Rival:
    family = families.get("CheetahVel")
    env = Env(family, family.space.sample("train", worlds))
    env.sim.set_models([copy.copy(env.model(t)) for t in env.tasks])
    env.reset(0)
    return Rival(OURS, worlds, AutoresetEnv(env).step, torch.from_numpy(actions(worlds)))


def gymnasium_vector(mode: str, worlds: int) -> Rival:
    envs = gymnasium.make_vec("HalfCheetah-v5", num_envs=worlds, vectorization_mode=mode)
    envs.reset(seed=0)
    return Rival(f"Gymnasium {mode}", worlds, envs.step, actions(worlds), envs.close)


def envpool(worlds: int) -> Rival:
    import envpool as pool

    name = next(n for n in ("HalfCheetah-v5", "HalfCheetah-v4") if n in pool.list_all_envs())
    envs = pool.make(name, env_type="gymnasium", num_envs=worlds, num_threads=CORES, seed=0)
    envs.reset()
    return Rival(
        f"EnvPool {name}", worlds, envs.step, actions(worlds).astype(np.float64), envs.close
    )


def rivals(worlds: int, console: Console) -> list[Rival]:
    # forked workers first, before other engines have started threads
    found = [gymnasium_vector("async", n) for n in (2, 8)]
    found.append(gymnasium_vector("sync", 8))
    if importlib.util.find_spec("envpool"):
        found.append(envpool(worlds))
    else:
        console.print("EnvPool is left out: pip install envpool")
    return [metarobot(worlds), *found]


def measure(found: list[Rival], seconds: float) -> None:
    for rival in found:
        rival.turn()
        rival.rates.clear()
    rounds = max(3, round(seconds / (TURN_S * len(found))))
    for _ in track(range(rounds), description="measuring", transient=True):
        for rival in found:
            rival.turn()


def report(found: list[Rival]) -> dict[str, Any]:
    """Keep the best of each name; ratios are medians of ratios within a round."""
    ours, best = found[0], {}
    for rival in sorted(found, key=lambda r: statistics.median(r.rates)):
        best[rival.name] = rival
    rows = [
        {
            "name": r.name,
            "worlds": r.worlds,
            "steps_per_s": round(statistics.median(r.rates)),
            "slowest": round(min(r.rates)),
            "fastest": round(max(r.rates)),
            "metarobot_is_faster_by": statistics.median(
                a / b for a, b in zip(ours.rates, r.rates, strict=True)
            ),
        }
        for r in reversed(best.values())
    ]
    packages = ("metarobot", "mujoco", "gymnasium", "envpool", "torch", "numpy")
    versions = {p: importlib.metadata.version(p) for p in packages if importlib.util.find_spec(p)}
    return {
        "rows": rows,
        "rounds": len(ours.rates),
        "turn_s": TURN_S,
        "cores": CORES,
        "versions": versions,
    }


def show(result: dict[str, Any], console: Console) -> None:
    table = Table(
        title=f"HalfCheetah, control steps/s, {result['cores']} cores, {result['rounds']} rounds"
    )
    for column in ("", "worlds", "steps/s", "slowest … fastest", "metarobot / it"):
        table.add_column(column, justify="right" if column else "left")
    for r in result["rows"]:
        spread = f"{r['slowest']:,} … {r['fastest']:,}"
        table.add_row(
            r["name"],
            str(r["worlds"]),
            f"{r['steps_per_s']:,}",
            spread,
            f"{r['metarobot_is_faster_by']:.2f}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worlds", type=int, default=128, help="of metarobot and EnvPool")
    parser.add_argument("--seconds", type=float, default=60.0, help="of measuring, all together")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    if args.worlds < 1 or args.seconds <= 0:
        parser.error("--worlds and --seconds must be positive")
    torch.set_num_threads(1)
    console = Console()
    found = rivals(args.worlds, console)
    try:
        measure(found, args.seconds)
    finally:
        for rival in found:
            rival.close()
    result = report(found)
    show(result, console)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
