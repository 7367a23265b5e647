"""Tasks as data: what varies, by which distribution, in which split, and where it enters."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from metarobot.lazy import lazy_module
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
from metarobot.tasks.model_edits import Edit

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")  # describing a task space does without it

SPLITS = ("train", "test", "interpolate", "extrapolate")
_MAX_DRAWS = 100_000
"""Rejected draws after which a distribution is taken to lie inside (or outside) its held-out
interval altogether."""


@dataclass(frozen=True, kw_only=True)
class Param:
    """One hidden parameter of a task."""

    name: str
    train: Distribution
    """What training and test tasks are drawn from."""
    held_out: tuple[float, float] | None = None
    """An open interval cut out of ``train``: training and test never draw from it, ``interpolate``
    draws from nothing else."""
    extrapolation: Distribution | None = None
    """What ``extrapolate`` draws from, outside of ``train``."""
    edits: tuple[Edit, ...] = ()
    """Where the value enters the model; empty if the family's functions read it instead."""
    edits_spec: bool = False
    """Whether the family's ``edit_spec`` writes the value into the model, as no edit can: a
    terrain, for example."""
    nuisance: bool = False
    """Whether the value means nothing by itself, as a seed does: it is left out of the encoding."""
    unit: str = ""
    doc: str = ""
    words: tuple[str, ...] = ()
    """Names of single values, each "value name", e.g. "0 dead"."""

    def describe_value(self, x: float) -> str:
        """Return the parameter's name and a value for people, with its unit or its own name."""
        names = {float(w.partition(" ")[0]): w.partition(" ")[2] for w in self.words}
        value = names.get(x) or f"{x:.3g} {self.unit}".strip().replace("-", "−")
        return f"{self.name.replace('_', ' ')} {value}"

    def contains(self, x: float) -> bool:
        """Return whether any split can draw ``x``."""
        if self.train.contains(x):
            return True
        return self.extrapolation is not None and self.extrapolation.contains(x)

    def in_held_out(self, x: float) -> bool:
        """Return whether ``x`` lies in the held-out interval."""
        return self.held_out is not None and self.held_out[0] < x < self.held_out[1]

    def draw(self, rng: np.random.Generator, *, inside: bool = False) -> float:
        """Draw from ``train``, inside or outside of the held-out interval.

        Values have nine digits, so that they are the same on every machine.

        Raises:
            TaskError: There is nothing to draw.
        """
        for _ in range(_MAX_DRAWS):
            x = draw_rounded(self.train, rng)
            if self.in_held_out(x) == inside:
                return x
        raise TaskError(
            f"{self.name}: nothing can be drawn {'inside' if inside else 'outside'} the held-out "
            f"interval {self.held_out}"
        )

    def bounds(self) -> str:
        """Return the allowed values for people, in one line."""
        text = self.train.describe()
        if self.extrapolation is not None:
            text += f", or {self.extrapolation.describe()} to extrapolate"
        return f"{text} {self.unit}" if self.unit else text


@dataclass(frozen=True)
class Task:
    """One draw of the hidden parameters. Compares and hashes by value."""

    space: str
    """Name of its task space."""
    values: tuple[tuple[str, float], ...] = field(default=())
    """(name, value) of each parameter, in the order of the space."""

    def __getitem__(self, name: str) -> float:
        return self.as_dict()[name]

    def as_dict(self) -> dict[str, float]:
        """Return name -> value."""
        return dict(self.values)

    def describe(self) -> str:
        """Return the values for people, in one line."""
        return ", ".join(f"{k} {v:.3g}" for k, v in self.values)


@dataclass(frozen=True, kw_only=True)
class SparseFaults:
    """Parameters of which only a few at a time are faulty, as one or two broken joints of twelve.

    Each of them has a ``Mixture`` whose first part is the normal range. The faulty ones are drawn
    from its other parts, all the others from the first.
    """

    params: tuple[str, ...]
    """Those that may be faulty."""
    least: int
    """Smallest number of faults."""
    most: int
    """Largest number of faults; each number is equally likely."""
    extrapolation_params: tuple[str, ...] = ()
    """Those that are faulty in ``extrapolate`` alone, where no others are."""


