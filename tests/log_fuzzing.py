"""Damage logs of runs at random, and check that each is refused in one line or means the same.

A log is damaged as bad luck does it, in its bytes, and as a stranger does it, in the JSON of its
entries, with all sizes and checksums renewed.
"""

import io
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from bridging import WavePolicy, meta
from file_mutations import dump, mutate_bytes, mutate_json

from metarobot.bridge.errors import BridgeError
from metarobot.bridge.policy.metadata import PolicyMetadata
from metarobot.bridge.tools.log_format import EVENT_TOPIC, POLICY_RECORD, TICK_TOPIC
from metarobot.bridge.tools.read_log import read_log
from metarobot.bridge.tools.replay_log import replay
from metarobot.bridge.tools.run_log import LogParts

LIMIT_S = 20
"""A log that takes longer hangs."""
MAX_LINE_CHARS = 500
MAX_GROWTH_KB = 512 << 10
"""Memory that reading a small damaged log may take."""
STEPS = 30

Entries = list[tuple[str, dict[str, Any]]]


class LoggedPolicy(WavePolicy):
    """A policy whose replay needs no model."""

    def begin(self) -> None:
        super().begin()
        self.inputs.clear()


def policy() -> Any:
    return LoggedPolicy(meta())


def entries_of_a_run() -> Entries:
    """Return what the log of two trials holds."""
    played = policy()
    about: PolicyMetadata = played.meta
    entries: Entries = [(POLICY_RECORD, {"policy": about.sha256})]
    for trial in range(2):
        played.begin()
        for step in range(STEPS):
            obs = [0.01 * step, 0.2, -0.1, float(trial)]
            played.act(np.array(obs, np.float32), 0.5, step == STEPS // 2)
            tick = {"time": 0.02 * step, "trial": trial, "episode": 0, "step": step}
            tick |= {"reward": 0.5, "done": float(step == STEPS // 2), "obs": obs, "noise": []}
            entries.append((TICK_TOPIC, tick | {"action": played.chosen.tolist()}))
        entries.append((EVENT_TOPIC, {"what": "episode", "value": 1.0}))
    return entries


def write_entries(entries: Entries) -> bytes:
    """Return a log that holds these entries, whole and with right checksums."""
    file = io.BytesIO()
    parts = LogParts(file, Path("fuzz.mcap"))  # type: ignore[arg-type]
    for number, (topic, content) in enumerate(entries):
        if topic == POLICY_RECORD:
            parts.add_metadata(topic, {key: str(value) for key, value in content.items()})
        else:
            parts.add_message(topic, number, dump(content).encode(), number)
    parts.close()
    return file.getvalue()


@dataclass
class LogFuzzTable:
    """How often each kind of damage was tried, and what came of it."""

    refused: Counter[str] = field(default_factory=Counter)
    same: Counter[str] = field(default_factory=Counter)
    """The same content, or its beginning where the file was cut off."""
    replayed: Counter[str] = field(default_factory=Counter)
    """A stranger's log that was compared with the policy."""
    broken: list[str] = field(default_factory=list)
    """Kind of damage and what went wrong: a traceback, a hang, memory, a silent change."""
    slowest_s: float = 0.0

    def lines(self) -> Iterator[str]:
        """Yield the lines of the table."""
        yield f"{'damage':<42}{'tried':>8}{'refused':>9}{'same':>8}{'replayed':>10}"
        for kind in sorted(self.refused | self.same | self.replayed):
            counts = self.refused[kind], self.same[kind], self.replayed[kind]
            yield f"{kind:<42}{sum(counts):>8}{counts[0]:>9}{counts[1]:>8}{counts[2]:>10}"
        yield f"slowest: {self.slowest_s:.1f} s; promises broken: {len(self.broken)}"


def fuzz_log(
    scratch: Path, count: int, seed: int, tick: Callable[[], None] = lambda: None
) -> LogFuzzTable:
    """Damage a log ``count`` times."""
    rng = np.random.default_rng(seed)
    entries = entries_of_a_run()
    original = write_entries(entries)
    path = scratch / "damaged.mcap"
    path.write_bytes(original)
    expected = list(read_log(path))
    assert replay(path, policy()).difference == 0.0

    table = LogFuzzTable()
    for _ in range(count):
        if rng.random() < 0.6:
            kind, data = mutate_bytes(original, rng)
            kind = f"bytes: {kind}"
        else:
            changed = list(entries)
            place = int(rng.integers(1, len(entries)))
            topic, content = changed[place]
            # With a value of each kind beside it, so that every kind of damage finds one
            kind, new = mutate_json({"entry": content, "list": [0], "object": {}}, rng)
            changed[place] = (topic, new.get("entry", {}))
            kind = f"entry: {kind}"
            data = write_entries(changed)
        path.write_bytes(data)
        _try(table, kind, path, expected)
        tick()
    return table


def _try(table: LogFuzzTable, kind: str, path: Path, expected: Entries) -> None:
    """Read and replay a damaged log, and note what happened."""
    memory_before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    signal.alarm(LIMIT_S)  # its default action ends the process
    try:
        found = list(read_log(path))
        replay(path, policy())
        if kind.startswith("entry"):
            table.replayed[kind] += 1
        elif found == expected[: len(found)]:
            table.same[kind] += 1
        else:
            table.broken.append(f"{kind}: a silent change")
    except BridgeError as e:
        line = str(e)
        if "\n" in line or len(line) > MAX_LINE_CHARS:
            table.broken.append(f"{kind}: not one line: {line[:200]!r}")
        table.refused[kind] += 1
    except Exception as e:
        table.broken.append(f"{kind}: {type(e).__name__}: {e}")
    finally:
        signal.alarm(0)
    table.slowest_s = max(table.slowest_s, time.monotonic() - started)
    growth_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_before_kb
    if growth_kb > MAX_GROWTH_KB:
        table.broken.append(f"{kind}: it took {growth_kb} kB of memory")
