"""Comparison: every agent on one family at equal steps and seeds, all played on the same tasks.

Runs are found or trained. A plan that was stopped goes on when it is called again: finished runs
are found, the one that was stopped is resumed, and what has been played is kept beside the runs,
under the checkpoint's SHA-256 and the protocol.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metarobot.errors import MetarobotError
from metarobot.evaluation.fine_tuning import count_fine_tuning_trials, play_fine_tuned
from metarobot.evaluation.protocol import (
    Evaluator,
    PlayedReturns,
    Protocol,
    check_faults,
    fault_counts,
    stack_played,
)
from metarobot.evaluation.statistics import (
    LOWER_REFERENCE,
    UPPER_REFERENCE,
    adaptation_score,
    summarise,
)
from metarobot.files import FileError, read_json, write_json
from metarobot.learning.agent_interface import (
    FineTunes,
    agents,
    comparable_agents,
    is_memoryless,
)
from metarobot.tasks.family import families
from metarobot.training.config import TrainConfig, check_config
from metarobot.training.metrics_log import read_metrics
from metarobot.training.run_files import read_card
from metarobot.training.run_folder import Run, collected_steps, open_run, read_config
from metarobot.training.run_lock import RunLock
from metarobot.training.train import open_training, start_training

FINE_TUNED_NAMES = {"pretrained": "fine-tuning", "from scratch": "fine-tuning from scratch"}
"""Weights that are fine-tuned from -> what the comparison calls them."""
IRRELEVANT_SETTINGS = ("device", "sim", "threads", "save_every", "save_every_s")
"""Settings of a training in which a run may differ and still be the same experiment."""
MOST_OLD_RUNS = 1000
"""Runs of other settings that may be moved aside in one folder."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to compare, and where."""

    family: str
    """Task family."""
    out: Path
    """Folder of the runs, FAMILY-AGENT-SEED each."""
    agents: tuple[str, ...] = ()
    """Kinds of agent; all that learn from their own trials if empty."""
    steps: int = 2_000_000
    """Environment steps that each trains for, unless ``settings`` say otherwise."""
    seeds: tuple[int, ...] = (0,)
    """Training seeds of each agent."""
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Agent -> setting of its own, or ``steps`` -> value."""
    reuse: tuple[Path, ...] = ()
    """Run folders, and folders of run folders, where finished runs may be found."""
    threads: int = 0
    """CPU threads; 0 takes all there are."""


class Job(NamedTuple):
    """One run of a plan."""

    train: TrainConfig
    """How it is trained."""
    agent: Any
    """The agent's own configuration."""

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return f"{self.train.family}-{self.train.agent.replace(':', '-')}-{self.train.seed}"

    @property
    def title(self) -> str:
        """Name of the run in messages."""
        return f"{self.train.agent}, seed {self.train.seed}"


