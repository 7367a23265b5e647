"""The bar that long work shows."""

from __future__ import annotations

from rich.console import Console
from rich.progress import Progress


def bar() -> Progress:
    """Make a bar with an ETA, on standard error, that leaves nothing behind."""
    console = Console(stderr=True)
    return Progress(transient=True, console=console, disable=not console.is_terminal)