@dataclass(frozen=True)
class TaskSpace:
    """What varies from task to task in a family, and the splits that tasks are drawn from.

    Raises:
        TaskError: Two parameters of one name, or sparse faults that name no mixture.
    """

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
                        f"{self.name}: {name!r} is not a parameter drawn from a mixture of two "
                        "parts or more"
                    )
            if not 0 <= faults.least <= faults.most <= len(faults.params):
                raise TaskError(
                    f"{self.name}: there cannot be {faults.least} to {faults.most} faults among "
                    f"{len(faults.params)} parameters"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters, in order."""
        return tuple(p.name for p in self.params)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits this space can draw from.

        ``interpolate`` needs a held-out interval, ``extrapolate`` something outside of training.
        """
        extrapolates = any(p.extrapolation for p in self.params) or any(
            f.extrapolation_params for f in self.sparse_faults
        )
        has = {
            "train": True,
            "test": True,
            "interpolate": any(p.held_out for p in self.params),
            "extrapolate": extrapolates,
        }
        return tuple(s for s in SPLITS if has[s])

    @property
    def finite(self) -> tuple[Task, ...] | None:
        """Every task, if there are finitely many (all parameters a choice), else None."""
        choices = [p.train.values for p in self.params if isinstance(p.train, Choice)]
        if len(choices) < len(self.params):
            return None

        tasks = []
        for row in itertools.product(*choices):
            values = dict(zip(self.names, row, strict=True))
            if not any(p.in_held_out(values[p.name]) for p in self.params):
                tasks.append(self.task(**values))
        return tuple(tasks)

    def sample(self, split: str, n: int, seed: int | Sequence[int] = 0) -> list[Task]:
        """Draw ``n`` tasks; the same split, n and seed give the same tasks on every machine.

        ``interpolate`` draws every parameter that has a held-out interval from inside it;
        ``extrapolate`` draws one parameter at a time from outside of its training range. The test
        split of a finite space lists all its tasks in order, again and again.

        Raises:
            TaskError: An unknown split, no tasks, or a negative seed.
        """
        self.check_split(split)
        if n < 1:
            raise TaskError(f"the number of tasks must be at least 1, not {n}")
        seeds = [int(s) for s in (seed if isinstance(seed, Sequence) else [seed])]
        if min(seeds) < 0:
            raise TaskError(f"a seed must be at least 0, not {min(seeds)}")

        if split == "test" and (all_tasks := self.finite) is not None:
            return [all_tasks[i % len(all_tasks)] for i in range(n)]
        # Space and split are part of the key, so that no two share their random numbers. CRC
        # is used as Python's own hash of a string differs from process to process.
        key = [zlib.crc32(self.name.encode()), SPLITS.index(split), *seeds]
        rng = np.random.Generator(np.random.PCG64(key))
        return [self._draw(split, rng) for _ in range(n)]

    def _draw(self, split: str, rng: np.random.Generator) -> Task:
        # The order of the draws is part of the format: it decides which tasks a seed gives.
        interpolate = split == "interpolate"
        values = {
            p.name: p.draw(rng, inside=interpolate and p.held_out is not None) for p in self.params
        }

        # What is drawn from outside of training: one parameter, or one group of sparse faults.
        outside: Param | SparseFaults | None = None
        if split == "extrapolate":
            candidates: list[Param | SparseFaults] = [
                *(p for p in self.params if p.extrapolation is not None),
                *(f for f in self.sparse_faults if f.extrapolation_params),
            ]
            outside = candidates[int(rng.integers(len(candidates)))]

        # Drawn again: above, each parameter was drawn by itself.
        for faults in self.sparse_faults:
            values |= self._draw_faults(faults, rng, extrapolate=faults == outside)
        if isinstance(outside, Param) and outside.extrapolation is not None:
            values[outside.name] = draw_rounded(outside.extrapolation, rng)
        return Task(self.name, tuple(values.items()))

    def _draw_faults(
        self, faults: SparseFaults, rng: np.random.Generator, *, extrapolate: bool
    ) -> dict[str, float]:
        """Draw all parameters of a group: faulty ones from the mixture's other parts.

        When extrapolating there is at least one fault.
        """
        names = faults.extrapolation_params if extrapolate else faults.params
        least = 1 if extrapolate else faults.least
        number = min(int(rng.integers(least, max(faults.most, least) + 1)), len(names))
        faulty = {names[i] for i in rng.permutation(len(names))[:number]}

        values = {}
        for name in (*faults.params, *faults.extrapolation_params):
            mixture = self.params[self.names.index(name)].train
            assert isinstance(mixture, Mixture)
            part = mixture.without_first if name in faulty else mixture.parts[0]
            values[name] = draw_rounded(part, rng)
        return values

    def check_split(self, split: str) -> None:
        """Check that this space has a split.

        Raises:
            TaskError: It has not; the message lists those it has.
        """
        if split not in self.splits:
            raise TaskError(f"{self.name} has no split {split!r}; it has: {', '.join(self.splits)}")

    def task(self, **values: float) -> Task:
        """Make a task from named values.

        Raises:
            TaskError: An unknown or missing name, or a value that is not finite or out of bounds.
        """
        for name in values:
            if name not in self.names:
                raise TaskError(
                    f"{self.name} has no parameter {name!r}; it has: {', '.join(self.names)}"
                )

        for p in self.params:
            if p.name not in values:
                raise TaskError(f"a {self.name} task needs a value for {p.name!r}")
            x = values[p.name]
            # True and False are integers to Python.
            is_number = isinstance(x, int | float | np.floating | np.integer)
            if isinstance(x, bool) or not is_number or not math.isfinite(x):
                raise TaskError(f"{p.name} = {x!r} is not a finite number")
            if not p.contains(float(x)):
                raise TaskError(f"{p.name} = {x:g} is outside its bounds: {p.bounds()}")
        return Task(self.name, tuple((n, float(values[n])) for n in self.names))

    def coerce(self, task: Task | Mapping[str, float]) -> Task:
        """Check a task, given as a ``Task`` or as name -> value.

        Raises:
            TaskError: It is not a task of this space.
        """
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
        rows = []
        for task in tasks:
            values = task.as_dict()
            rows.append([values[n] for n in self.names])
        return torch.tensor(rows, dtype=torch.float64)

    @property
    def width(self) -> int:
        """Length of a task's encoding."""
        return sum(not p.nuisance for p in self.params)

    def encode(self, tasks: Iterable[Task]) -> Tensor:
        """Stack tasks as ``(task, parameter)`` float32, each training range mapped to [−1, 1].

        Log-uniform parameters are mapped by their logarithm; nuisances are left out.
        """
        x = self.values(tasks)
        for i, p in enumerate(self.params):
            low = p.train.low
            high = p.train.high
            column = x[:, i]
            if isinstance(p.train, LogUniform):
                low = math.log(low)
                high = math.log(high)
                column = column.log()
            # x̂ = (2x − low − high) / (high − low)
            x[:, i] = (2 * column - low - high) / max(high - low, 1e-9)
        return x[:, [i for i, p in enumerate(self.params) if not p.nuisance]].float()

    def decode(self, x: Tensor) -> list[dict[str, float]]:
        """Return the values, name -> value, of encodings ``(task, parameter)``.

        Nuisances are lost.
        """
        encoded = [p for p in self.params if not p.nuisance]
        columns = {}
        for p, column in zip(encoded, x.double().unbind(1), strict=True):
            low = p.train.low
            high = p.train.high
            is_log = isinstance(p.train, LogUniform)
            if is_log:
                low = math.log(low)
                high = math.log(high)
            # x = (x̂ (high − low) + low + high) / 2
            value = (column * max(high - low, 1e-9) + low + high) / 2
            columns[p.name] = (value.exp() if is_log else value).tolist()
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def describe_task(self, task: Task) -> str:
        """Return what is special about a task for people, in one line.

        Sparse faults that are in their normal range, and nuisances, are left out.
        """
        may_be_faulty = {
            name
            for faults in self.sparse_faults
            for name in (*faults.params, *faults.extrapolation_params)
        }
        described = []
        for p in self.params:
            is_normal = (
                p.name in may_be_faulty
                and isinstance(p.train, Mixture)
                and p.train.parts[0].contains(task[p.name])
            )
            if not is_normal and not p.nuisance:
                described.append(p.describe_value(task[p.name]))
        return "  ·  ".join(described)

    def describe(self) -> str:
        """Return for people what varies, where it enters, and what each split draws from."""
        lines = [f"{self.name}: splits {', '.join(self.splits)}"]
        for p in self.params:
            unit = f" {p.unit}" if p.unit else ""
            doc = f"  ({p.doc})" if p.doc else ""
            lines.append(f"  {p.name}{unit}: {p.train.describe()}{doc}")

            edits = "; ".join(e.describe() for e in p.edits)
            elsewhere = "the model's specification" if p.edits_spec else "the reward"
            lines.append(f"    enters: {edits or elsewhere}")
            if p.held_out:
                low, high = p.held_out
                lines.append(f"    interpolate: held-out interval ({low:g}, {high:g}) of training")
            if p.extrapolation:
                lines.append(f"    extrapolate: {p.extrapolation.describe()}")

        for faults in self.sparse_faults:
            lines.append(
                f"  sparse faults: {faults.least} to {faults.most} at a time among "
                f"{', '.join(faults.params)}"
            )
            if faults.extrapolation_params:
                lines.append(
                    f"    extrapolate: among {', '.join(faults.extrapolation_params)}, "
                    "which are never faulty in training"
                )
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the space as plain JSON data, with its hash."""
        data: dict[str, Any] = {
            "name": self.name,
            "params": [_param_to_data(p) for p in self.params],
        }
        if self.sparse_faults:
            data["few"] = [_faults_to_data(f) for f in self.sparse_faults]
        plain = json.loads(json.dumps(data))  # as it is read back: lists for tuples
        return {**plain, "hash": _digest(plain)}

    @property
    def hash(self) -> str:
        """Twelve hexadecimal digits that change whenever anything in the space does."""
        return str(self.to_json()["hash"])

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TaskSpace:
        """Read a space back.

        Raises:
            TaskError: It is not a task space, or its hash does not match what it holds.
        """
        try:
            plain = {k: data[k] for k in ("name", "params", "few") if k != "few" or k in data}
            if _digest(plain) != data["hash"]:
                raise TaskError(
                    f"the task space {data['name']!r} was changed after it was written: "
                    "its hash differs"
                )
            params = tuple(_load_param(p) for p in data["params"])
            sparse_faults = tuple(_load_faults(f) for f in data.get("few", ()))
            return cls(data["name"], params, sparse_faults)
        except (KeyError, TypeError, ValueError) as e:
            raise TaskError(f"not a task space: {e!r}") from e


FILE_KEYS = {
    "held_out": "hole",
    "extrapolation": "beyond",
    "edits_spec": "shapes",
    "extrapolation_params": "spared",
}
"""Field -> its key in ``tasks.json``, where the two differ.

The keys are those of earlier versions, whose files stay readable; so is ``few`` for sparse
faults."""

_OPTIONAL_KEYS = ("shapes", "nuisance", "words")
"""Keys that are left out where they are not set, since older files lack them."""


def _param_to_data(p: Param) -> dict[str, Any]:
    """Return a parameter as plain data."""
    data = {FILE_KEYS.get(k, k): v for k, v in asdict(p).items()}
    data["train"] = to_data(p.train)
    data["beyond"] = None if p.extrapolation is None else to_data(p.extrapolation)
    return {k: v for k, v in data.items() if v or k not in _OPTIONAL_KEYS}


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
    """Read ``name=value`` words, as a task is given on the command line.

    Raises:
        TaskError: A word that is not of this form.
    """
    values = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            values[name] = float(value)
        except ValueError:
            raise TaskError(f"{word!r} is not name=value with a number") from None
    return values
