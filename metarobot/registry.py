"""Names -> families and agents. Other packages join by entry points, as our own ``envs`` and
``agents`` do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from metarobot.errors import MetarobotError

T = TypeVar("T")


class RegistryError(MetarobotError):
    """A name that nothing is registered under, one that is taken, or a thing that does not load."""


@dataclass
class Registry(Generic[T]):
    """Named things of one kind: each entry point of the group names one, which is imported when it
    is first asked for.

    So the names are known before anything is imported, and a package that does not load harms no
    other.
    """

    kind: str
    group: str
    _things: dict[str, T] = field(default_factory=dict)

    def register(self, name: str, thing: T) -> T:
        """Add a thing at run time, under a name that must be free."""
        if name in self._things or name in self._entries:
            raise RegistryError(f"a {self.kind} called {name!r} is registered already")
        self._things[name] = thing
        return thing

    def names(self) -> list[str]:
        """List what exists."""
        return sorted({*self._things, *self._entries})

    def get(self, name: str) -> T:
        """Return the thing of that name, or raise with the names that exist."""
        if name not in self._things:
            if name not in self._entries:
                raise RegistryError(
                    f"no {self.kind} called {name!r}; there are: {', '.join(self.names())}"
                )
            self._things[name] = self._load(self._entries[name])
        return self._things[name]

    @cached_property
    def _entries(self) -> Mapping[str, EntryPoint]:
        entries: dict[str, EntryPoint] = {}
        for entry in entry_points(group=self.group):
            if entry.name in entries:
                raise RegistryError(
                    f"two {self.group} are called {entry.name!r}: {entries[entry.name].value}, {entry.value}"
                )
            entries[entry.name] = entry
        return entries

    def _load(self, entry: EntryPoint) -> T:
        try:
            thing: T = entry.load()
        except (ImportError, AttributeError) as e:
            raise RegistryError(
                f"the {self.kind} {entry.name!r} does not load from {entry.value}: {e}"
            ) from e
        if getattr(thing, "name", entry.name) != entry.name:
            raise RegistryError(
                f"{entry.value} is a {self.kind} called otherwise than its entry point {entry.name!r}"
            )
        return thing
