"""What leaves this machine names neither it, its users, nor its folders."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_ABSOLUTE_PATH = re.compile(r"(?<![\w./:~-])(?:~|[A-Za-z]:)?[/\\][^\s'\"=,;:]*")
"""A path from the root, from a home folder or from a drive; not the rest of a relative one."""


def without_folders(text: str) -> str:
    """Return a text in which each absolute path is its last name alone."""

    def last_name(match: re.Match[str]) -> str:
        names = re.split(r"[/\\]+", match[0].rstrip("/\\"))
        return names[-1]

    return _ABSOLUTE_PATH.sub(last_name, text)


def public_settings(settings: Mapping[str, Any], paths: tuple[str, ...]) -> dict[str, Any]:
    """Return settings in which those named ``paths`` are the names of their files alone.

    What is no absolute path, as ``menagerie:name``, stays what it is.
    """
    public = dict(settings)
    for name in paths:
        value = public.get(name, "")
        if isinstance(value, str) and Path(value).expanduser().is_absolute():
            public[name] = Path(value).name
    return public
