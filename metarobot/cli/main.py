"""The entry point of the command line: find the subcommand, parse its arguments, run it.

Only the module of the chosen subcommand is imported, so that ``metarobot --help`` is fast.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from metarobot.errors import MetarobotError


class Subcommand(NamedTuple):
    """A subcommand: where its function is, and what the table of commands says of it."""

    module: str
    summary: str


COMMANDS = {
    "families": Subcommand(
        "listing", "List the task families: what varies, and over which ranges."
    ),
    "agents": Subcommand("listing", "List the kinds of agent, and the trained agents in the box."),
    "train": Subcommand("training", "Meta-train an agent over a family's training tasks."),
    "evaluate": Subcommand("evaluation", "Measure how an agent adapts on held-out tasks."),
    "render": Subcommand("evaluation", "Film an agent adapting."),
    "compare": Subcommand("comparison", "Train several agents on one family, and compare them."),
    "plot": Subcommand("training", "Draw the learning curves of runs."),
    "record": Subcommand("demonstrations", "Record a family's scripted expert as a dataset."),
    "shots": Subcommand("demonstrations", "Measure few-shot imitation."),
    "recognise": Subcommand(
        "evaluation", "Show which training tasks held-out tasks are most like."
    ),
    "export": Subcommand("robot", "Export an agent for a robot, as ONNX and JSON."),
    "run": Subcommand("robot", "Run an exported policy on a robot."),
    "replay": Subcommand("robot", "Run the log of a run through a policy again."),
    "publish": Subcommand("training", "Copy a run's agent with a card of how it was made."),
    "bench": Subcommand("bench", "Measure speed and memory."),
    "sinusoid": Subcommand("evaluation", "Explain MAML with a picture."),
}
"""Name -> subcommand; the function has the same name."""

USER_ERROR = 2
"""Exit code of a mistake that the user can correct."""
INTERRUPTED = 130
"""Exit code after Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    A user's mistake is one line on standard error, and exit code 2.

    Args:
        argv: Arguments without the program's name; those of the process if not given.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments and arguments[0] in ("-h", "--help"):
            print(_help_text())
        else:
            _run_command(arguments)
        sys.stdout.flush()
    except MetarobotError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # Whoever reads has gone, for example `| head`: Python must not complain when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run_command(arguments: Sequence[str]) -> None:
    existing = ", ".join(COMMANDS)
    if not arguments:
        raise MetarobotError(f"no command given; there are: {existing}")
    name, *rest = arguments
    if name not in COMMANDS:
        raise MetarobotError(f"no command called {name!r}; there are: {existing}")

    _check_gl()
    module = importlib.import_module(f"metarobot.cli.{COMMANDS[name].module}")
    if name == "train":
        module.train(rest)  # its flags depend on the agent, so it parses them itself
    else:
        parse_and_call(getattr(module, name), name, rest)


def parse_and_call(function: Callable[..., Any], name: str, arguments: Sequence[str]) -> Any:
    """Parse arguments as the function's signature says, and call it with them."""
    import tyro

    return tyro.cli(function, prog=f"metarobot {name}", args=arguments)


def _help_text() -> str:
    width = max(len(name) for name in COMMANDS)
    lines = [
        "usage: metarobot [-h] COMMAND ...",
        "",
        "Meta-train robots that adapt.",
        "",
        "commands:",
        *(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()),
        "",
        "metarobot COMMAND --help lists the options of a command.",
    ]
    return "\n".join(lines)


def _check_gl() -> None:
    """Check that mujoco imports: it does not under a ``MUJOCO_GL`` that it cannot load.

    Raises:
        MetarobotError: It does not, and the variable is set.
    """
    try:
        import mujoco
    except (RuntimeError, AttributeError) as e:
        if "MUJOCO_GL" not in os.environ or hasattr(sys.modules.get("mujoco"), "MjModel"):
            raise
        raise MetarobotError(
            f"MUJOCO_GL={os.environ['MUJOCO_GL']} does not work here ({e}); unset it, or use egl, "
            "osmesa or disabled"
        ) from e
    del mujoco


if __name__ == "__main__":
    main()
