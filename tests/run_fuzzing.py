"""Damage run folders at random, and check that each is refused in one line or means the same.

A folder is damaged as bad luck does it, with the hashes as they were, and as a stranger does it,
with the hashes renewed. What a stranger's folder says may be accepted, but then its agent has the
shapes that its settings say, and finite weights.
"""

import hashlib
import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from file_mutations import change_digit, dump, mutate_bytes, mutate_json
from policy_fuzzing import LIMIT_S, MAX_LINE_CHARS, FuzzTable

from metarobot.bridge.policy.checked_json import canonical_digest
from metarobot.errors import MetarobotError
from metarobot.training.checkpoints import read_checkpoint
from metarobot.training.config import TrainConfig
from metarobot.training.run_files import CONTENT_KEY, read_card
from metarobot.training.run_folder import open_run, publish_agent
from metarobot.training.train import start_training

JSON_FILES = ("config.json", "tasks.json", "checkpoint.json", "card.json")
HEADER_BYTES = 1000
"""Structure of a weights file; a stranger may choose the weights after it."""


def make_folder(scratch: Path) -> Path:
    """Train a very small agent, and publish it; return the folder."""
    from metarobot.learning.agent_interface import agents

    config = TrainConfig(family="CheetahDir100", agent="blind", steps=400, threads=1)
    small = agents.get("blind").config(worlds=2, width=4, minibatches=1, epochs=1)
    training = start_training(config, small, scratch / "run")
    training.train(show=False)
    card = {"summary": "tiny", "command": "metarobot train", "steps": 400, "wall_s": 1.5, "seed": 0}
    publish_agent(training.run, scratch / "published", card)
    return scratch / "published"


def meaning(folder: Path) -> list[Any]:
    """Load everything of a run folder, and return what it says."""
    run = open_run(folder)
    agent = run.load_agent()
    weights = {name: tensor.tolist() for name, tensor in agent.state_dict().items()}
    for tensor in agent.state_dict().values():
        assert not tensor.is_floating_point() or tensor.isfinite().all()
    entry = read_checkpoint(folder).entry
    return [run.train_config, run.agent_config, run.family.space.hash, entry, weights, card(folder)]


def card(folder: Path) -> dict[str, Any]:
    """Return the entries of a folder's card that mean something."""
    known = ("summary", "command", "steps", "wall_s", "seed")
    return {k: v for k, v in read_card(folder / "card.json").items() if k in known}


def fuzz_run(
    original: Path, scratch: Path, count: int, seed: int, tick: Callable[[], None] = lambda: None
) -> FuzzTable:
    """Damage copies of the run folder ``original`` ``count`` times, in ``scratch``."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    expected = meaning(original)
    weights_name = next(original.glob("*.safetensors")).name
    table = FuzzTable()
    folder = scratch / "damaged"
    for _ in range(count):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, folder)
        name = str(rng.choice([*JSON_FILES, weights_name]))
        sealed = bool(rng.random() < 0.4)
        data = (original / name).read_bytes()
        if name == weights_name:
            what = "weights"
            kind, changed = _damage_weights(data, rng) if sealed else mutate_bytes(data, rng)
            (folder / name).write_bytes(changed)
            if sealed:
                _renew_sha256(folder / "checkpoint.json", changed)
        else:
            what = name
            kind, changed = _damage_text(data, rng, sealed=sealed)
            (folder / name).write_bytes(changed)
        how = f"{what}{', sealed' if sealed else ''}: {kind}"
        _try(table, how, folder, expected, sealed=sealed)
        tick()
    return table


def _damage_text(data: bytes, rng: np.random.Generator, *, sealed: bool) -> tuple[str, bytes]:
    draw = rng.random()
    if sealed or draw < 0.4:
        kind, changed = mutate_json(json.loads(data), rng)
        text = dump(changed)
        if sealed:
            text = _seal(changed, text)
        return kind, text.encode()
    if draw < 0.7:
        return "digit changed", change_digit(data, rng)
    return mutate_bytes(data, rng)


def _seal(changed: Any, text: str) -> str:
    """Return the text with the hash of its content, where there can be one."""
    if not isinstance(changed, dict) or CONTENT_KEY not in changed:
        return text
    try:
        data = json.loads(text)
        data.pop(CONTENT_KEY)
        return json.dumps({**data, CONTENT_KEY: canonical_digest(data)})
    except (ValueError, RecursionError):
        return text


def _damage_weights(data: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    kind, head = mutate_bytes(data[:HEADER_BYTES], rng)
    return kind, head + data[HEADER_BYTES:]


def _renew_sha256(path: Path, weights: bytes) -> None:
    data = json.loads(path.read_text())
    data["sha256"] = hashlib.sha256(weights).hexdigest()
    del data[CONTENT_KEY]
    path.write_text(json.dumps(data))


def _try(table: FuzzTable, kind: str, folder: Path, expected: list[Any], *, sealed: bool) -> None:
    """Load a damaged folder and note what happened."""
    started = time.monotonic()
    signal.alarm(LIMIT_S)  # its default action ends the process
    try:
        found = meaning(folder)
        if found == expected:
            table.same[kind] += 1
        elif not sealed:
            table.broken.append(f"{kind}: silently changed")
        else:
            table.within_bounds[kind] += 1
    except MetarobotError as e:
        line = str(e)
        if "\n" in line or not line.isprintable() or len(line) > MAX_LINE_CHARS:
            table.broken.append(f"{kind}: refused in more than a line: {line[:200]!r}")
        table.refused[kind] += 1
    except Exception as e:  # what this looks for
        table.broken.append(f"{kind}: {type(e).__name__}: {str(e)[:200]}")
    finally:
        signal.alarm(0)
    table.slowest_s = max(table.slowest_s, time.monotonic() - started)
