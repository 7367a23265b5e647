"""What a run shows while it lasts: a panel in the terminal where rich is installed, else a line now
and then.

Drawing takes milliseconds of the interpreter, so a process of its own does it; the loop only says
where things stand.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from metarobot.bridge.tools.child_process import Child, frames

STATUS, LINE = b"S", b"L"
LINE_S = 5.0
COLOURS = {
    "idle": "white",
    "ready": "yellow",
    "running": "green",
    "damping": "red",
    "stopped": "red",
}
BAR = 20
NICE = 10
FEW = 6
"""Joints whose limits are shown."""


class Screen:
    """Shows status and lines through a process of its own if there is a terminal and rich, else
    plainly.
    """

    def __init__(self, title: str, plain: bool = False) -> None:
        live = not plain and sys.stderr.isatty() and importlib.util.find_spec("rich") is not None
        self._child = Child("panel", title) if live else None
        if (
            self._child is not None
        ):  # drawing waits when the robot, or the loop, wants the processor
            os.setpriority(os.PRIO_PROCESS, self._child.process.pid, NICE)
        self._said = -float("inf")

    def show(self, status: dict[str, Any]) -> None:
        """Show where things stand."""
        if self._child is not None:
            self._child.send(STATUS, json.dumps(status).encode())
        elif (now := time.monotonic()) - self._said > LINE_S:
            self._said = now
            print(line(status), file=sys.stderr, flush=True)

    def tell(self, text: str) -> None:
        """Say what has happened."""
        if self._child is None or not self._child.send(LINE, text.encode()):
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the last panel standing."""
        if self._child is not None:
            self._child.close(3.0)


@contextmanager
def screen(title: str, plain: bool = False) -> Iterator[Screen]:
    """Lend a screen."""
    made = Screen(title, plain)
    try:
        yield made
    finally:
        made.close()


def line(status: dict[str, Any]) -> str:
    """Say where things stand in a line."""
    pace = status["pace"]
    hit = sum(n for kinds in status["limited"].values() for n in kinds.values())
    return (
        f"{status['state']}  trial {status['trial'] + 1} episode {status['episode'] + 1} step {status['step']}  "
        f"return {status['return']:.1f}  {pace['ticks']:,} steps, missed {pace['missed_own']} own, "
        f"{pace['missed_host']} host's  limits {hit}"
    )


def main(title: str) -> None:
    """Draw what comes on standard input until it ends; give the terminal back as it was even if
    nobody else can.
    """
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    before = None
    with contextlib.suppress(termios.error):
        before = termios.tcgetattr(sys.stderr.fileno())
    try:
        with Live(console=console, auto_refresh=False, transient=False) as live:
            for kind, payload in frames(sys.stdin.buffer):
                if kind == LINE:
                    live.console.print(
                        f"[dim]{time.strftime('%H:%M:%S')}[/] {payload.decode()}", highlight=False
                    )
                else:
                    live.update(draw(title, json.loads(payload)), refresh=True)
    finally:
        if before is not None:
            termios.tcsetattr(sys.stderr.fileno(), termios.TCSANOW, before)


def draw(title: str, status: dict[str, Any]) -> Any:
    """Make the panel."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    colour = COLOURS[status["state"]]
    state = Text.assemble(
        (f" {status['state'].upper()} ", f"bold black on {colour}"), "  ", _where(status)
    )
    if status["reason"]:
        state.append(f"  {status['reason']}", style=colour)
    body = Group(state, Text(), _facts(status))
    hint = None if status["state"] == "stopped" else "any key stops"
    return Panel(body, title=title, subtitle=hint, border_style=colour, padding=(0, 1), width=100)


def _where(status: dict[str, Any]) -> str:
    left = f", {status['left_s']:.0f} s left" if 0 <= status["left_s"] < float("inf") else ""
    return (
        f"trial {status['trial'] + 1}, episode {status['episode'] + 1}, step {status['step']}{left}"
    )


def _facts(status: dict[str, Any]) -> Any:
    from rich.table import Table

    pace, readings = status["pace"], status["readings"]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", justify="right")
    table.add_column()
    own = f"[red]{pace['missed_own']}[/]" if pace["missed_own"] else "0"
    table.add_row("rate", f"{pace['hz']:g} Hz, {pace['ticks']:,} steps")
    table.add_row("deadlines missed", f"{own} by the loop, {pace['missed_host']} by the host")
    table.add_row(
        "begun late, ms",
        f"{pace['late_p50_ms']:.2f} mostly, {pace['late_p99_ms']:.2f} p99, {pace['late_max_ms']:.1f} max",
    )
    table.add_row(
        "a step takes, ms",
        f"{pace['work_p50_ms']:.2f} mostly, {pace['work_p99_ms']:.2f} p99, {pace['work_max_ms']:.1f} max",
    )
    table.add_row("return", _returns(status))
    table.add_row("limits hit", _limits(status["limited"], pace["ticks"]))
    table.add_row(
        "readings",
        f"{readings['repeated']} repeated, {readings['disordered']} of them out of order",
    )
    if status["dropped"]:
        table.add_row("log", f"[yellow]{status['dropped']} steps lost: the disk is too slow[/]")
    if status["adapting"] or status["adapted"]:
        busy = ["[yellow]adapting: the robot stands still[/]"] if status["adapting"] else []
        table.add_row("adaptation", "\n".join([*status["adapted"], *busy]))
    return table


def _returns(status: dict[str, Any]) -> str:
    done = [" → ".join(f"{value:.1f}" for value in trial) for trial in status["returns"] if trial]
    now = f"[bold]{status['return']:.1f}[/] so far"
    return "\n".join(
        [*done[:-1], " → ".join([*done[-1:], now])]
        if status["returns"][-1:] != [[]]
        else [*done, now]
    )


def _limits(limited: dict[str, dict[str, int]], ticks: int) -> str:
    """Draw the joints that are limited most, with a bar for the share of steps."""
    worst = sorted(limited.items(), key=lambda item: -sum(item[1].values()))
    lines = []
    for joint, kinds in worst[:FEW]:
        share = min(max(kinds.values()) / max(ticks, 1), 1.0)
        bar = "█" * max(round(BAR * share), 1)
        lines.append(
            f"{joint:<10} [yellow]{bar:<{BAR}}[/] "
            + ", ".join(f"{k} {n}" for k, n in kinds.items())
        )
    more = [f"and {len(worst) - FEW} more joints"] if len(worst) > FEW else []
    return "\n".join([*lines, *more]) or "none"


if __name__ == "__main__":
    main(sys.argv[1])
