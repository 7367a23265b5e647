"""Comparison: every agent on one family at equal steps and seeds, found or trained, and all played
on the same tasks.

A plan that was stopped goes on when it is called again: finished runs are found, the one that was
stopped is resumed, and what has been played is kept beside the runs, by the checkpoint's SHA-256
and the protocol.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metarobot.errors import MetarobotError
from metarobot.evaluation.evaluate import count_trials
from metarobot.evaluation.fine_tuning import fine_tune
from metarobot.evaluation.protocol import Evaluator, Protocol
from metarobot.evaluation.statistics import adaptation_score, summarise
from metarobot.files import read_json, write_json
from metarobot.learning.agent_interface import agents, comparable_agents
from metarobot.tasks.family import families
from metarobot.training.config import TrainConfig, check_config
from metarobot.training.metrics_log import read_metrics
from metarobot.training.run_folder import CheckpointError, Run, collected_steps, open_run
from metarobot.training.train import start_run, train
from metarobot.types import Floats

TUNED = {"pretrained": "fine-tuning", "from scratch": "fine-tuning from scratch"}
"""Policies that are fine-tuned -> what the comparison calls them."""
INDIFFERENT = ("device", "sim", "threads", "save_every")
"""Settings of a training that a run may differ in and still be the same experiment."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to compare, and where."""

    family: str
    out: Path
    """Folder of the runs, FAMILY-AGENT-SEED each."""
    agents: tuple[str, ...] = ()
    """Kinds of agent; all that learn from their own trials if empty."""
    steps: int = 2_000_000
    """Environment steps that each trains for, unless ``settings`` say otherwise."""
    seeds: tuple[int, ...] = (0,)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Agent -> setting of its own, or ``steps`` -> value."""
    reuse: tuple[Path, ...] = ()
    """Run folders, and folders of run folders, where finished runs may be found."""
    threads: int = 0


class Job(NamedTuple):
    """One run of a plan."""

    train: TrainConfig
    agent: Any
    """The agent's own configuration."""

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return f"{self.train.family}-{self.train.agent.replace(':', '-')}-{self.train.seed}"

    @property
    def title(self) -> str:
        """What a message calls it."""
        return f"{self.train.agent}, seed {self.train.seed}"


