"""The command line of robots: exporting an agent, and running it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

COMMANDS: dict[str, Callable[..., Any]] = {}
"""Name -> subcommand."""
