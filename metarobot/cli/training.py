"""Subcommands of training: train, and what is made of run folders."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional

from metarobot import api
from metarobot.cli.main import INTERRUPTED, parse_and_call
from metarobot.errors import MetarobotError
from metarobot.learning.agent_interface import agents as registry
from metarobot.training.config import KEPT_ON_RESUME, TrainConfig
from metarobot.training.run_folder import open_run, read_train_config
from metarobot.training.train import TrainingStopped


@dataclass(frozen=True)
class TrainArguments:
    """The arguments of ``metarobot train``."""

    config: TrainConfig
    agent_config: Any
    out: Path
    resume: bool


def train(arguments: Sequence[str]) -> None:
    """Parse the arguments of ``metarobot train`` and train."""
    defaults = TrainConfig(family=tyro.MISSING)
    parsed = _parse_train(arguments, defaults)
    if parsed.resume:
        # What a run keeps unless it is given becomes the default, and the arguments are read again.
        held = read_train_config(parsed.out)
        kept: dict[str, Any] = {name: getattr(held, name) for name in KEPT_ON_RESUME}
        parsed = _parse_train(arguments, replace(defaults, **kept))

    try:
        run = api.train(
            parsed.config,
            agent_config=parsed.agent_config,
            out=parsed.out,
            resume=parsed.resume,
        )
    except TrainingStopped:
        print(f"stopped and saved; continue with: metarobot {_resuming_command()}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    next_command = "shots" if run.train_config.demos else "evaluate"
    print(f"done: {parsed.out}; now: metarobot {next_command} {parsed.out}")


def _parse_train(arguments: Sequence[str], defaults: TrainConfig) -> TrainArguments:
    """Read the flags of ``TrainConfig`` and of the chosen agent's configuration class."""

    def train(
        config: TrainConfig, agent_config: Any, out: Path, resume: bool = False
    ) -> TrainArguments:
        """Meta-train an agent over a family's training tasks.

        Ctrl-C saves; ``--resume`` continues, bit for bit as if never interrupted. Progress goes to
        the terminal, metrics.jsonl and TensorBoard. The flags after --save-every-s are the chosen
        agent's own settings.

        Args:
            config: Settings of the training.
            agent_config: Settings of the agent.
            out: Run folder to write.
            resume: Continue the run in ``out``; more steps than it had make it longer.
        """
        return TrainArguments(config, agent_config, out, resume)

    agent_class = registry.get(_agent_argument(arguments)).config
    unprefixed = tyro.conf.arg(name="")
    train.__annotations__["config"] = Annotated[TrainConfig, unprefixed]
    train.__annotations__["agent_config"] = Annotated[agent_class, unprefixed]
    train.__defaults__ = (defaults, agent_class(), tyro.MISSING, False)
    parsed: TrainArguments = parse_and_call(train, "train", arguments)
    return parsed


def _agent_argument(arguments: Sequence[str]) -> str:
    """Find the kind of agent before the arguments are parsed: it decides which flags there are."""
    for i, word in enumerate(arguments):
        if word.startswith("--agent="):
            return word.removeprefix("--agent=")
        if word == "--agent" and i + 1 < len(arguments):
            return arguments[i + 1]
    return TrainConfig(family="").agent


def _resuming_command() -> str:
    words = sys.argv[1:]
    return " ".join(words if "--resume" in words else [*words, "--resume"])


def plot(
    runs: Positional[tuple[str, ...]],
    /,
    out: Path,
    reach: tuple[float, ...] = (),
    at: tuple[float, ...] = (),
) -> None:
    """Draw the learning curves of runs, over wall time and over steps.

    Args:
        runs: Run folders.
        out: Picture to write (.png, .svg or .pdf).
        reach: Also print when the last episode's return, mean of 10 iterations with exploration,
            first came this high.
        at: Also print that return after so many seconds of training, and the steps it took.
    """
    from metarobot.evaluation.plots import plot_learning_curves
    from metarobot.evaluation.tables import milestone_lines
    from metarobot.training.metrics_log import read_metrics

    opened = [open_run(run) for run in runs]
    plot_learning_curves(opened, out)
    if reach or at:
        rows = {run.name: read_metrics(run.folder / "metrics.jsonl") for run in opened}
        print(milestone_lines(rows, reach, at))
    print(f"wrote {out}")


def publish(
    run: Positional[str], /, out: Path, summary: str, command: str, report: Path | None = None
) -> None:
    """Copy a run's agent, without its optimiser, with a card of how it was made.

    Args:
        run: Run folder.
        out: Folder to write.
        summary: What the agent is, in a sentence.
        command: The command that made it.
        report: What ``metarobot evaluate --json`` or ``shots --json`` found of it, to go on the
            card.
    """
    from metarobot.evaluation.evaluate import card_results
    from metarobot.files import read_json
    from metarobot.training.metrics_log import read_metrics
    from metarobot.training.run_folder import publish_agent

    opened = open_run(run)
    rows = read_metrics(opened.folder / "metrics.jsonl")
    if not rows:
        raise MetarobotError(f"{opened.folder} has no metrics.jsonl: it was not trained here")
    last = rows[-1]
    card: dict[str, Any] = {
        "summary": summary,
        "command": command,
        "steps": last["time/total_timesteps"],
        "wall_s": round(last["time/time_elapsed"], 1),
        "seed": opened.train_config.seed,
    }
    # Where no episode was without a fault there is no return.
    if last.get("meta/post_adapt_return") is not None:
        card["return_last_episode"] = round(last["meta/post_adapt_return"], 1)
    if "machine" in opened.config:
        threads = opened.train_config.threads or "all"
        card["machine"] = f"{opened.config['machine']}, {threads} of them used"
    if report is not None:
        card["results"] = card_results(read_json(report))
    publish_agent(opened, out, card)
