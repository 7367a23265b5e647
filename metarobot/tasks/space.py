"""Tasks as data: what varies, by which distribution, in which split, and where it enters the
model.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metarobot.tasks.distributions import (
    Choice,
    Distribution,
    LogUniform,
    Mixture,
    TaskError,
    draw_rounded,
    from_data,
    to_data,
)
from metarobot.tasks.mujoco_models import Edit

SPLITS = ("train", "test", "interpolate", "extrapolate")


@dataclass(frozen=True, kw_only=True)
class Param:
    """One hidden parameter of a task."""

    name: str
    train: Distribution
    """What training and test tasks are drawn from."""
    held_out: tuple[float, float] | None = None
    """An open interval cut out of ``train``: training and test never draw it, ``interpolate`` draws
    nothing else."""
    extrapolation: Distribution | None = None
    """What ``extrapolate`` draws, outside of ``train``."""
    edits: tuple[Edit, ...] = ()
    """Where the value enters the model; empty if the family's functions read it instead."""
    edits_spec: bool = False
    """Whether the family's ``shape`` writes the value into the model: what no edit can say, as a
    terrain."""
    nuisance: bool = False
    """Whether the value means nothing by itself, as a seed does: it is left out of the encoding."""
    unit: str = ""
    doc: str = ""
    words: tuple[str, ...] = ()
    """What single values stand for, each "value word", e.g. "0 dead"."""

    def say(self, x: float) -> str:
        """Say a value as a person would, with its unit."""
        word = next(
            (w.partition(" ")[2] for w in self.words if float(w.partition(" ")[0]) == x), ""
        )
        value = word or f"{x:.3g} {self.unit}".strip().replace("-", "−")
        return f"{self.name.replace('_', ' ')} {value}"

    def contains(self, x: float) -> bool:
        """Say whether any split can draw ``x``."""
        return self.train.contains(x) or (
            self.extrapolation is not None and self.extrapolation.contains(x)
        )

    def in_held_out(self, x: float) -> bool:
        """Say whether ``x`` lies in the hole."""
        return self.held_out is not None and self.held_out[0] < x < self.held_out[1]

    def draw(self, rng: np.random.Generator, *, inside: bool = False) -> float:
        """Draw from ``train``, inside the hole or outside of it, to nine digits, the same on every
        machine.
        """
        for _ in range(100_000):
            x = draw_rounded(self.train, rng)
            if self.in_held_out(x) == inside:
                return x
        raise TaskError(
            f"{self.name}: nothing can be drawn {'inside' if inside else 'outside'} the hole {self.held_out}"
        )

    def bounds(self) -> str:
        """Say what values are allowed."""
        beyond = (
            ""
            if self.extrapolation is None
            else f", or {self.extrapolation.describe()} to extrapolate"
        )
        return self.train.describe() + beyond + (f" {self.unit}" if self.unit else "")


@dataclass(frozen=True)
class Task:
    """One draw of the hidden parameters. Compares and hashes by value."""

    space: str
    values: tuple[tuple[str, float], ...] = field(default=())

    def __getitem__(self, name: str) -> float:
        return self.as_dict()[name]

    def as_dict(self) -> dict[str, float]:
        """Return name -> value."""
        return dict(self.values)

    def describe(self) -> str:
        """Say the values in one line."""
        return ", ".join(f"{k} {v:.3g}" for k, v in self.values)


@dataclass(frozen=True, kw_only=True)
class SparseFaults:
    """Parameters of which only a few at a time depart from normal: one or two broken joints of
    twelve.

    Each is drawn from a ``Mixture`` whose first part is normal; the few that depart are drawn from
    its other parts.
    """

    params: tuple[str, ...]
    """Those that may depart."""
    least: int
    most: int
    """How many do, each number equally likely."""
    extrapolation_params: tuple[str, ...] = ()
    """Those that depart in ``extrapolate`` alone, and there no others do."""


