"""Registries of families and agents by name.

Other packages add theirs through entry points, as our own ``envs`` and ``agents`` do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from metarobot.errors import MetarobotError

Item = TypeVar("Item")


class RegistryError(MetarobotError):
    """A name that is unknown or taken, or an item that does not load."""


@dataclass
class Registry(Generic[Item]):
    """Named items of one kind, found through the entry points of a group.

    An item is imported when it is first asked for. So the names are known before anything is
    imported, and a package that does not load harms no other.
    """

    kind: str
    """What the items are called in messages."""
    group: str
    """Name of the entry point group."""
    _items: dict[str, Item] = field(default_factory=dict)

    def register(self, name: str, item: Item) -> Item:
        """Add an item at run time and return it.

        Raises:
            RegistryError: The name is taken.
        """
        if name in self._items or name in self._entries:
            raise RegistryError(f"a {self.kind} called {name!r} is registered already")
        self._items[name] = item
        return item

    def names(self) -> list[str]:
        """Return all names, sorted."""
        return sorted({*self._items, *self._entries})

    def get(self, name: str) -> Item:
        """Return the item of that name.

        Raises:
            RegistryError: There is none, or it does not load; the message lists what exists.
        """
        if name not in self._items:
            if name not in self._entries:
                existing = ", ".join(self.names())
                raise RegistryError(f"no {self.kind} called {name!r}; there are: {existing}")
            # Imported now, not before: other items may not even be installable here.
            self._items[name] = self._load(self._entries[name])
        return self._items[name]

    @cached_property
    def _entries(self) -> Mapping[str, EntryPoint]:
        entries: dict[str, EntryPoint] = {}
        for entry in entry_points(group=self.group):
            if entry.name in entries:
                places = f"{entries[entry.name].value}, {entry.value}"
                raise RegistryError(f"two {self.group} are called {entry.name!r}: {places}")
            entries[entry.name] = entry
        return entries

    def _load(self, entry: EntryPoint) -> Item:
        try:
            item: Item = entry.load()
        except (ImportError, AttributeError) as e:
            raise RegistryError(
                f"the {self.kind} {entry.name!r} does not load from {entry.value}: {e}"
            ) from e

        # An item of another name would be found under one name and report the other.
        own_name = getattr(item, "name", entry.name)
        if own_name != entry.name:
            raise RegistryError(
                f"the {self.kind} of {entry.value} is called {own_name!r}, but its entry point "
                f"{entry.name!r}"
            )
        return item
