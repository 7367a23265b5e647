"""Packages that can be called as the public function of the same name.

``metarobot.agents`` and ``metarobot.render`` are packages, and importing one of their modules makes
the package an attribute of ``metarobot``. Calling the package calls the function, so that
``metarobot.render(run, "x.mp4")`` works whatever was imported before.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class CallablePackage(ModuleType):
    """A package that is also the function of ``metarobot.api`` with its name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        # Not an import statement: agents must not depend on what the function uses.
        api = importlib.import_module("metarobot.api")
        function = getattr(api, self.__name__.rpartition(".")[2])
        return function(*args, **kwargs)


def make_callable(package: str) -> None:
    """Let a package be called as the public function of the same name."""
    sys.modules[package].__class__ = CallablePackage
