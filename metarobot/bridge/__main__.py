"""``python -m metarobot.bridge``: ``metarobot run`` with numpy and onnxruntime alone.

The command line is made from ``RunOptions`` with argparse, as a robot's computer need not have the
packages of the full command line.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.launch import exit_code, print_report, run
from metarobot.bridge.run_options import RunOptions


def _field_docstrings() -> dict[str, str]:
    """Return field of ``RunOptions`` -> the string literal under it in the source code.

    Python does not keep these strings at run time, so they are read from the syntax tree.
    """
    class_body = cast(ast.ClassDef, ast.parse(inspect.getsource(RunOptions)).body[0]).body
    texts: dict[str, str] = {}
    field = ""
    for statement in class_body:
        if isinstance(statement, ast.AnnAssign):
            field = cast(ast.Name, statement.target).id
        elif isinstance(statement, ast.Expr) and field:
            texts[field] = cast(str, cast(ast.Constant, statement.value).value)
    return texts


def make_parser() -> argparse.ArgumentParser:
    """Return a command line with a flag for each field of ``RunOptions``."""
    parser = argparse.ArgumentParser(
        "python -m metarobot.bridge", description="Run an exported policy on a robot."
    )
    parser.add_argument("policy", help="policy folder that metarobot export wrote")
    helps = _field_docstrings()
    for name, default in vars(RunOptions()).items():
        # argparse formats help texts with %
        arguments: dict[str, Any] = {"default": default, "help": helps[name].replace("%", "%%")}
        if isinstance(default, bool):
            arguments["action"] = "store_true"
        elif name == "set":
            arguments |= {"nargs": "*", "type": str}
        elif name == "command":
            arguments |= {"nargs": 3, "type": float}
        elif name == "log":
            arguments["type"] = Path
        else:
            arguments["type"] = type(default)
        parser.add_argument(f"--{name.replace('_', '-')}", **arguments)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a policy; a mistake is one line on standard error and exit code 2."""
    values = vars(make_parser().parse_args(arguments))
    folder = values.pop("policy")
    # argparse makes lists, the options are tuples
    values["set"] = tuple(values["set"])
    values["command"] = tuple(values["command"])
    try:
        report = run(folder, RunOptions(**values))
    except BridgeError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    print_report(report)
    sys.exit(exit_code(report))


if __name__ == "__main__":
    main()
