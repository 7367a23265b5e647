"""Damage Minari folders at random, and check that each is refused in one line or holds numbers.

Nothing in Minari's format tells a changed observation from a true one: what is accepted must have
finite numbers, in the shapes of its family.
"""

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from file_mutations import dump, mutate_bytes, mutate_json

from metarobot.errors import MetarobotError
from metarobot.training.demonstrations import read_demonstrations

LIMIT_S = 30
"""A read that takes longer hangs."""


def fuzz_datasets(
    original: Path, scratch: Path, count: int, seed: int, tick: Callable[[], None] = lambda: None
) -> tuple[Counter[str], list[str]]:
    """Damage a dataset ``count`` times; return what happened, and what broke a promise."""
    rng = np.random.default_rng(seed)
    metadata = (original / "data" / "metadata.json").read_bytes()
    data = (original / "data" / "main_data.hdf5").read_bytes()
    happened: Counter[str] = Counter()
    broken: list[str] = []
    folder = scratch / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "data").mkdir(parents=True)
    for _ in range(count):
        (folder / "data" / "metadata.json").write_bytes(metadata)
        (folder / "data" / "main_data.hdf5").write_bytes(data)
        how = str(rng.choice(["hdf5", "json", "bytes of json"], p=[0.7, 0.2, 0.1]))
        if how == "hdf5":
            kind, damaged = mutate_bytes(data, rng)
            (folder / "data" / "main_data.hdf5").write_bytes(damaged)
        elif how == "json":
            some_of_each = {"author": ["a", "b"], "more": {"a": 1}}
            kind, changed = mutate_json(json.loads(metadata) | some_of_each, rng)
            (folder / "data" / "metadata.json").write_text(dump(changed))
        else:
            kind, damaged = mutate_bytes(metadata, rng)
            (folder / "data" / "metadata.json").write_bytes(damaged)

        started = time.monotonic()
        try:
            demos = read_demonstrations(folder)
            assert torch.isfinite(demos.obs).all()
            assert torch.isfinite(demos.action).all()
            happened["accepted"] += 1
        except MetarobotError as e:
            happened["refused"] += 1
            line = str(e)
            if not line.isprintable() or len(line) > 2000:
                broken.append(f"{how}, {kind}: refused in more than a line: {line[:200]!r}")
        except Exception as e:  # what this looks for
            broken.append(f"{how}, {kind}: {type(e).__name__}: {str(e)[:200]!r}")
        if time.monotonic() - started > LIMIT_S:
            broken.append(f"{how}, {kind}: took {time.monotonic() - started:.0f} s")
        tick()
    return happened, broken
