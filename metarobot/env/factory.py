"""Which backend simulates a family, and building its environment."""

from __future__ import annotations

from metarobot.errors import MetarobotError
from metarobot.tasks.family import Family

SIMS = ("cpu", "warp")


def choose_simulator(family: Family, sim: str, device: str) -> tuple[str, str]:
    """Choose the simulator, unless ``sim`` names it: Warp on an accelerator, where it can; say which and why."""
    if sim not in ("", *SIMS):
        raise MetarobotError(f"no simulator called {sim!r}; there are: {', '.join(SIMS)}")
    if sim or device == "cpu":
        return sim or "cpu", f"physics: {sim or 'cpu'} on {'cpu' if sim == 'cpu' else device}, as asked"
    try:
        from metarobot.env.device import bytes_per_world

        bytes_per_world(family, device)
    except MetarobotError as e:
        return "cpu", f"physics: cpu, as Warp cannot: {e}"
    return "warp", f"physics: warp on {device}; Warp is installed and runs {family.name}"


def check_simulator(family: Family, sim: str, device: str, worlds: int) -> None:
    """Raise where so many worlds of the family cannot be had."""
    if sim == "warp":
        from metarobot.env.device import check_memory

        check_memory(family, worlds, device)