@dataclass(frozen=True)
class TaskSpace:
    """What varies from task to task in a family, and the splits tasks are drawn from."""

    name: str
    params: tuple[Param, ...]
    sparse_faults: tuple[SparseFaults, ...] = ()

    def __post_init__(self) -> None:
        names = self.names
        for name in names:
            if names.count(name) > 1:
                raise TaskError(f"{self.name} has two parameters called {name!r}")
        for faults in self.sparse_faults:
            for name in (*faults.params, *faults.extrapolation_params):
                mixture = self.params[names.index(name)].train if name in names else None
                if not isinstance(mixture, Mixture) or len(mixture.parts) < 2:
                    raise TaskError(
                        f"{self.name}: {name!r} is not a parameter drawn from a mixture of two parts or more"
                    )
            if not 0 <= faults.least <= faults.most <= len(faults.params):
                raise TaskError(
                    f"{self.name}: {faults.least} to {faults.most} of {len(faults.params)} parameters cannot depart"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters, in order."""
        return tuple(p.name for p in self.params)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits this space can draw from: no hole, no ``interpolate``; nothing beyond, no
        ``extrapolate``.
        """
        has = {"train": True, "test": True}
        has["interpolate"] = any(p.held_out for p in self.params)
        has["extrapolate"] = any(p.extrapolation for p in self.params) or any(
            f.extrapolation_params for f in self.sparse_faults
        )
        return tuple(s for s in SPLITS if has[s])

    @property
    def finite(self) -> tuple[Task, ...] | None:
        """Every task, if there are finitely many (all parameters a choice), else None."""
        trains = [p.train for p in self.params]
        choices = [t.values for t in trains if isinstance(t, Choice)]
        if len(choices) < len(trains):
            return None
        rows = (dict(zip(self.names, row, strict=True)) for row in itertools.product(*choices))
        return tuple(
            self.task(**r) for r in rows if not any(p.in_held_out(r[p.name]) for p in self.params)
        )

    def sample(self, split: str, n: int, seed: int | Sequence[int] = 0) -> list[Task]:
        """Draw ``n`` tasks; the same split, n and seed give the same tasks on every machine.

        ``interpolate`` puts every parameter that has a hole inside it; ``extrapolate`` puts one
        parameter at a time beyond its training range. A finite space is gone through evenly in
        every split but ``train``.
        """
        self.check_split(split)
        if n < 1:
            raise TaskError(f"the number of tasks must be at least 1, not {n}")
        seeds = [int(s) for s in (seed if isinstance(seed, Sequence) else [seed])]
        if min(seeds) < 0:
            raise TaskError(f"a seed must be at least 0, not {min(seeds)}")
        rng = np.random.Generator(
            np.random.PCG64([zlib.crc32(self.name.encode()), SPLITS.index(split), *seeds])
        )
        if split == "test" and (all_tasks := self.finite) is not None:
            return [all_tasks[i % len(all_tasks)] for i in range(n)]
        return [self._draw(split, rng) for _ in range(n)]

    def _draw(self, split: str, rng: np.random.Generator) -> Task:
        values = {
            p.name: p.draw(rng, inside=split == "interpolate" and p.held_out is not None)
            for p in self.params
        }
        far: list[Param | SparseFaults] = []
        if split == "extrapolate":
            candidates: list[Param | SparseFaults] = [
                *(p for p in self.params if p.extrapolation is not None),
                *(f for f in self.sparse_faults if f.extrapolation_params),
            ]
            far = [candidates[int(rng.integers(len(candidates)))]]
        for faults in self.sparse_faults:
            values |= self._draw_faults(faults, rng, extrapolate=faults in far)
        for p in far:
            if isinstance(p, Param) and p.extrapolation is not None:
                values[p.name] = draw_rounded(p.extrapolation, rng)
        return Task(self.name, tuple(values.items()))

    def _draw_faults(
        self, faults: SparseFaults, rng: np.random.Generator, *, extrapolate: bool
    ) -> dict[str, float]:
        """Draw all of a group: those chosen from what is not normal, the others from what is.

        Of the ``spared``, at least one is.
        """
        names = faults.extrapolation_params if extrapolate else faults.params
        least = 1 if extrapolate else faults.least
        number = min(int(rng.integers(least, max(faults.most, least) + 1)), len(names))
        chosen = {names[i] for i in rng.permutation(len(names))[:number]}
        values = {}
        for name in (*faults.params, *faults.extrapolation_params):
            mixture = self.params[self.names.index(name)].train
            assert isinstance(mixture, Mixture)
            values[name] = draw_rounded(mixture.odd if name in chosen else mixture.parts[0], rng)
        return values

    def check_split(self, split: str) -> None:
        """Raise unless this space has that split."""
        if split not in self.splits:
            raise TaskError(f"{self.name} has no split {split!r}; it has: {', '.join(self.splits)}")

    def task(self, **values: float) -> Task:
        """Make a task from named values, checking names, bounds and finiteness."""
        for name in values:
            if name not in self.names:
                raise TaskError(
                    f"{self.name} has no parameter {name!r}; it has: {', '.join(self.names)}"
                )
        for p in self.params:
            if p.name not in values:
                raise TaskError(f"a {self.name} task needs a value for {p.name!r}")
            x = values[p.name]
            if (
                isinstance(x, bool)
                or not isinstance(x, int | float | np.floating | np.integer)
                or not math.isfinite(x)
            ):
                raise TaskError(f"{p.name} = {x!r} is not a finite number")
            if not p.contains(float(x)):
                raise TaskError(f"{p.name} = {x:g} is outside its bounds: {p.bounds()}")
        return Task(self.name, tuple((n, float(values[n])) for n in self.names))

    def coerce(self, task: Task | Mapping[str, float]) -> Task:
        """Check a task, given as a Task or as name -> value."""
        if isinstance(task, Task):
            if task.space != self.name:
                raise TaskError(f"that is a task of {task.space}, not of {self.name}")
            return self.task(**task.as_dict())
        if not isinstance(task, Mapping) or not all(isinstance(k, str) for k in task):
            raise TaskError(
                f"a {self.name} task maps {', '.join(self.names)} to values, unlike {task!r}"
            )
        return self.task(**task)

    def values(self, tasks: Iterable[Task]) -> Tensor:
        """Stack tasks as ``(task, parameter)`` float64, in the parameters' own units."""
        rows = [[told[n] for n in self.names] for told in (t.as_dict() for t in tasks)]
        return torch.tensor(rows, dtype=torch.float64)

    @property
    def width(self) -> int:
        """Length of a task's encoding."""
        return sum(not p.nuisance for p in self.params)

    def encode(self, tasks: Iterable[Task]) -> Tensor:
        """Stack tasks as ``(task, parameter)`` float32, each training range mapped to [−1, 1];
        nuisances left out.
        """
        x = self.values(tasks)
        for i, p in enumerate(self.params):
            low, high, column = p.train.low, p.train.high, x[:, i]
            if isinstance(p.train, LogUniform):
                low, high, column = math.log(low), math.log(high), column.log()
            x[:, i] = (2 * column - low - high) / max(high - low, 1e-9)
        return x[:, [i for i, p in enumerate(self.params) if not p.nuisance]].float()

    def decode(self, x: Tensor) -> list[dict[str, float]]:
        """Return the values, name -> value, that encodings ``(task, parameter)`` came from;
        nuisances are lost.
        """
        columns = {}
        for p, column in zip(
            (p for p in self.params if not p.nuisance), x.double().unbind(1), strict=True
        ):
            low, high = p.train.low, p.train.high
            if isinstance(p.train, LogUniform):
                low, high = math.log(low), math.log(high)
            value = (column * max(high - low, 1e-9) + low + high) / 2
            columns[p.name] = (value.exp() if isinstance(p.train, LogUniform) else value).tolist()
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def say(self, task: Task) -> str:
        """Say in one line what a task is, leaving out what is normal or means nothing."""
        grouped = {
            name
            for faults in self.sparse_faults
            for name in (*faults.params, *faults.extrapolation_params)
        }
        said = []
        for p in self.params:
            normal = (
                p.name in grouped
                and isinstance(p.train, Mixture)
                and p.train.parts[0].contains(task[p.name])
            )
            if not normal and not p.nuisance:
                said.append(p.say(task[p.name]))
        return "  ·  ".join(said)

    def describe(self) -> str:
        """Lay out for people what varies, where it enters, and what each split draws."""
        lines = [f"{self.name}: splits {', '.join(self.splits)}"]
        for p in self.params:
            unit = f" {p.unit}" if p.unit else ""
            lines.append(
                f"  {p.name}{unit}: {p.train.describe()}" + (f"  ({p.doc})" if p.doc else "")
            )
            for label, value in (
                (
                    "enters",
                    "; ".join(e.describe() for e in p.edits)
                    or ("shape" if p.edits_spec else "the reward"),
                ),
                (
                    "interpolate",
                    f"inside ({p.held_out[0]:g}, {p.held_out[1]:g}), cut out of training"
                    if p.held_out
                    else "",
                ),
                ("extrapolate", p.extrapolation.describe() if p.extrapolation else ""),
            ):
                if value:
                    lines.append(f"    {label}: {value}")
        for faults in self.sparse_faults:
            lines.append(
                f"  {faults.least} to {faults.most} depart from their first part, of {', '.join(faults.params)}"
            )
            if faults.extrapolation_params:
                lines.append(
                    f"    extrapolate: of {', '.join(faults.extrapolation_params)}, which training spares"
                )
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the space as plain JSON data, with its hash."""
        params = [_param_to_data(p) for p in self.params]
        few = (
            {"few": [_faults_to_data(f) for f in self.sparse_faults]} if self.sparse_faults else {}
        )
        plain = json.loads(json.dumps({"name": self.name, "params": params, **few}))
        return {**plain, "hash": _digest(plain)}

    @property
    def hash(self) -> str:
        """Twelve hexadecimal digits that change whenever anything in the space does."""
        return str(self.to_json()["hash"])

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TaskSpace:
        """Read a space back; raise if its hash does not match what it holds."""
        try:
            plain = {k: data[k] for k in ("name", "params", "few") if k != "few" or k in data}
            if _digest(plain) != data["hash"]:
                raise TaskError(
                    f"the task space {data['name']!r} was changed after it was written: its hash differs"
                )
            few = tuple(_load_faults(f) for f in data.get("few", ()))
            return cls(data["name"], tuple(_load_param(p) for p in data["params"]), few)
        except (KeyError, TypeError, ValueError) as e:
            raise TaskError(f"not a task space: {e!r}") from e


FILE_KEYS = {
    "held_out": "hole",
    "extrapolation": "beyond",
    "edits_spec": "shapes",
    "extrapolation_params": "spared",
}
"""Field -> its key in ``tasks.json``, where the two differ: files written by earlier versions stay
readable."""


def _param_to_data(p: Param) -> dict[str, Any]:
    """Return a parameter as plain data; flags that are not set are left out, since older files lack
    them.
    """
    data = {FILE_KEYS.get(k, k): v for k, v in asdict(p).items()}
    data["train"] = to_data(p.train)
    data["beyond"] = None if p.extrapolation is None else to_data(p.extrapolation)
    return {k: v for k, v in data.items() if v or k not in ("shapes", "nuisance", "words")}


def _faults_to_data(faults: SparseFaults) -> dict[str, Any]:
    return {FILE_KEYS.get(k, k): v for k, v in asdict(faults).items()}


def _digest(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


def _load_param(data: Mapping[str, Any]) -> Param:
    field_of = {key: name for name, key in FILE_KEYS.items()}
    values = {field_of.get(k, k): v for k, v in data.items()}
    values["train"] = from_data(data["train"])
    values["extrapolation"] = None if data["beyond"] is None else from_data(data["beyond"])
    values["held_out"] = None if data["hole"] is None else tuple(data["hole"])
    values["edits"] = tuple(Edit(**e) for e in data["edits"])
    values["words"] = tuple(data.get("words", ()))
    return Param(**values)


def _load_faults(data: Mapping[str, Any]) -> SparseFaults:
    return SparseFaults(
        params=tuple(data["params"]),
        least=data["least"],
        most=data["most"],
        extrapolation_params=tuple(data["spared"]),
    )


def parse_assignments(words: Iterable[str]) -> dict[str, float]:
    """Read ``name=value`` words, as a task is given on the command line."""
    values = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            values[name] = float(value)
        except ValueError:
            raise TaskError(f"{word!r} is not name=value with a number") from None
    return values
