"""Batched physics behind one protocol, on the CPU and on a GPU."""

from typing import NoReturn

_NEW_PLACES = {
    "Sim": "metarobot.sim.simulator.Sim",
    "Rows": "metarobot.sim.simulator.WorldSelection",
}
"""Names that this package had before; the hints go with the next release."""


def __getattr__(name: str) -> NoReturn:
    """Name the new place of what was moved from here."""
    if name in _NEW_PLACES:
        raise ImportError(f"metarobot.sim.{name} is {_NEW_PLACES[name]} now: import from there")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
