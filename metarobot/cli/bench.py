"""The subcommand that measures speed and memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tyro.conf import Positional

from metarobot import api
from metarobot.bench import tables
from metarobot.bench.collection_speed import bench_agents
from metarobot.bench.maml_speed import bench_maml
from metarobot.bench.pearl_speed import bench_pearl
from metarobot.bench.simulation_speed import bench_sim
from metarobot.errors import MetarobotError
from metarobot.files import write_json


class CpuBench(NamedTuple):
    """A measurement on the CPU, how its report is shown, and what is usually measured."""

    measure: Callable[..., dict[str, Any]]
    show: Callable[[dict[str, Any]], str]
    family: str
    worlds: int


CPU_BENCHES = {
    "sim": CpuBench(bench_sim, tables.simulation_lines, "CheetahVel", 512),
    "maml": CpuBench(bench_maml, tables.maml_table, "CheetahDir100", 800),
    "pearl": CpuBench(bench_pearl, tables.pearl_lines, "CheetahVel", 64),
    "agents": CpuBench(bench_agents, tables.collection_table, "CheetahVel", 64),
}
"""Name -> what is measured on the CPU."""

DEVICE_FAMILY = "CheetahVel"
DEVICE_WORLDS = 8192
MOST_DEVICE_WORLDS = 2**20


def bench(
    what: Positional[Literal["sim", "maml", "pearl", "agents", "memory"]],
    family: Positional[str] = "",
    /,
    worlds: int | None = None,
    seconds: float = 10.0,
    threads: int = 0,
    sim: str = "cpu",
    device: str = "cpu",
    json: Path | None = None,
) -> None:
    """Measure the speed of simulation, of learning or of collecting trials, or the memory it takes.

    Speeds are ratios: of an environment against the bare physics engine, of an agent's learning
    against its bare matrix products, of collecting against RL².

    Args:
        what: sim, the environment's step loop with a model of its own in each world; maml, the
            sampling, inner step and outer update of MAML-TRPO, and the same with a Python loop over
            tasks; pearl, its gradient steps against their bare matrix products, and its sampling
            against RL²'s; agents, how fast each kind collects its trials, against RL²; or memory,
            with ``--sim warp``: what ever more worlds take, with RL² in them.
        family: Task family; CheetahDir100 for maml and CheetahVel for the others if not given.
        worlds: Number of worlds; if not given 512 for sim, 800, 40 tasks of 20 rollouts, for maml,
            64 for the others.
        seconds: How long to measure, at least.
        threads: CPU threads; 0 takes all there are.
        sim: What simulates for sim, cpu or warp.
        device: Where Warp simulates, cpu or cuda.
        json: Where to write the figures.
    """
    if sim == "warp" or what == "memory":
        report = _bench_device(what, family or DEVICE_FAMILY, worlds, seconds, sim, device)
    else:
        chosen = CPU_BENCHES[what]
        report = chosen.measure(
            api.family(family or chosen.family),
            worlds=chosen.worlds if worlds is None else worlds,
            seconds=seconds,
            threads=threads,
        )
        print(chosen.show(report))
    if json is not None:
        write_json(json, report)


def _bench_device(
    what: str, family: str, worlds: int | None, seconds: float, sim: str, device: str
) -> dict[str, Any]:
    """Measure on Warp, and print what was found."""
    if what not in ("sim", "memory") or sim != "warp":
        raise MetarobotError(
            f"bench {what} with --sim {sim} measures nothing; on Warp there are: sim, memory"
        )
    # Warp is an optional package.
    from metarobot.bench.device_memory import bench_memory
    from metarobot.bench.device_speed import bench_device

    if what == "sim":
        count = DEVICE_WORLDS if worlds is None else worlds
        report = bench_device(api.family(family), worlds=count, seconds=seconds, device=device)
        print(tables.device_simulation_lines(report))
    else:
        count = MOST_DEVICE_WORLDS if worlds is None else worlds
        report = bench_memory(api.family(family), worlds=count, device=device)
        print(tables.memory_lines(report))
    return report
