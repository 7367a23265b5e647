"""What a run shows in the terminal: a panel if rich is installed, otherwise a line now and then.

Drawing takes milliseconds of Python's interpreter lock, so a process of its own does it. The
control loop only hands it the status.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from metarobot.bridge.tools.child_process import ChildProcess, read_frames

# Kinds of frames from the control loop to the panel's process
STATUS_FRAME = b"S"
MESSAGE_FRAME = b"L"

PLAIN_STATUS_S = 5.0
"""Interval of status lines without a panel."""
CLOSE_TIMEOUT_S = 3.0
"""How long the panel may take to draw its last state."""
STATE_COLOURS = {
    "idle": "white",
    "ready": "yellow",
    "running": "green",
    "damping": "red",
    "stopped": "red",
}
BAR_CHARACTERS = 20
"""Length of the bar of a joint that was limited in every step."""
PANEL_CHARACTERS = 100
"""Width of the panel."""
PANEL_NICENESS = 10
"""Scheduling priority of the panel's process: it waits while the loop wants the processor."""
LARGEST_JOINTS = 6
"""Number of joints whose limits are shown."""


class TerminalPanel:
    """Show status and messages in a panel, or as plain lines.

    Args:
        title: Title of the panel.
        plain: Show lines even where a panel is possible.
    """

    def __init__(self, title: str, plain: bool = False) -> None:
        can_draw = sys.stderr.isatty() and importlib.util.find_spec("rich") is not None
        self._child: ChildProcess | None = None
        if can_draw and not plain:
            self._child = ChildProcess("tools.terminal_panel", title)
            os.setpriority(os.PRIO_PROCESS, self._child.process.pid, PANEL_NICENESS)
        self._last_line_at = -math.inf

    def show_status(self, status: dict[str, Any]) -> None:
        """Show the status of ``Controller.status``."""
        if self._child is not None:
            self._child.send(STATUS_FRAME, json.dumps(status).encode())
            return
        now = time.monotonic()
        if now - self._last_line_at > PLAIN_STATUS_S:
            self._last_line_at = now
            print(status_line(status), file=sys.stderr, flush=True)

    def show_message(self, text: str) -> None:
        """Show one line about an event."""
        # A message that the panel's pipe does not take is printed: messages must not get lost
        if self._child is None or not self._child.send(MESSAGE_FRAME, text.encode()):
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the panel's process; its last drawing stays in the terminal."""
        if self._child is not None:
            self._child.close(CLOSE_TIMEOUT_S)


@contextmanager
def terminal_panel(title: str, plain: bool = False) -> Iterator[TerminalPanel]:
    """Yield a panel, and close it afterwards."""
    panel = TerminalPanel(title, plain)
    try:
        yield panel
    finally:
        panel.close()


def status_line(status: dict[str, Any]) -> str:
    """Return a status in one line."""
    timing = status["pace"]
    limited = sum(n for kinds in status["limited"].values() for n in kinds.values())
    return (
        f"{status['state']}  trial {status['trial'] + 1} episode {status['episode'] + 1} "
        f"step {status['step']}  return {status['return']:.1f}  {timing['ticks']:,} steps, "
        f"missed {timing['missed_own']} own, {timing['missed_host']} host's  limits {limited}"
    )


def main(title: str) -> None:
    """Draw the frames on standard input until they end.

    The terminal's settings are restored at the end, as the controller may have been killed before
    it could do so.
    """
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    settings = None
    with contextlib.suppress(termios.error):
        settings = termios.tcgetattr(sys.stderr.fileno())
    try:
        with Live(console=console, auto_refresh=False, transient=False) as live:
            for kind, payload in read_frames(sys.stdin.buffer):
                if kind == MESSAGE_FRAME:
                    line = f"[dim]{time.strftime('%H:%M:%S')}[/] {payload.decode()}"
                    live.console.print(line, highlight=False)
                else:
                    live.update(draw_panel(title, json.loads(payload)), refresh=True)
    finally:
        if settings is not None:
            termios.tcsetattr(sys.stderr.fileno(), termios.TCSANOW, settings)


