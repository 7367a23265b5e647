"""The command line and environment of every Python process that this package starts.

Python puts the working folder first on a child's module path: a file ``random.py`` in a policy
folder from a stranger would run in each child that is started there. Hence ``-P``, in one place for
all children.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path


def python_command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module, found where this Python's packages are."""
    return [sys.executable, "-P", "-m", module, *arguments]


def python_program(code: str) -> list[str]:
    """Return the command that runs a program given as text."""
    return [sys.executable, "-P", "-c", code]


def python_script(path: Path) -> list[str]:
    """Return the command that runs a file."""
    return [sys.executable, "-P", str(path.resolve())]


def child_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment of a child: its module path has no working folder in any form.

    ``PYTHONPATH`` keeps its absolute entries alone, and of these not the working folder. An empty
    entry, as in ``PYTHONPATH=:/opt/lib``, means the working folder to Python.
    """
    child = dict(environment)
    # Children of the child inherit it
    child["PYTHONSAFEPATH"] = "1"

    working_folder = os.path.realpath(os.curdir)
    entries = []
    for entry in child.pop("PYTHONPATH", "").split(os.pathsep):
        if Path(entry).is_absolute() and os.path.realpath(entry) != working_folder:
            entries.append(entry)
    if entries:
        child["PYTHONPATH"] = os.pathsep.join(entries)
    return child
