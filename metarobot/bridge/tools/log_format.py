"""Names in the log of a run, and of its files, for the ends that write and read it."""

from __future__ import annotations

import re
from pathlib import Path

TICK_TOPIC = "/tick"
EVENT_TOPIC = "/event"
TOPICS = (TICK_TOPIC, EVENT_TOPIC)
POLICY_RECORD = "policy"
"""Name of the metadata record that says which policy made the log."""
GROUPS_RECORD = "groups"
"""Name of the metadata record that names the columns of a tick."""


def part_path(path: Path, number: int) -> Path:
    """Return the path of a log's part, counted from 1: run.mcap, run.part2.mcap, ..."""
    if number == 1:
        return path
    return path.with_name(f"{path.stem}.part{number}{path.suffix}")


def later_parts(path: Path) -> list[tuple[int, Path]]:
    """Return number and path of a log's parts after the first, in order."""
    pattern = re.compile(re.escape(path.stem) + r"\.part([1-9][0-9]{0,5})" + re.escape(path.suffix))
    found = []
    for other in path.parent.iterdir():
        match = pattern.fullmatch(other.name)
        if match and other == part_path(path, int(match[1])):
            found.append((int(match[1]), other))
    return sorted(found)
