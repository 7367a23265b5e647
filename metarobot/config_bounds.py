"""Bounds of configuration values, stated on the field and checked in one place."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from metarobot.errors import MetarobotError


@dataclass(frozen=True)
class Bounds:
    """The smallest and the largest value that a field may have; None is no bound."""

    low: float | None = None
    high: float | None = None
    reason: str = ""
    """Why there is a lower bound, as a message says it after the bound."""
    most: float | None = None
    """The largest value that a memory can be expected to hold."""


Count = Annotated[int, Bounds(1, most=1e7)]
"""A whole number of at least 1."""
CountOrZero = Annotated[int, Bounds(0, most=1e15)]
"""A whole number of at least 0."""
LayerSize = Annotated[int, Bounds(1, most=4096)]
"""Units of a network's layer; a matrix between two of the largest takes 67 MB."""
NonNegative = Annotated[float, Bounds(0, most=1e15)]
"""A finite number of at least 0."""
Fraction = Annotated[float, Bounds(0, 1)]
"""A number between 0 and 1."""

LONG_NUMBER = 10**20
"""Whole numbers from here on are not written out in messages."""

UNSTATED_INT = Bounds(1, most=1e7)
"""Bounds of a whole number whose field states none."""
UNSTATED_FLOAT = Bounds(0, most=1e15)
"""Bounds of a float whose field states none."""


def check_bounds(config: Any) -> None:
    """Check every number of a configuration dataclass against the bounds on its field.

    A field that states no bounds holds a whole number of at least 1, or a finite float of at least
    0. ``Annotated[float, Bounds()]`` allows any finite number.

    Raises:
        MetarobotError: A number outside its bounds, or a float that is not finite.
    """
    hints = get_type_hints(type(config), include_extras=True)
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        unstated = UNSTATED_INT if isinstance(value, int) else UNSTATED_FLOAT
        _check_number(field.name, value, _stated_bounds(hints[field.name]) or unstated)


def _stated_bounds(hint: Any) -> Bounds | None:
    if get_origin(hint) is Annotated:
        return next((x for x in get_args(hint)[1:] if isinstance(x, Bounds)), None)
    return None


def _check_number(name: str, value: float, bounds: Bounds) -> None:
    low = bounds.low
    high = bounds.high
    # Python's whole numbers may be larger than any float.
    if isinstance(value, float) and not math.isfinite(value):
        least = "" if low is None else f" of at least {low:g}"
        raise MetarobotError(f"{name} must be a finite number{least}, not {value}")
    if low is not None and high is not None and not low <= value <= high:
        raise MetarobotError(f"{name} must be between {low:g} and {high:g}, not {value:g}")
    if low is not None and value < low:
        finite = "a finite number of " if isinstance(value, float) else ""
        reason = f", {bounds.reason}" if bounds.reason else ""
        raise MetarobotError(f"{name} must be {finite}at least {low:g}{reason}, not {value}")
    largest = bounds.most if high is None else high
    if largest is not None and value > largest:
        raise MetarobotError(f"{name} must be at most {largest:,.12g}, not {_shorten(value)}")


def _shorten(value: float) -> str:
    is_long = isinstance(value, int) and value >= LONG_NUMBER
    return "a larger number" if is_long else str(value)
