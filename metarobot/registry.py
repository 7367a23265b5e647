"""Names -> families and agents. Other packages join by entry points, as our own ``envs`` and ``agents`` do."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from metarobot.types import MetarobotError

T = TypeVar("T")


class RegistryError(MetarobotError):
    """A name that nothing is registered under, or one that is taken."""


@dataclass
class Registry(Generic[T]):
    """Named things of one kind, filled by importing the modules of an entry-point group on first use."""

    kind: str
    group: str
    _things: dict[str, T] = field(default_factory=dict)
    _loaded: bool = False

    def register(self, name: str, thing: T) -> T:
        """Add a thing under a name that must be free."""
        if name in self._things:
            raise RegistryError(f"a {self.kind} called {name!r} is registered already")
        self._things[name] = thing
        return thing

    def names(self) -> list[str]:
        """List what exists."""
        self._load()
        return sorted(self._things)

    def get(self, name: str) -> T:
        """Return the thing of that name, or raise with the names that exist."""
        self._load()
        if name not in self._things:
            raise RegistryError(f"no {self.kind} called {name!r}; there are: {', '.join(self.names())}")
        return self._things[name]

    def _load(self) -> None:
        if not self._loaded:
            self._loaded = True
            for entry in importlib.metadata.entry_points(group=self.group):
                entry.load()

