"""Progress bars on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress


def make_bar() -> Progress:
    """Return a bar with an estimate of the time left; it vanishes when the work is done."""
    console = Console(stderr=True)
    return Progress(transient=True, console=console, disable=not console.is_terminal)


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar and yield the function that moves it, called with work done and all work."""
    with make_bar() as bar:
        task = bar.add_task(description, total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield show
