"""The command line of robots: exporting an agent, and running it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from metarobot.progress import bar


def export(run: Positional[str], /, out: Path, robot: str = "", tasks: int = 3, seed: int = 0) -> None:
    """Export an agent for a robot: a folder with ONNX and JSON, which needs neither torch nor MuJoCo.

    Whole trials are played by torch's agent and the exported one side by side, each leading in turn; where an action
    differs by more than 1e-5, nothing is written.

    Args:
        run: Run folder or trained agent in the box.
        out: Policy folder to write; a policy that is there already gives way.
        robot: Another model of the robot than the agent was trained on: a path to an MJCF, or menagerie:name.
        tasks: Number of tasks to play side by side.
        seed: Draws these tasks and the starts.
    """
    from metarobot.checkpoint import open_run
    from metarobot.export import export as write
    from metarobot.export import trials

    opened = open_run(run, robot)
    with bar() as progress:
        task = progress.add_task("exporting", total=trials(tasks))
        meta = write(opened, out, tasks=tasks, seed=seed, tick=lambda: progress.advance(task))
    found = meta["parity"]
    print(f"wrote {out}: actions within {found['difference']:.1g} of torch's over {found['steps']:,} steps")


COMMANDS: dict[str, Callable[..., Any]] = {"export": export}
"""Name -> subcommand."""