def parse_settings(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Read settings written as AGENT.NAME=VALUE: agent -> name -> value."""
    settings: dict[str, dict[str, Any]] = {}
    for word in words:
        key, is_one, text = word.partition("=")
        agent, dot, name = key.rpartition(".")
        if not (is_one and dot):
            raise MetarobotError(
                f"{word!r} is no setting: write AGENT.NAME=VALUE, as in rl2.epochs=8"
            )
        usual = {"steps": 1, **asdict(agents.get(agent).config())}
        if name not in usual:
            raise MetarobotError(
                f"agent {agent!r} has no setting {name!r}; it has: {', '.join(usual)}"
            )
        settings.setdefault(agent, {})[name] = _read(word, text, usual[name])
    return settings


def _read(word: str, text: str, usual: Any) -> Any:
    """Read a value as the type of the usual one."""
    if isinstance(usual, bool):
        if text.lower() not in ("true", "false"):
            raise MetarobotError(f"{word!r}: write true or false")
        return text.lower() == "true"
    if not isinstance(usual, int | float):
        return text
    try:
        value = float(text)
    except ValueError:
        raise MetarobotError(f"{word!r}: {text!r} is no number") from None
    if isinstance(usual, int) and value != int(value):
        raise MetarobotError(f"{word!r}: {text} is no whole number")
    return int(value) if isinstance(usual, int) else value


def plan_jobs(plan: Plan) -> list[Job]:
    """List the runs of a plan, agent by agent; raise for what cannot work before anything is
    trained.
    """
    families.get(plan.family)
    names = plan.agents or comparable_agents()
    if not plan.seeds:
        raise MetarobotError("a comparison needs at least one seed")
    for agent in plan.settings:
        if agent not in names:
            raise MetarobotError(
                f"settings are given for {agent!r}, which is not compared; compared: {', '.join(names)}"
            )
    made = []
    for name in dict.fromkeys(names):
        own = dict(plan.settings.get(name, {}))
        steps = own.pop("steps", plan.steps)
        config = agents.get(name).config(**own)
        for seed in dict.fromkeys(plan.seeds):
            job = Job(
                TrainConfig(
                    family=plan.family, agent=name, steps=steps, seed=seed, threads=plan.threads
                ),
                config,
            )
            check_config(job.train)
            made.append(job)
    return made


def difference(config: Mapping[str, Any], job: Job) -> str:
    """Say in which setting a run's configuration differs from a job's; nothing if it is the same
    experiment.
    """
    usual = asdict(TrainConfig(family="")), asdict(agents.get(job.train.agent).config())
    sides = (config, asdict(job.train)), (config["agent_config"], asdict(job.agent))
    for defaults, (held, asked) in zip(usual, sides, strict=True):
        for name, value in json.loads(json.dumps(asked)).items():
            here = held.get(name, defaults[name])
            if name not in INDIFFERENT and here != value:
                return f"{name} {here!r}, not {value!r}"
    return ""


class PlanETA:
    """What is left of a plan, from each agent's own pace."""

    def __init__(self, planned: Sequence[Job]) -> None:
        self.left = {job.name: (job.train.agent, job.train.steps) for job in planned}
        self.pace: dict[str, float] = {}
        """Agent -> seconds a step."""

    def hear(self, job: Job, metrics: Mapping[str, float]) -> None:
        """Take in where a run stands."""
        steps = int(metrics["time/total_timesteps"])
        self.left[job.name] = job.train.agent, max(0, job.train.steps - steps)
        self.pace[job.train.agent] = metrics["time/time_elapsed"] / steps

    @property
    def steps(self) -> int:
        """Steps that are left."""
        return sum(steps for _, steps in self.left.values())

    @property
    def seconds(self) -> float:
        """Seconds that are left; an agent not measured yet is taken to be as slow as the others on
        average.
        """
        usual = float(np.mean(list(self.pace.values()))) if self.pace else float("nan")
        return sum(
            steps * self.pace.get(agent, usual) for agent, steps in self.left.values() if steps
        )


def train_plan(
    plan: Plan,
    protocol: Protocol,
    say: Callable[[str], None],
    watch: Callable[[Job, Mapping[str, float], PlanETA], None],
) -> dict[str, list[Run]]:
    """Find or train every run of a plan: agent -> its runs, one a seed; nothing if a signal stopped
    it, all saved.

    What the protocol asks for is checked before, not after hours of training.

    ``say`` is told in a line what is found, resumed and trained, and why; ``watch`` is called after
    each iteration.
    """
    planned = plan_jobs(plan)
    families.get(plan.family).space.sample(protocol.split, 1)
    outlook, found = PlanETA(planned), {}
    for job in planned:
        if run := _found(job, plan, say):
            found[job.name] = run
            outlook.hear(job, last_metrics(run))
    gathered: dict[str, list[Run]] = {}
    for job in planned:
        run = found.get(job.name) or _trained(job, plan, say, partial(_heard, job, outlook, watch))
        if run is None:
            return {}
        gathered.setdefault(job.train.agent, []).append(run)
    return gathered


def _heard(
    job: Job, outlook: PlanETA, watch: Callable[..., None], metrics: Mapping[str, float]
) -> None:
    outlook.hear(job, metrics)
    watch(job, metrics, outlook)


def _found(job: Job, plan: Plan, say: Callable[[str], None]) -> Run | None:
    """Find a finished run of the same experiment, in the plan's own folder or where others may be
    reused.
    """
    own = plan.out / job.name
    for folder, config in _configs([own, *plan.reuse]):
        if [config.get(k) for k in ("family", "agent", "seed")] != [
            job.train.family,
            job.train.agent,
            job.train.seed,
        ]:
            continue
        differs = difference(config, job)
        if differs:
            say(f"{job.title}: {folder} is another experiment: {differs}")
        elif collected_steps(folder) < job.train.steps:
            if folder != own:
                say(f"{job.title}: {folder} is not finished")
        else:
            say(f"{job.title}: {'found' if folder == own else 'reused'} {folder}")
            return open_run(folder)
    return None


def _configs(folders: Sequence[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Read the configurations of run folders, and of those in folders of them."""
    for folder in folders:
        for path in [folder] if (folder / "config.json").exists() else sorted(folder.glob("*")):
            if (path / "config.json").exists():
                config = read_json(path / "config.json")
                if isinstance(config, dict) and config.get("kind") == "metarobot-run":
                    yield path, config


def _trained(
    job: Job, plan: Plan, say: Callable[[str], None], tick: Callable[[Mapping[str, float]], None]
) -> Run | None:
    """Train a run, going on where it was stopped; None if it is stopped now."""
    folder = plan.out / job.name
    if (folder / "config.json").exists() and difference(read_json(folder / "config.json"), job):
        aside = next(
            p
            for i in range(1, 1000)
            if not (p := folder.with_name(f"{folder.name}.old{i}")).exists()
        )
        folder.rename(aside)
        say(f"{job.title}: what was in {folder} is in {aside} now")
    done = collected_steps(folder)
    say(f"{job.title}: {f'resumed after {done:,} steps' if done else 'training'} in {folder}")
    run = (
        open_run(folder)
        if (folder / "config.json").exists()
        else start_run(job.train, job.agent, folder)
    )
    try:
        return run if train(run, resume=bool(done), show=False, tick=tick) else None
    except CheckpointError:
        raise
    except MetarobotError as e:
        raise MetarobotError(f"{job.title}: {e}") from e


def last_metrics(run: Run) -> Mapping[str, float]:
    """Return steps and seconds of a finished run; an agent in the box has them on its card."""
    rows = read_metrics(run.folder / "metrics.jsonl")
    if rows:
        return rows[-1]
    card = read_json(run.folder / "card.json") if (run.folder / "card.json").exists() else {}
    return {"time/total_timesteps": run.steps, "time/time_elapsed": float(card.get("wall_s", 0.0))}


def count_plays(runs: Mapping[str, Sequence[Run]], protocol: Protocol) -> int:
    """Count the trials that measuring plays, if nothing has been played before."""
    method, policy = _tunable(runs, protocol)
    tuned = (
        count_trials(len(runs[method]), 0, 0, len(runs[policy]), False, False)
        if method and policy
        else 0
    )
    return sum(map(len, runs.values())) + tuned - (len(runs[method]) if tuned else 0)


def compare_runs(
    plan: Plan,
    runs: Mapping[str, Sequence[Run]],
    protocol: Protocol,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Play the protocol with every agent, and return the comparison as JSON data; ``tick`` is
    called after each trial.

    If a policy without memory and an agent that adapts by gradient steps are among them, the policy
    is also fine-tuned as that agent adapts.
    """
    arena, cache = Evaluator(families.get(plan.family), protocol, tick), plan.out / "played"
    entries = {name: _entry(group, _returns(arena, group, cache)) for name, group in runs.items()}
    for name, policy, returns in _tuned(arena, runs, cache):
        entries[name] = {**_entry(runs[policy], returns), "explores": True}
    _rank(entries)
    return {
        "family": plan.family,
        "split": protocol.split,
        "tasks": len(arena.tasks),
        "seeds": sorted({int(r.config["seed"]) for group in runs.values() for r in group}),
        "task_values": [t.as_dict() for t in arena.tasks],
        "space": arena.family.space.hash,
        "agents": entries,
    }


def _entry(runs: Sequence[Run], returns: Floats) -> dict[str, Any]:
    """Describe an agent that earned ``returns`` ``(run, episode, task)``."""
    metrics = [last_metrics(r) for r in runs]
    agent = runs[0].load_agent()
    return {
        "runs": [r.name for r in runs],
        "seeds": [int(r.config["seed"]) for r in runs],
        "steps": [int(m["time/total_timesteps"]) for m in metrics],
        "wall_s": [round(float(m["time/time_elapsed"]), 1) for m in metrics],
        "rollouts": runs[0].rollouts,
        "explores": bool(agent.explores),
        "privileged": bool(agent.privileged),
        "agent_config": runs[0].config["agent_config"],
        "episodes": [{"episode": k, **summarise(returns[:, k])} for k in range(returns.shape[1])],
        "returns": returns.round(3).tolist(),
    }


def _rank(entries: dict[str, dict[str, Any]]) -> None:
    """Rank by the return of the last episode, oracles left out; with oracle and blind there, add
    the score.
    """
    ranked = sorted(
        (e for e in entries.values() if not e["privileged"]),
        key=lambda e: -e["episodes"][-1]["mean"],
    )
    for place, entry in enumerate(ranked, 1):
        entry["rank"] = place
    if not {"oracle", "blind"} <= entries.keys():
        return
    upper, lower = (np.array(entries[k]["returns"]) for k in ("oracle", "blind"))
    for entry in entries.values():
        returns = np.array(entry["returns"])
        for k, row in enumerate(entry["episodes"]):
            row |= adaptation_score(returns[:, k], upper[:, k], lower[:, k])


def _returns(arena: Evaluator, runs: Sequence[Run], cache: Path) -> Floats:
    """Play with every run, or read what it earned before, ``(run, episode, task)``."""

    def play(run: Run) -> Floats:
        return arena.play(run.load_agent(), run.rollouts).returns

    return np.stack([_kept(cache, arena, [run], partial(play, run)) for run in runs])


def _tuned(
    arena: Evaluator, runs: Mapping[str, Sequence[Run]], cache: Path
) -> Iterator[tuple[str, str, Floats]]:
    """Fine-tune a policy without memory as an agent does that adapts by gradient: name, whose
    policy, returns.
    """
    method, policy = _tunable(runs, arena.protocol)
    if not (method and policy):
        return
    group = [*runs[method], *runs[policy]]

    def tuned() -> Floats:
        found = fine_tune(runs[method], runs[policy], arena)
        return np.array([found[k]["returns"] for k in TUNED])

    for name, returns in zip(TUNED.values(), _kept(cache, arena, group, tuned), strict=True):
        yield name, policy, returns


def _tunable(runs: Mapping[str, Sequence[Run]], protocol: Protocol) -> tuple[str, str]:
    """Name an agent that adapts by gradient steps and a policy without memory, empty where there is
    none.
    """
    method = next(
        (k for k, group in runs.items() if hasattr(group[0].learner().agent, "fine_tuned_from")), ""
    )
    policy = next((k for k in ("blind", "ppo") if k in runs), "")
    return (method, policy) if protocol.episodes > 1 else ("", "")


def _kept(cache: Path, arena: Evaluator, runs: Sequence[Run], play: Callable[[], Floats]) -> Floats:
    """Return what ``play`` does, kept in a file named after the checkpoints and the protocol."""
    protocol = {k: v for k, v in asdict(arena.protocol).items() if k != "threads"}
    weights = [read_json(r.folder / "checkpoint.json")["sha256"] for r in runs]
    key = [
        arena.family.name,
        arena.family.space.hash,
        protocol,
        weights,
        [r.rollouts for r in runs],
    ]
    path = cache / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
    if not path.exists():
        write_json(path, {"key": key, "returns": play().tolist()})
    return np.array(read_json(path)["returns"])
