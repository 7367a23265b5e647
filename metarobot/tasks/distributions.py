"""The distributions that hidden parameters are drawn from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from metarobot.errors import MetarobotError


class TaskError(MetarobotError):
    """An unknown parameter or split, or a value outside its bounds."""


@dataclass(frozen=True)
class Uniform:
    """Uniform on [low, high]."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise TaskError(f"a uniform range needs low <= high, not [{self.low:g}, {self.high:g}]")

    def sample(self, rng: np.random.Generator) -> float:
        """Draw one value."""
        return float(rng.uniform(self.low, self.high))

    def contains(self, x: float) -> bool:
        """Return whether ``x`` can be drawn."""
        return self.low <= x <= self.high

    def describe(self) -> str:
        """Return it for people, in a few characters."""
        return f"U[{self.low:g}, {self.high:g}]"


@dataclass(frozen=True)
class LogUniform:
    """Log-uniform on [low, high], both positive: as likely to halve as to double."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high:
            raise TaskError(
                f"a log-uniform range needs 0 < low <= high, not [{self.low:g}, {self.high:g}]"
            )

    def sample(self, rng: np.random.Generator) -> float:
        """Draw one value."""
        x = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        return min(max(x, self.low), self.high)

    def contains(self, x: float) -> bool:
        """Return whether ``x`` can be drawn."""
        return self.low <= x <= self.high

    def describe(self) -> str:
        """Return it for people, in a few characters."""
        return f"logU[{self.low:g}, {self.high:g}]"


@dataclass(frozen=True)
class Choice:
    """One of a few values, equally likely."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise TaskError("a choice needs at least one value")

    def sample(self, rng: np.random.Generator) -> float:
        """Draw one value."""
        return float(self.values[int(rng.integers(len(self.values)))])

    def contains(self, x: float) -> bool:
        """Return whether ``x`` can be drawn."""
        return x in self.values

    @property
    def low(self) -> float:
        """The smallest value."""
        return min(self.values)

    @property
    def high(self) -> float:
        """The largest value."""
        return max(self.values)

    def describe(self) -> str:
        """Return it for people, in a few characters."""
        return "{" + ", ".join(f"{v:g}" for v in self.values) + "}"


@dataclass(frozen=True)
class Mixture:
    """One of several distributions, drawn by weight, as most motors healthy and some dead."""

    weights: tuple[float, ...]
    parts: tuple[Uniform | LogUniform | Choice, ...]

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.parts) or min(self.weights) <= 0:
            raise TaskError(
                f"a mixture needs one positive weight a part, not {self.weights} for "
                f"{len(self.parts)} parts"
            )

    def sample(self, rng: np.random.Generator) -> float:
        """Draw one value."""
        edges = np.cumsum(self.weights) / sum(self.weights)
        index = int(np.searchsorted(edges, rng.uniform(), side="right"))
        last = len(self.parts) - 1  # the last edge may round to just below 1
        return self.parts[min(index, last)].sample(rng)

    def contains(self, x: float) -> bool:
        """Return whether ``x`` can be drawn."""
        return any(p.contains(x) for p in self.parts)

    @property
    def low(self) -> float:
        """The smallest value of any part."""
        return min(p.low for p in self.parts)

    @property
    def high(self) -> float:
        """The largest value of any part."""
        return max(p.high for p in self.parts)

    @property
    def without_first(self) -> Mixture:
        """The mixture of all parts but the first."""
        return Mixture(self.weights[1:], self.parts[1:])

    def describe(self) -> str:
        """Return it for people, in a few characters."""
        total = sum(self.weights)
        return " + ".join(
            f"{w / total:.0%} {p.describe()}" for w, p in zip(self.weights, self.parts, strict=True)
        )


Distribution = Uniform | LogUniform | Choice | Mixture

_KINDS: dict[str, Any] = {
    "uniform": Uniform,
    "log_uniform": LogUniform,
    "choice": Choice,
    "mixture": Mixture,
}
"""Name of a distribution in ``tasks.json`` -> its class."""


def draw_rounded(distribution: Distribution, rng: np.random.Generator) -> float:
    """Draw a value of nine digits, so that it is the same on every machine.

    Where rounding would leave the distribution, as for a choice of 1/3, all digits are kept.
    """
    x = distribution.sample(rng)
    rounded = float(f"{x:.9g}")
    return rounded if distribution.contains(rounded) else x


def to_data(distribution: Distribution) -> dict[str, Any]:
    """Return a distribution as plain data."""
    kind = next(name for name, cls in _KINDS.items() if cls is type(distribution))
    if isinstance(distribution, Mixture):
        parts = [to_data(part) for part in distribution.parts]
        return {"kind": kind, "weights": distribution.weights, "parts": parts}
    return {"kind": kind, **asdict(distribution)}


def from_data(data: Mapping[str, Any]) -> Any:
    """Read a distribution back from plain data.

    Raises:
        TaskError: An unknown kind, or values that make no distribution.
    """
    if data["kind"] not in _KINDS:
        raise TaskError(f"no distribution called {data['kind']!r}; there are: {', '.join(_KINDS)}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k != "kind"}
    if "parts" in values:
        values["parts"] = tuple(from_data(part) for part in values["parts"])
    return _KINDS[data["kind"]](**values)
