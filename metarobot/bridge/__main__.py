"""``python -m metarobot.bridge``: ``metarobot run`` for machines with numpy and onnxruntime
alone.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from metarobot.bridge import launch as run
from metarobot.bridge.errors import BridgeError
from metarobot.bridge.run_options import Options


def _helps() -> dict[str, str]:
    """Return what ``Options`` says of each of its fields."""
    body = cast(ast.ClassDef, ast.parse(inspect.getsource(Options)).body[0]).body
    pairs = [
        (a.target, b.value)
        for a, b in pairwise(body)
        if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr)
    ]
    return {cast(ast.Name, name).id: cast(ast.Constant, text).value for name, text in pairs}  # type: ignore[misc]


def parser() -> argparse.ArgumentParser:
    """Make the command line out of ``Options``."""
    made = argparse.ArgumentParser(
        "python -m metarobot.bridge", description="Run an exported policy on a robot."
    )
    helps = _helps()
    made.add_argument("policy", help="policy folder that metarobot export wrote")
    for name, usual in vars(Options()).items():
        how: dict[str, Any] = {"default": usual, "help": helps[name].replace("%", "%%")}
        if isinstance(usual, bool):
            how["action"] = "store_true"
        elif name in ("set", "command"):
            how |= {"nargs": "*", "type": str} if name == "set" else {"nargs": 3, "type": float}
        else:
            how["type"] = Path if name == "log" else type(usual)
        made.add_argument(f"--{name.replace('_', '-')}", **how)
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Run; a mistake is one line on standard error and exit code 2."""
    told = vars(parser().parse_args(arguments))
    folder = told.pop("policy")
    told |= {name: tuple(told[name]) for name in ("set", "command")}
    try:
        report = run.run(folder, Options(**told))
    except BridgeError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    run.tell(report)
    sys.exit(run.code(report))


if __name__ == "__main__":
    main()
