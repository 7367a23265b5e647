"""Damage model files at random, and check that each is refused in one line or compiles small.

The damage is to the text: bytes, numbers, attributes and elements. What compiles must be within the
limits on sizes; a model has no meaning that a check could compare.
"""

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from file_mutations import change_digit, mutate_bytes

from metarobot.envs.robots import model_check, model_files, model_trial
from metarobot.tasks.model_edits import ModelError

SNIPPETS = (
    b'<include file="robot.xml"/>',
    b'<include file="/etc/passwd"/>',
    b'<include file="../outside.xml"/>',
    b'<asset><mesh name="m" file="../outside.stl"/></asset>',
    b'<asset><hfield name="h" nrow="100000" ncol="100000" size="1 1 1 1"/></asset>',
    b'<extension><plugin plugin="a.b"/></extension>',
    b'<compiler meshdir="/"/>',
    b'<size nkey="100000000"/>',
    b"<!DOCTYPE a>",
    b"<worldbody>" * 1000,
    b'<worldbody><replicate count="1000000"><geom size="1"/></replicate></worldbody>',
    b"\x00",
    b"&a;",
)
ODD_NUMBERS = (b"nan", b"inf", b"-inf", b"1e300", b"-1", b"0", b"1e999", b"x", b"")


def damage_model(text: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """Return a kind of damage, and the damaged text of an MJCF file."""
    draw = rng.random()
    if draw < 0.3:
        return mutate_bytes(text, rng)
    if draw < 0.5:
        return "digit changed", change_digit(text, rng)
    if draw < 0.75:
        # one of the numbers between quotation marks
        starts = [i + 1 for i in range(len(text)) if text[i : i + 1] == b'"']
        start = int(rng.choice(starts))
        end = min(text.find(c, start) for c in (b'"', b" ") if text.find(c, start) >= 0)
        return "odd number", text[:start] + rng.choice(ODD_NUMBERS) + text[end:]
    place = text.index(b">", int(rng.integers(len(text) - 200))) + 1
    piece = SNIPPETS[int(rng.integers(len(SNIPPETS)))]
    return f"inserted {piece[:30].decode()!r}", text[:place] + piece + text[place:]


def fuzz_models(
    text: bytes,
    scratch: Path,
    count: int,
    seed: int,
    tick: Callable[[], None] = lambda: None,
    *,
    child_share: float = 1.0,
) -> tuple[Counter[str], list[str]]:
    """Damage an MJCF file ``count`` times; return what happened, and what broke a promise.

    Args:
        text: The file.
        scratch: Folder to work in.
        count: How often.
        seed: Draws the damage.
        tick: Called after each.
        child_share: Share of the damaged files that are read to the end, with a child process that
            takes most of a second; the others are only scanned.
    """
    rng = np.random.default_rng(seed)
    happened: Counter[str] = Counter()
    broken: list[str] = []
    path = scratch / "robot.xml"
    slowest_s = model_trial.CPU_S + model_check.TRIAL_WALL_S
    for _ in range(count):
        kind, damaged = damage_model(text, rng)
        path.write_bytes(damaged)
        started = time.monotonic()
        try:
            if rng.random() < child_share:
                model_files.read_model(str(path), "arm", "panda")
            else:
                model_check.check_model_file(path)
            happened["accepted"] += 1
        except ModelError as e:
            happened["refused"] += 1
            line = str(e)
            if not line.isprintable() or len(line) > 2000:
                broken.append(f"{kind}: refused in more than a line: {line[:200]!r}")
        except Exception as e:  # what this looks for
            broken.append(f"{kind}: {type(e).__name__}: {str(e)[:200]!r}")
        if time.monotonic() - started > slowest_s:
            broken.append(f"{kind}: took {time.monotonic() - started:.0f} s")
        tick()
    return happened, broken
