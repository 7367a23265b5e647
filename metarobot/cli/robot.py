"""The command line of robots: exporting an agent, and running it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional

from metarobot.bridge.run_options import Options
from metarobot.cli.progress import bar


def export(
    run: Positional[str], /, out: Path, robot: str = "", tasks: int = 3, seed: int = 0
) -> None:
    """Export an agent for a robot: a folder with ONNX and JSON, which needs neither torch nor
    MuJoCo.

    Whole trials are played by torch's agent and the exported one side by side, each leading in
    turn; where an action differs by more than 1e-5, nothing is written.

    Args:
        run: Run folder or trained agent in the box.
        out: Policy folder to write; a policy that is there already gives way.
        robot: Another model of the robot than the agent was trained on: a path to an MJCF, or
            menagerie:name.
        tasks: Number of tasks to play side by side.
        seed: Draws these tasks and the starts.
    """
    from metarobot.deploy.onnx_export import count_export_trials
    from metarobot.deploy.onnx_export import export as write
    from metarobot.training.run_folder import open_run

    opened = open_run(run, robot)
    with bar() as progress:
        task = progress.add_task("exporting", total=count_export_trials(tasks))
        meta = write(opened, out, tasks=tasks, seed=seed, tick=lambda: progress.advance(task))
    found = meta["parity"]
    print(
        f"wrote {out}: actions within {found['difference']:.1g} of torch's over {found['steps']:,} steps"
    )


def run(policy: Positional[str], /, options: Annotated[Options, tyro.conf.arg(name="")]) -> None:
    """Run an exported policy on a robot, at a fixed rate and within its limits, until the time is
    over.

    Any key, Ctrl-C and SIGTERM stop it; so do a lost link, a reading that is stale or no number,
    and a policy that is late. Damping is sent before the process ends.

    Exit code 0: the time is over, or a key; 1: something went wrong; 2: something does not fit, and
    nothing was sent; 130 and 143: signals.

    Args:
        policy: Policy folder that metarobot export wrote.
        options: How to run it.
    """
    from metarobot.bridge import launch as bridge

    report = bridge.run(policy, options)
    bridge.tell(report)
    sys.exit(bridge.code(report))


def replay(log: Positional[Path], policy: Positional[str], /, tolerance: float = 1e-5) -> None:
    """Run a log of metarobot run through a policy again, without a robot, and compare what it
    chooses.

    Exit code 1 if any action differs by more than the tolerance.

    Args:
        log: MCAP file that metarobot run --log wrote; one cut off by a kill will do.
        policy: Policy folder, the one of the log or another for the same robot.
        tolerance: How far actions may differ.
    """
    from metarobot.bridge.policy.onnx_policy import Policy
    from metarobot.bridge.tools.replay_log import replay as again

    found = again(log, Policy.load(policy), tolerance)
    whose = "this" if found.same else "another"
    print(
        f"{found.steps:,} steps of {whose} policy: actions differ by {found.difference:.2g} at most"
    )
    if found.differing:
        print(f"{found.differing:,} steps differ by more than {tolerance:g}, most at {found.where}")
        sys.exit(1)


COMMANDS: dict[str, Callable[..., Any]] = {"export": export, "run": run, "replay": replay}
"""Name -> subcommand."""