def draw_panel(title: str, status: dict[str, Any]) -> Any:
    """Return the panel of a status as something rich can print."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    colour = STATE_COLOURS[status["state"]]
    badge = (f" {status['state'].upper()} ", f"bold black on {colour}")
    headline = Text.assemble(badge, "  ", _progress(status))
    if status["reason"]:
        headline.append(f"  {status['reason']}", style=colour)

    return Panel(
        Group(headline, Text(), _figures(status)),
        title=title,
        subtitle=None if status["state"] == "stopped" else "any key stops",
        border_style=colour,
        padding=(0, 1),
        width=PANEL_CHARACTERS,
    )


def _progress(status: dict[str, Any]) -> str:
    left = f", {status['left_s']:.0f} s left" if 0 <= status["left_s"] < math.inf else ""
    return (
        f"trial {status['trial'] + 1}, episode {status['episode'] + 1}, step {status['step']}{left}"
    )


def _figures(status: dict[str, Any]) -> Any:
    from rich.table import Table

    timing = status["pace"]
    readings = status["readings"]
    own = f"[red]{timing['missed_own']}[/]" if timing["missed_own"] else "0"

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", justify="right")
    table.add_column()
    table.add_row("rate", f"{timing['hz']:g} Hz, {timing['ticks']:,} steps")
    table.add_row("deadlines missed", f"{own} by the loop, {timing['missed_host']} by the host")
    table.add_row("start delay, ms", _quantiles(timing, "late"))
    table.add_row("step duration, ms", _quantiles(timing, "work"))
    table.add_row("return", _returns(status))
    table.add_row("limits hit", _limits(status["limited"], timing["ticks"]))
    table.add_row(
        "readings",
        f"{readings['repeated']} repeated, {readings['disordered']} of them out of order",
    )
    if status["dropped"]:
        lost = f"{status['dropped']} steps lost: its writer is stopped, or the disk too slow"
        table.add_row("log", f"[yellow]{lost}[/]")

    adaptations = list(status["adapted"])
    if status["adapting"]:
        adaptations.append("[yellow]adapting: the robot stands still[/]")
    if adaptations:
        table.add_row("adaptation", "\n".join(adaptations))
    return table


def _quantiles(timing: dict[str, float], name: str) -> str:
    return (
        f"{timing[f'{name}_p50_ms']:.2f} median, {timing[f'{name}_p99_ms']:.2f} p99, "
        f"{timing[f'{name}_max_ms']:.1f} max"
    )


def _returns(status: dict[str, Any]) -> str:
    """Draw a line per trial, the episode that is going on at its end."""
    trials = status["returns"]
    lines = [" → ".join(f"{value:.1f}" for value in trial) for trial in trials if trial]
    now = f"[bold]{status['return']:.1f}[/] so far"
    # The last trial has no finished episode yet: the one that is going on gets a line of its own
    if trials[-1:] == [[]] or not lines:
        return "\n".join([*lines, now])
    return "\n".join([*lines[:-1], f"{lines[-1]} → {now}"])


def _limits(limited: dict[str, dict[str, int]], ticks: int) -> str:
    """Draw the joints that are limited most, with a bar for their share of the steps."""
    most_first = sorted(limited.items(), key=lambda item: -sum(item[1].values()))
    lines = []
    for joint, counts in most_first[:LARGEST_JOINTS]:
        share = min(max(counts.values()) / max(ticks, 1), 1.0)
        bar = "█" * max(round(BAR_CHARACTERS * share), 1)
        text = ", ".join(f"{kind} {n}" for kind, n in counts.items())
        lines.append(f"{joint:<10} [yellow]{bar:<{BAR_CHARACTERS}}[/] {text}")
    if len(most_first) > LARGEST_JOINTS:
        lines.append(f"and {len(most_first) - LARGEST_JOINTS} more joints")
    return "\n".join(lines) or "none"


if __name__ == "__main__":
    main(sys.argv[1])
