"""Subcommands of robots: exporting an agent, running it, and replaying its log."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from metarobot.bridge.run_options import RunOptions


def export(
    run: Positional[str], /, out: Path, robot: str = "", tasks: int = 3, seed: int = 0
) -> None:
    """Export an agent for a robot: a folder with ONNX and JSON, without torch or MuJoCo.

    Whole trials are played by torch's agent and the exported one side by side, each leading in
    turn; where an action differs by more than 1e-5, nothing is written.

    Args:
        run: Run folder or trained agent in the box.
        out: Policy folder to write; a policy that is there already is replaced.
        robot: Another model of the robot than the agent was trained on: a path to an MJCF, or
            menagerie:name.
        tasks: Number of tasks to play side by side.
        seed: Draws these tasks and the starts.
    """
    from metarobot import api
    from metarobot.cli.progress import progress_bar

    with progress_bar("exporting") as progress:
        meta = api.export(run, out, robot=robot, tasks=tasks, seed=seed, progress=progress)
    parity = meta["parity"]
    print(
        f"wrote {out}: actions within {parity['difference']:.1g} of torch's over "
        f"{parity['steps']:,} steps"
    )


def run(policy: Positional[str], /, options: Annotated[RunOptions, tyro.conf.arg(name="")]) -> None:
    """Run an exported policy on a robot at a fixed rate within its limits, until the time is over.

    Any key, Ctrl-C and SIGTERM stop it; so do a lost link, a reading that is stale or no number,
    and a policy that is late. Damping is sent before the process ends.

    Exit code 0: the time is over, or a key; 1: something went wrong; 2: something does not fit, and
    nothing was sent; 130 and 143: signals.

    Args:
        policy: Policy folder that metarobot export wrote.
        options: How to run it.
    """
    from metarobot.bridge import launch

    report = launch.run(policy, options)
    launch.print_report(report)
    sys.exit(launch.exit_code(report))


def replay(log: Positional[Path], policy: Positional[str], /, tolerance: float = 1e-5) -> None:
    """Run a log of metarobot run through a policy again, without a robot, and compare actions.

    Exit code 1 if any action differs by more than the tolerance.

    Args:
        log: MCAP file that metarobot run --log wrote; one cut off by a kill will do.
        policy: Policy folder, the one of the log or another for the same robot.
        tolerance: How far actions may differ.
    """
    from metarobot.bridge.policy.onnx_policy import OnnxPolicy
    from metarobot.bridge.tools.replay_log import replay as replay_log

    result = replay_log(log, OnnxPolicy.load(policy), tolerance)
    whose = "this" if result.same else "another"
    print(
        f"{result.steps:,} steps of {whose} policy: actions differ by {result.difference:.2g} "
        "at most"
    )
    if result.differing:
        print(
            f"{result.differing:,} steps differ by more than {tolerance:g}, most at {result.where}"
        )
        sys.exit(1)
