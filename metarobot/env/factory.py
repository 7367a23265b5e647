"""The choice of a simulator for a family, and the environment built on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from metarobot.env.base import Env
from metarobot.errors import MetarobotError
from metarobot.tasks.family import Family
from metarobot.tasks.space import Task

SIMS = ("cpu", "warp")
"""The simulators: MuJoCo on the CPU, and MuJoCo Warp on a device."""


def choose_simulator(family: Family, sim: str, device: str) -> tuple[str, str]:
    """Choose the simulator, unless ``sim`` names it; return its name and the reason, one line.

    Warp is chosen on an accelerator where it can run the family, the CPU otherwise.

    Raises:
        MetarobotError: An unknown simulator.
    """
    if sim not in ("", *SIMS):
        raise MetarobotError(f"no simulator called {sim!r}; there are: {', '.join(SIMS)}")
    if sim or device == "cpu":
        chosen = sim or "cpu"
        return chosen, f"physics: {chosen} on {'cpu' if sim == 'cpu' else device}, as asked"

    try:
        from metarobot.env.device import bytes_per_world

        bytes_per_world(family, device)
    except MetarobotError as e:
        return "cpu", f"physics: cpu, as Warp cannot: {e}"
    return "warp", f"physics: warp on {device}; Warp is installed and runs {family.name}"


def check_simulator(family: Family, sim: str, device: str, worlds: int) -> None:
    """Check that the simulator can run so many worlds of the family.

    Raises:
        MetarobotError: It cannot run the family here, or the worlds do not fit its memory.
    """
    if sim == "warp":
        from metarobot.env.device import check_memory

        check_memory(family, worlds, device)


def make_env(
    family: Family,
    tasks: Sequence[Task | Mapping[str, float]],
    *,
    sim: str = "cpu",
    device: str = "cpu",
    seed: int = 0,
    threads: int = 0,
    pool: Sequence[Task] = (),
) -> Env:
    """Build an environment with one world for each task, on the simulator that ``sim`` names.

    Args:
        family: What is simulated, observed and rewarded.
        tasks: One task a world.
        sim: ``cpu`` (MuJoCo) or ``warp`` (MuJoCo Warp).
        device: Where Warp simulates, ``cpu`` or ``cuda``; MuJoCo itself runs on the CPU.
        seed: Keys the starts and the noise of the observations.
        threads: Threads of MuJoCo on the CPU; 0 takes all there are.
        pool: Tasks that worlds will be given later; on a device their models are uploaded at once.

    Raises:
        MetarobotError: An unknown simulator, or one that cannot run this family here.
    """
    if sim not in SIMS:
        raise MetarobotError(f"no simulator called {sim!r}; there are: {', '.join(SIMS)}")
    if sim == "cpu":
        return Env(family, tasks, seed=seed, threads=threads)

    from metarobot.env.device import DeviceEnv  # Warp is optional, and slow to import

    return DeviceEnv(family, tasks, device=device, seed=seed, pool=pool)
