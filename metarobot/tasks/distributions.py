"""What a hidden parameter is drawn from."""

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
        """Say whether ``x`` can be drawn."""
        return self.low <= x <= self.high

    def describe(self) -> str:
        """Say it in a few characters."""
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
        """Say whether ``x`` can be drawn."""
        return self.low <= x <= self.high

    def describe(self) -> str:
        """Say it in a few characters."""
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
        """Say whether ``x`` can be drawn."""
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
        """Say it in a few characters."""
        return "{" + ", ".join(f"{v:g}" for v in self.values) + "}"


@dataclass(frozen=True)
class Mixture:
    """One of several distributions, drawn by weight: most motors healthy, some dead, some
    reversed.
    """

    weights: tuple[float, ...]
    parts: tuple[Uniform | LogUniform | Choice, ...]

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.parts) or min(self.weights) <= 0:
            raise TaskError(
                f"a mixture needs one positive weight a part, not {self.weights} for {len(self.parts)}"
            )

    def sample(self, rng: np.random.Generator) -> float:
        """Draw one value."""
        edges = np.cumsum(self.weights) / sum(self.weights)
        part = min(int(np.searchsorted(edges, rng.uniform(), side="right")), len(self.parts) - 1)
        return self.parts[part].sample(rng)

    def contains(self, x: float) -> bool:
        """Say whether ``x`` can be drawn."""
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
    def odd(self) -> Mixture:
        """All parts but the first."""
        return Mixture(self.weights[1:], self.parts[1:])

    def describe(self) -> str:
        """Say it in a few characters."""
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


def draw_rounded(distribution: Distribution, rng: np.random.Generator) -> float:
    """Draw to nine digits, or in full where rounding would leave the distribution, as it does for a
    choice of 1/3.
    """
    x = distribution.sample(rng)
    rounded = float(f"{x:.9g}")
    return rounded if distribution.contains(rounded) else x


def to_data(d: Distribution) -> dict[str, Any]:
    """Return a distribution as plain data."""
    kind = next(k for k, c in _KINDS.items() if c is type(d))
    if isinstance(d, Mixture):
        return {"kind": kind, "weights": d.weights, "parts": [to_data(p) for p in d.parts]}
    return {"kind": kind, **asdict(d)}


def from_data(data: Mapping[str, Any]) -> Any:
    """Read a distribution back from plain data."""
    if data["kind"] not in _KINDS:
        raise TaskError(f"no distribution called {data['kind']!r}; there are: {', '.join(_KINDS)}")
    args = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k != "kind"}
    if "parts" in args:
        args["parts"] = tuple(from_data(p) for p in args["parts"])
    return _KINDS[data["kind"]](**args)