def parse_settings(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Read settings written as AGENT.NAME=VALUE; return agent -> name -> value.

    Raises:
        MetarobotError: Another form, an unknown setting, or a value of another type.
    """
    settings: dict[str, dict[str, Any]] = {}
    for word in words:
        key, equals, text = word.partition("=")
        agent, dot, name = key.rpartition(".")
        if not (equals and dot):
            raise MetarobotError(
                f"{word!r} is no setting: write AGENT.NAME=VALUE, as in rl2.epochs=8"
            )
        defaults = {"steps": 1, **asdict(agents.get(agent).config())}
        if name not in defaults:
            raise MetarobotError(
                f"agent {agent!r} has no setting {name!r}; it has: {', '.join(defaults)}"
            )
        settings.setdefault(agent, {})[name] = _parse_value(word, text, defaults[name])
    return settings


def _parse_value(word: str, text: str, default: Any) -> Any:
    """Read a value as the type of the setting's default."""
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise MetarobotError(f"{word!r}: write true or false")
        return text.lower() == "true"
    if not isinstance(default, int | float):
        return text

    try:
        value = float(text)  # whole numbers may be written as 3e6
    except ValueError:
        raise MetarobotError(f"{word!r}: {text!r} is no number") from None
    if not isinstance(default, int):
        return value
    if value != int(value):
        raise MetarobotError(f"{word!r}: {text} is no whole number")
    return int(value)


def plan_jobs(plan: Plan) -> list[Job]:
    """List the runs of a plan, agent by agent.

    Raises:
        MetarobotError: Whatever cannot work, before anything is trained.
    """
    families.get(plan.family)
    names = plan.agents or comparable_agents()
    if not plan.seeds:
        raise MetarobotError("a comparison needs at least one seed")
    for agent in plan.settings:
        if agent not in names:
            raise MetarobotError(
                f"settings are given for {agent!r}, which is not compared; "
                f"compared: {', '.join(names)}"
            )

    jobs = []
    for name in dict.fromkeys(names):  # each once, in this order
        settings = dict(plan.settings.get(name, {}))
        steps = settings.pop("steps", plan.steps)
        agent_config = agents.get(name).config(**settings)
        for seed in dict.fromkeys(plan.seeds):
            train_config = TrainConfig(
                family=plan.family, agent=name, steps=steps, seed=seed, threads=plan.threads
            )
            check_config(train_config)
            jobs.append(Job(train_config, agent_config))
    return jobs


def difference(config: Mapping[str, Any], job: Job) -> str:
    """Return the setting in which a run's config.json differs from a job's; empty if none matters.

    A setting that an older run does not hold is taken to have its default.
    """
    train_defaults = asdict(TrainConfig(family=""))
    agent_defaults = asdict(agents.get(job.train.agent).config())
    sides = (
        (config, asdict(job.train), train_defaults),
        (config["agent_config"], asdict(job.agent), agent_defaults),
    )
    for run_settings, job_settings, defaults in sides:
        # What was read from JSON is compared with what JSON makes of the job's settings.
        for name, wanted in json.loads(json.dumps(job_settings)).items():
            held = run_settings.get(name, defaults[name])
            if name not in IRRELEVANT_SETTINGS and held != wanted:
                return f"{name} {held!r}, not {wanted!r}"
    return ""


class PlanETA:
    """Estimates what is left of a plan, from each agent's own pace."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.left = {job.name: (job.train.agent, job.train.steps) for job in jobs}
        """Run -> its agent, and the steps it has left."""
        self.pace: dict[str, float] = {}
        """Agent -> seconds a step."""

    def update(self, job: Job, metrics: Mapping[str, float]) -> None:
        """Update the estimate with the metrics of a run's last iteration."""
        steps = int(metrics["time/total_timesteps"])
        self.left[job.name] = (job.train.agent, max(0, job.train.steps - steps))
        self.pace[job.train.agent] = metrics["time/time_elapsed"] / steps

    @property
    def steps(self) -> int:
        """Environment steps that are left."""
        return sum(steps for _, steps in self.left.values())

    @property
    def seconds(self) -> float:
        """Seconds that are left; agents not measured yet are taken to be as slow as the average."""
        average = float(np.mean(list(self.pace.values()))) if self.pace else float("nan")
        seconds = 0.0
        for agent, steps in self.left.values():
            if steps:
                seconds += steps * self.pace.get(agent, average)
        return seconds


def train_plan(
    plan: Plan,
    protocol: Protocol,
    report_line: Callable[[str], None],
    watch: Callable[[Job, Mapping[str, float], PlanETA], None],
) -> dict[str, list[Run]]:
    """Find or train every run of a plan.

    Args:
        plan: What to train.
        protocol: What will be played; its split is checked now, not after hours of training.
        report_line: Called with a line of text for what is found, resumed or trained, and why.
        watch: Called after each iteration of a training.

    Returns:
        Agent -> its runs, one a seed; empty if a signal stopped the training, everything saved.
    """
    jobs = plan_jobs(plan)
    families.get(plan.family).space.sample(protocol.split, 1)

    eta = PlanETA(jobs)
    finished: dict[str, Run] = {}
    for job in jobs:
        run = _find_finished_run(job, plan, report_line)
        if run is not None:
            finished[job.name] = run
            eta.update(job, last_metrics(run))

    runs: dict[str, list[Run]] = {}
    for job in jobs:
        run = finished.get(job.name)
        if run is None:

            def tick(metrics: Mapping[str, float], job: Job = job) -> None:
                eta.update(job, metrics)
                watch(job, metrics, eta)

            run = _train_job(job, plan, report_line, tick)
        if run is None:
            return {}
        runs.setdefault(job.train.agent, []).append(run)
    return runs


def _find_finished_run(job: Job, plan: Plan, report_line: Callable[[str], None]) -> Run | None:
    """Find a finished run of a job, in the plan's own folder or where others may be reused."""
    own_folder = plan.out / job.name
    for folder, config in _read_configs([own_folder, *plan.reuse]):
        identity = (config.get("family"), config.get("agent"), config.get("seed"))
        if identity != (job.train.family, job.train.agent, job.train.seed):
            continue
        differs = difference(config, job)
        if differs:
            report_line(f"{job.title}: {folder} is another experiment: {differs}")
        elif collected_steps(folder) < job.train.steps:
            if folder != own_folder:
                report_line(f"{job.title}: {folder} is not finished")
        else:
            report_line(f"{job.title}: {'found' if folder == own_folder else 'reused'} {folder}")
            return open_run(folder)
    return None


def _read_configs(folders: Sequence[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Read the configurations of run folders, and of those in folders of run folders."""
    for folder in folders:
        is_run = (folder / "config.json").exists()
        candidates = [folder] if is_run else sorted(folder.glob("*"))
        for candidate in candidates:
            if not (candidate / "config.json").exists():
                continue
            config = read_json(candidate / "config.json")
            if isinstance(config, dict) and config.get("kind") == "metarobot-run":
                yield candidate, read_config(candidate)


def _train_job(
    job: Job,
    plan: Plan,
    report_line: Callable[[str], None],
    tick: Callable[[Mapping[str, float]], None],
) -> Run | None:
    """Train a run, going on where it was stopped; return None if it is stopped now."""
    folder = plan.out / job.name
    config_file = folder / "config.json"
    if config_file.exists() and difference(read_config(folder), job):
        old = _unused_name(folder)
        # Nobody may be training what is moved.
        with RunLock(folder):
            folder.rename(old)
        report_line(f"{job.title}: what was in {folder} is in {old} now")

    done = collected_steps(folder)
    doing = f"resumed after {done:,} steps" if done else "training"
    report_line(f"{job.title}: {doing} in {folder}")
    if config_file.exists():
        training = open_training(open_run(folder))
    else:
        training = start_training(job.train, job.agent, folder)
    try:
        finished = training.train(show=False, tick=tick)
    except FileError:
        raise
    except MetarobotError as e:
        raise MetarobotError(f"{job.title}: {e}") from e
    return training.run if finished else None


def _unused_name(folder: Path) -> Path:
    """Return FOLDER.old1, or the first such name that is not taken."""
    for i in range(1, MOST_OLD_RUNS):
        old = folder.with_name(f"{folder.name}.old{i}")
        if not old.exists():
            return old
    raise MetarobotError(f"{folder.parent} holds {MOST_OLD_RUNS - 1} old runs of {folder.name}")


def last_metrics(run: Run) -> Mapping[str, float]:
    """Return steps and seconds of a finished run; an agent in the box has them on its card."""
    rows = read_metrics(run.folder / "metrics.jsonl")
    if rows:
        return rows[-1]
    card_file = run.folder / "card.json"
    card = read_card(card_file) if card_file.exists() else {}
    return {"time/total_timesteps": run.steps, "time/time_elapsed": float(card.get("wall_s", 0.0))}


def count_plays(runs: Mapping[str, Sequence[Run]], protocol: Protocol) -> int:
    """Count the trials that ``compare_runs`` plays, if nothing has been played before."""
    plays = sum(len(group) for group in runs.values())
    pair = _fine_tuning_pair(runs, protocol)
    if pair is not None:
        # As many untrained policies are fine-tuned as the method has runs.
        plays += count_fine_tuning_trials(len(runs[pair.policy]) + len(runs[pair.method]))
    return plays


def compare_runs(
    plan: Plan,
    runs: Mapping[str, Sequence[Run]],
    protocol: Protocol,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Play the protocol with every agent, and return the comparison as JSON data.

    If a policy without memory and an agent that adapts by gradient steps are among them, the policy
    is also fine-tuned as that agent adapts.

    Args:
        plan: Names the family, and the folder where returns are kept.
        runs: Agent -> its runs, one a training seed.
        protocol: What is played.
        tick: Called after each trial that is played; ``count_plays`` says how many these are.
    """
    evaluator = Evaluator(families.get(plan.family), protocol, tick)
    cache = plan.out / "played"

    played = {name: _play_runs(evaluator, group, cache) for name, group in runs.items()}
    tuned: dict[str, PlayedReturns] = {}

    pair = _fine_tuning_pair(runs, protocol)
    if pair is not None:
        method_runs = runs[pair.method]
        policy_runs = runs[pair.policy]
        tuned = _play_fine_tuned(evaluator, method_runs, policy_runs, cache)

    # A faulted episode is worth the worst return that any agent got.
    worst = min(results.worst for results in [*played.values(), *tuned.values()])
    entries = {}
    for name, results in played.items():
        entries[name] = _agent_entry(runs[name], results.with_worst(worst))
    for name, results in tuned.items():
        entry = _agent_entry(policy_runs, results.with_worst(worst))
        # The policy itself needs no exploration noise; the method that tunes it does.
        entries[name] = {**entry, "explores": True}

    _add_ranks(entries)
    _add_scores(entries)
    seeds = {run.train_config.seed for group in runs.values() for run in group}
    return {
        "family": plan.family,
        "split": protocol.split,
        "tasks": len(evaluator.tasks),
        "seeds": sorted(seeds),
        "task_values": [task.as_dict() for task in evaluator.tasks],
        "space": evaluator.family.space.hash,
        "agents": entries,
    }


def _agent_entry(runs: Sequence[Run], played: PlayedReturns) -> dict[str, Any]:
    """Describe an agent and its results ``(run, episode, task)``."""
    metrics = [last_metrics(run) for run in runs]
    agent = runs[0].load_agent()
    returns = played.returns
    episodes = returns.shape[1]
    return {
        "runs": [run.name for run in runs],
        "seeds": [run.train_config.seed for run in runs],
        "steps": [int(row["time/total_timesteps"]) for row in metrics],
        "wall_s": [round(float(row["time/time_elapsed"]), 1) for row in metrics],
        "rollouts": runs[0].rollouts,
        "explores": bool(agent.explores),
        "privileged": bool(agent.privileged),
        "agent_config": runs[0].config["agent_config"],
        "episodes": [{"episode": k, **summarise(returns[:, k])} for k in range(episodes)],
        "returns": returns.round(3).tolist(),
        "faults": fault_counts(played),
    }


def _add_ranks(entries: Mapping[str, dict[str, Any]]) -> None:
    """Rank agents by the mean return of the last episode; privileged ones have no rank."""
    contestants = [entry for entry in entries.values() if not entry["privileged"]]
    contestants.sort(key=lambda entry: -entry["episodes"][-1]["mean"])
    for rank, entry in enumerate(contestants, start=1):
        entry["rank"] = rank


def _add_scores(entries: Mapping[str, dict[str, Any]]) -> None:
    """Add the adaptation score to every episode, if both references were compared.

    The references are those two agents, not any privileged or memoryless one: a report's score must
    mean the same whatever else is compared.
    """
    if UPPER_REFERENCE not in entries or LOWER_REFERENCE not in entries:
        return
    upper = np.array(entries[UPPER_REFERENCE]["returns"])
    lower = np.array(entries[LOWER_REFERENCE]["returns"])
    for entry in entries.values():
        returns = np.array(entry["returns"])
        for k, row in enumerate(entry["episodes"]):
            row.update(adaptation_score(returns[:, k], upper[:, k], lower[:, k]))


def _play_runs(evaluator: Evaluator, runs: Sequence[Run], cache: Path) -> PlayedReturns:
    """Play with every run, or read what it earned before: arrays ``(run, episode, task)``.

    Raises:
        EvaluationError: Actions that are not finite, or too many faulted episodes.
    """
    results = []
    for run in runs:

        def play(run: Run = run) -> list[PlayedReturns]:
            return [evaluator.play(run.load_agent(), run.rollouts, name=run.name)]

        results += _play_once(cache, evaluator, [run], play)
    stacked = stack_played(results)
    check_faults(stacked, ", ".join(run.name for run in runs))
    return stacked


class FineTuningPair(NamedTuple):
    """An agent that adapts by gradient steps, and a policy to fine-tune as it does."""

    method: str
    policy: str


def _fine_tuning_pair(
    runs: Mapping[str, Sequence[Run]], protocol: Protocol
) -> FineTuningPair | None:
    """Choose what to fine-tune, and how; None if there is no such pair among the agents."""
    if protocol.episodes < 2:
        return None
    untrained = {name: group[0].learner().agent for name, group in runs.items()}
    methods = [name for name, agent in untrained.items() if isinstance(agent, FineTunes)]
    policies = [name for name, agent in untrained.items() if is_memoryless(agent)]
    if not methods or not policies:
        return None
    # Several policies are the same algorithm: the first by name, in whichever order they are asked.
    return FineTuningPair(method=methods[0], policy=min(policies))


def _play_fine_tuned(
    evaluator: Evaluator, method_runs: Sequence[Run], policy_runs: Sequence[Run], cache: Path
) -> dict[str, PlayedReturns]:
    """Play with fine-tuned policies: name in the comparison -> results ``(run, episode, task)``."""

    def play() -> list[PlayedReturns]:
        tuned = play_fine_tuned(method_runs, policy_runs, evaluator)
        results = [tuned[name].played for name in FINE_TUNED_NAMES]
        return [played._replace(returns=played.returns.round(3)) for played in results]

    results = _play_once(cache, evaluator, [*method_runs, *policy_runs], play)
    return dict(zip(FINE_TUNED_NAMES.values(), results, strict=True))


def _play_once(
    cache: Path, evaluator: Evaluator, runs: Sequence[Run], play: Callable[[], list[PlayedReturns]]
) -> list[PlayedReturns]:
    """Return what ``play`` returns, kept in a file under the checkpoints and the protocol.

    Success rates are not kept. A file of before faults were counted is written anew.
    """
    key = [
        evaluator.family.name,
        evaluator.family.space.hash,
        protocol_key(evaluator.protocol),
        [run.weights_sha256 for run in runs],
        [run.rollouts for run in runs],
    ]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    path = cache / f"{digest[:16]}.json"
    if not path.exists() or "played" not in read_json(path):
        write_json(path, {"key": key, "played": [_to_json(played) for played in play()]})
    return [_from_json(entry) for entry in read_json(path)["played"]]


def _to_json(played: PlayedReturns) -> dict[str, Any]:
    return {
        "returns": played.returns.tolist(),
        "faults": played.faults.tolist(),
        "fault_share": played.fault_share.tolist(),
        "worst": played.worst,
    }


def _from_json(entry: Mapping[str, Any]) -> PlayedReturns:
    return PlayedReturns(
        returns=np.array(entry["returns"]),
        success=None,
        faults=np.array(entry["faults"]),
        fault_share=np.array(entry["fault_share"]),
        worst=float(entry["worst"]),
    )


def protocol_key(protocol: Protocol) -> dict[str, Any]:
    """Return the settings of a protocol that the returns depend on.

    Threads do not change them. The CPU is not named, so that returns kept before there was another
    simulator are still found.
    """
    key = asdict(protocol)
    del key["threads"]
    if protocol.sim == "cpu":
        del key["sim"]
        del key["device"]
    return key
