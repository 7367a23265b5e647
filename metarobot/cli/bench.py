"""``metarobot bench``: speed and memory, beside what they could be."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from metarobot.errors import MetarobotError

DEFAULT_FAMILY = "CheetahVel"
MAML_FAMILY = "CheetahDir100"
"""Episodes of 100 steps: its trials are those of Finn et al. (2017)."""


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
    """Measure the speed of an environment, of an agent's learning or of sampling, or memory.

    Everything is measured in turns with what it could reach: the bare physics engine, bare matrix
    products, or RL².

    Args:
        what: sim, the environment's step loop with a model of its own in each world; maml, the
            sampling, inner step and outer update of MAML-TRPO, and the same with a Python loop over
            tasks; pearl, its gradient steps against their bare matrix products, and its sampling
            against RL²'s; agents, how fast each kind collects its trials, against RL²; or memory,
            with ``--sim warp``: what ever more worlds take, with RL² in them.
        family: Task family; CheetahDir100 for maml and CheetahVel for the others if not given.
        worlds: Number of worlds; if not given 512 for sim (8192 on Warp), 800, 40 tasks of 20
            rollouts, for maml, 64 for pearl and agents, and up to 1048576 for memory.
        seconds: How long to measure, at least.
        threads: CPU threads; 0 takes all there are.
        sim: What simulates for sim, cpu or warp.
        device: Where Warp simulates, cpu or cuda.
        json: Where to write the figures.
    """
    on_device = sim == "warp"
    if (on_device or what == "memory") and not (on_device and what in ("sim", "memory")):
        raise MetarobotError(
            f"bench {what} with --sim {sim} measures nothing; on Warp there are: sim, memory"
        )
    if on_device:
        report, text = _bench_on_device(what, family or DEFAULT_FAMILY, worlds, seconds, device)
    else:
        report, text = _bench_on_cpu(what, family, worlds, seconds, threads)
    print(text)
    if json is not None:
        from metarobot.files import write_json

        write_json(json, report)


# Benches import torch and the simulators, which the command line does not for --help.


def _bench_on_cpu(
    what: str, family: str, worlds: int | None, seconds: float, threads: int
) -> tuple[dict[str, Any], str]:
    """Measure on the CPU; return the figures and their table."""
    from metarobot.bench import tables
    from metarobot.bench.collection_speed import bench_agents
    from metarobot.bench.maml_speed import bench_maml
    from metarobot.bench.pearl_speed import bench_pearl
    from metarobot.bench.simulation_speed import bench_sim
    from metarobot.tasks.family import families

    measure, table, default_family, default_worlds = {
        "sim": (bench_sim, tables.simulation_lines, DEFAULT_FAMILY, 512),
        "maml": (bench_maml, tables.maml_table, MAML_FAMILY, 800),
        "pearl": (bench_pearl, tables.pearl_lines, DEFAULT_FAMILY, 64),
        "agents": (bench_agents, tables.collection_table, DEFAULT_FAMILY, 64),
    }[what]
    report = measure(
        families.get(family or default_family),
        worlds=default_worlds if worlds is None else worlds,
        seconds=seconds,
        threads=threads,
    )
    return report, table(report)


def _bench_on_device(
    what: str, family: str, worlds: int | None, seconds: float, device: str
) -> tuple[dict[str, Any], str]:
    """Measure on Warp; return the figures and their table."""
    from metarobot.bench import tables
    from metarobot.bench.device_memory import bench_memory
    from metarobot.bench.device_speed import bench_device
    from metarobot.tasks.family import families

    if what == "sim":
        count = 8192 if worlds is None else worlds
        report = bench_device(families.get(family), worlds=count, seconds=seconds, device=device)
        return report, tables.device_simulation_lines(report)
    most = 2**20 if worlds is None else worlds
    report = bench_memory(families.get(family), worlds=most, device=device)
    return report, tables.memory_lines(report)
