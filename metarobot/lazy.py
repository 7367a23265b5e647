"""Modules that are imported when they are first used.

Listing task families or printing help must not wait for PyTorch, whose import takes over a second.
Type checkers see an ordinary import; at run time the name is a stand-in::

    if TYPE_CHECKING:
        import torch
    else:
        torch = lazy_module("torch")
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


class LazyModule(ModuleType):
    """Stand in for a module and import it when an attribute is first asked for.

    Each attribute is looked up in the module once and then kept, so a function called in a loop
    costs no more than through the module itself. ``sys.modules`` is left alone: until the first use
    the module does not count as imported.
    """

    def __getattr__(self, name: str) -> Any:
        value = getattr(importlib.import_module(self.__name__), name)
        setattr(self, name, value)
        return value


def lazy_module(name: str) -> Any:
    """Return a stand-in for the module ``name`` that imports it on first use.

    Raises:
        ImportError: At the first use, if the module does not import.
    """
    return LazyModule(name)
