import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run
from torch import Tensor

from metarobot.env.base import Env
from metarobot.env.factory import make_env
from metarobot.errors import MetarobotError
from metarobot.evaluation import few_shot_imitation as module
from metarobot.evaluation.few_shot_imitation import few_shot
from metarobot.evaluation.protocol import EvaluationError
from metarobot.learning.agent_interface import agents
from metarobot.tasks.family import families
from metarobot.training import train as training
from metarobot.training.checkpoints import save_checkpoint
from metarobot.training.collect import ExpertAgent
from metarobot.training.config import TrainConfig
from metarobot.training.demonstrations import (
    Demonstrations,
    DemosError,
    read_demonstrations,
    record_demonstrations,
)
from metarobot.training.metrics_log import read_metrics
from metarobot.training.run_folder import Run, open_run
from metarobot.training.train import start_run, train

PLACEMENT, SHOWN = families.get("Placement"), families.get("PlacementShown")
TASKS, VARIANTS, SHOTS = 2, 4, 2
SMALL = {"worlds": 8, "rollouts": VARIANTS, "width": 8, "inner_steps": 1}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demonstrations of a family that hides the answer and of one that shows it."""
    root = tmp_path_factory.mktemp("shots")
    record_demonstrations(
        PLACEMENT, root / "hidden", split="extrapolate", tasks=TASKS, shots=SHOTS, threads=1
    )
    record_demonstrations(SHOWN, root / "shown", tasks=2, shots=SHOTS, threads=1)
    return root


def begun(
    out: Path, demos: Path | str, family: str = "Placement", steps: int = 3000, **settings: Any
) -> Run:
    config = agents.get("imitation").config(**SMALL | settings)
    run = TrainConfig(
        family=family, agent="imitation", demos=str(demos), steps=steps, threads=1, save_every=1
    )
    return start_run(run, config, out)


def brief(run: Run, horizon: int) -> Run:
    """The same run, living shorter episodes."""
    return replace(run, family=replace(run.family, horizon=horizon))


def trained(out: Path, demos: Path | str, **settings: Any) -> Run:
    run = begun(out, demos, **settings)
    assert train(run, show=False)
    return run


@pytest.fixture(scope="module")
def imitator(root: Path) -> Run:
    return trained(root / "imitator", root / "hidden")


@pytest.fixture(scope="module")
def guide(root: Path) -> Run:
    """An agent that is shown the answer."""
    return trained(root / "guide", root / "shown", family="PlacementShown", steps=1)


@pytest.fixture(scope="module")
def demos(root: Path) -> Demonstrations:
    return read_demonstrations(root / "hidden")


def labelled(tasks: int = 5, shots: int = 5, steps: int = 3) -> Demonstrations:
    """Demonstrations whose first observation says which they are: task, variant, shot."""
    where = torch.cartesian_prod(*map(torch.arange, (tasks, VARIANTS, shots, steps))).float()
    obs = where.view(tasks, VARIANTS, shots, steps, 4)
    valid = torch.arange(steps) < (2 + (torch.arange(tasks) % 2))[:, None, None, None].expand(
        -1, VARIANTS, shots, -1
    )
    chosen = tuple(PLACEMENT.space.sample("train", tasks, 0))
    return Demonstrations(
        family=PLACEMENT, split="train", tasks=chosen, obs=obs, action=-obs, valid=valid
    )


def test_support_and_query_are_other_demonstrations_of_the_same_tasks() -> None:
    demos, met = labelled(), set()
    for seed in range(20):
        trials = demos.trials(3, 2, [seed, 1])
        support, query = (e.obs[0].view(3, VARIANTS, 2, 4)[..., :3] for e in trials.episodes)
        for part in (support, query):
            assert (part[..., 0] == part[:, :1, :1, 0]).all()
            assert (part[..., 1] == torch.arange(VARIANTS)[None, :, None]).all()
        assert torch.equal(support[..., 0], query[..., 0])
        for a, b in zip(support.flatten(1, 2), query.flatten(1, 2), strict=True):
            shown, asked = ({tuple(x) for x in rows.tolist()} for rows in (a, b))
            assert len(shown) == len(asked) == 2 * VARIANTS
            assert shown.isdisjoint(asked)
            met |= shown
        tasks = support[:, 0, 0, 0].long().tolist()
        expected = PLACEMENT.space.encode([demos.tasks[i] for i in tasks]).repeat_interleave(
            2 * VARIANTS, 0
        )
        assert torch.equal(trials.task, expected)
    assert len(met) == 5 * VARIANTS * 5


def test_demonstrations_are_a_rollout_whose_worlds_go_variant_by_variant() -> None:
    rollout = labelled().rollout([4, 1], torch.tensor([[0, 3], [2, 2]]))
    named = [[4, v, s] for v in range(VARIANTS) for s in (0, 3)] + [
        [1, v, 2] for v in range(VARIANTS) for _ in (0, 0)
    ]
    for k in range(3):
        assert rollout.obs[k].tolist() == [[*n, k] for n in named]
    assert torch.equal(rollout.action, -rollout.obs)
    assert rollout.valid.tolist() == [[True] * 16, [True] * 16, [False] * 8 + [True] * 8]
    assert rollout.reward.shape == rollout.terminated.shape == rollout.truncated.shape == (3, 16)
    assert not rollout.faulted.any()
    assert rollout.critic_obs.shape == (3, 16, 0)


def test_trials_are_a_function_of_the_seed() -> None:
    demos = labelled()
    first, again, other = (demos.trials(4, 2, seed) for seed in ([0, 7], [0, 7], [0, 8]))
    for a, b, c in zip(first.episodes, again.episodes, other.episodes, strict=True):
        assert torch.equal(a.obs, b.obs)
        assert not torch.equal(a.obs, c.obs)


def test_too_few_demonstrations_for_a_trial_are_refused() -> None:
    assert labelled().trials(1, 2, [0]).episodes[0].valid.shape == (3, 2 * VARIANTS)
    with pytest.raises(
        DemosError,
        match="3 demonstrations to adapt to and 3 to match need 6 of every variant; there are 5",
    ):
        labelled().trials(1, 3, [0])


def test_a_report_says_what_was_measured(imitator: Run, guide: Run, demos: Demonstrations) -> None:
    ticks: list[int] = []
    how = {"reference": brief(guide, 5), "threads": 1, "tick": lambda: ticks.append(1)}
    report = few_shot(brief(imitator, 75), demos, shots=(1, 2), **how)
    keys = {
        "family",
        "agent",
        "run",
        "steps",
        "split",
        "tasks",
        "chance",
        "shots",
        "expert",
        "reference",
    }
    assert report.keys() == keys
    named = {
        "family": "Placement",
        "agent": "imitation",
        "run": "imitator",
        "split": "extrapolate",
        "tasks": TASKS,
    }
    assert {k: report[k] for k in named} == named
    assert report["chance"] == 0.25
    assert report["steps"] == 3000
    assert [r["shots"] for r in report["shots"]] == [0, 1, 2]
    assert len(ticks) == 3
    for r in (*report["shots"], report["expert"], report["reference"]):
        low, high = r["ci95"]
        assert 0 <= low <= r["mean"] <= high <= 1
    assert report["expert"]["mean"] >= 0.9
    assert report["reference"]["run"] == "guide"
    for r in report["shots"]:
        assert r.keys() == {"shots", "mean", "ci95", "faults", "of_reference"}
    assert json.loads(json.dumps(report)) == report


class Gifted:
    """An agent that places what it has been shown often enough as an expert does, and does nothing
    about the rest."""

    imitates, privileged, explores = True, False, False

    def __init__(self, envs: list[Env], needs: int) -> None:
        self.envs, self.needs = envs, needs
        self.shown: list[tuple[Tensor, Tensor]] = []

    def begin(self, worlds: int, task: Tensor | None = None) -> tuple[Tensor]:
        assert task is None
        return (torch.zeros(worlds),)

    def adapt(self, context: tuple[Tensor], episode: Any) -> tuple[Tensor]:
        self.shown.append((episode.obs, episode.valid))
        return (context[0] + episode.valid.shape[1] / len(context[0]) / VARIANTS,)

    def act(
        self, percept: Any, context: tuple[Tensor], noise: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        assert noise is None
        knows = (context[0] >= self.needs).repeat_interleave(VARIANTS) & (
            self.envs[-1].state.variant != 3
        )
        return ExpertAgent(self.envs[-1]).act(percept, ())[0] * knows[:, None], context


@pytest.fixture
def gifted(monkeypatch: pytest.MonkeyPatch) -> Gifted:
    """It stands in for the imitator and needs two demonstrations of each variant; whoever else is
    asked needs none."""
    envs: list[Env] = []

    def make_env_and_keep(*arguments: Any, **settings: Any) -> Env:
        envs.append(make_env(*arguments, **settings))
        return envs[-1]

    monkeypatch.setattr(module, "make_env", make_env_and_keep)
    agent = Gifted(envs, 2)
    monkeypatch.setattr(
        Run, "load_agent", lambda run: agent if run.name == "imitator" else Gifted(envs, 0)
    )
    return agent


def test_success_is_that_of_every_variant_after_so_many_demonstrations(
    gifted: Gifted, imitator: Run, guide: Run, demos: Demonstrations
) -> None:
    report = few_shot(
        brief(imitator, 75), demos, shots=(2, 1), reference=brief(guide, 75), threads=1
    )
    assert [(r["shots"], r["mean"]) for r in report["shots"]] == [(0, 0.0), (2, 0.75), (1, 0.0)]
    assert report["shots"][1]["ci95"] == [0.75, 0.75]
    assert report["reference"]["mean"] == 0.75
    assert [r["of_reference"] for r in report["shots"]] == pytest.approx([0.0, 1.0, 0.0])
    assert [valid.shape[1] for _, valid in gifted.shown] == [TASKS * VARIANTS * k for k in (2, 1)]
    for k, (obs, valid) in zip((2, 1), gifted.shown, strict=True):
        length = len(obs)
        assert torch.equal(
            obs.transpose(0, 1).reshape(TASKS, VARIANTS, k, length, -1),
            demos.obs[:, :, :k, :length],
        )
        assert torch.equal(
            valid.T.reshape(TASKS, VARIANTS, k, length), demos.valid[:, :, :k, :length]
        )
    assert [env.family.name for env in gifted.envs] == ["Placement", "PlacementShown"]
    for env in gifted.envs:
        assert [t.as_dict() for t in env.tasks] == [
            t.as_dict() for t in demos.tasks for _ in range(VARIANTS)
        ]


def test_a_measurement_is_a_function_of_weights_demonstrations_and_seed(
    monkeypatch: pytest.MonkeyPatch, imitator: Run, demos: Demonstrations
) -> None:
    lived, real = [], module.collect
    monkeypatch.setattr(
        module, "collect", lambda *x, **how: (lived.append(real(*x, **how)), lived[-1])[1]
    )
    for seed in (0, 0, 1):
        few_shot(brief(imitator, 10), demos, shots=(1,), seed=seed, threads=1)
    none, one, expert = (lived[i].episodes[0].obs for i in range(3))
    assert torch.equal(lived[3].episodes[0].obs, none)
    assert torch.equal(lived[4].episodes[0].obs, one)
    assert torch.equal(none[0], one[0])
    assert torch.equal(none[0], expert[0])
    assert not torch.equal(none[1:], one[1:])
    assert not torch.equal(lived[6].episodes[0].obs[0], none[0])


def refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(DemosError, match=message) as e:
        call()
    assert "\n" not in str(e.value)


def untrained(out: Path, agent: str, family: str) -> Run:
    run = start_run(
        TrainConfig(family=family, agent=agent), agents.get(agent).config(worlds=8), out
    )
    save_checkpoint(
        run.folder, run.learner().state(), {"iteration": 0, "steps": 0, "elapsed_s": 0.0}
    )
    return run


def test_an_agent_that_does_not_imitate_is_refused(tmp_path: Path, demos: Demonstrations) -> None:
    run = untrained(tmp_path / "x", "blind", "Placement")
    refused(
        lambda: few_shot(run, demos),
        "x does not imitate: its agent is 'blind'; train one as imitation",
    )


def test_demonstrations_of_another_family_are_refused(guide: Run, demos: Demonstrations) -> None:
    refused(
        lambda: few_shot(guide, demos),
        "demonstrations of Placement are no use to an agent of PlacementShown",
    )


@pytest.mark.parametrize("k", [-1, 0, 3])
def test_numbers_of_shots_that_cannot_be_are_refused(
    imitator: Run, demos: Demonstrations, k: int
) -> None:
    message = f"{k} shots were asked for; the dataset holds 1 to 2 of every variant"
    refused(lambda: few_shot(brief(imitator, 3), demos, shots=(1, k), threads=1), message)


@pytest.mark.parametrize("agent", ["blind", "rl2", "oracle"])
def test_any_agent_is_a_reference_or_is_told_in_one_line_that_it_cannot_be(
    tmp_path: Path, imitator: Run, demos: Demonstrations, agent: str
) -> None:
    shown = brief(untrained(tmp_path / "x", agent, "PlacementShown"), 3)
    try:
        found = few_shot(brief(imitator, 3), demos, shots=(), reference=shown, threads=1)[
            "reference"
        ]
    except MetarobotError as e:
        found = str(e)
    assert found == {"run": "x", "mean": 0.0, "ci95": [0.0, 0.0], "faults": 0} or (
        agent in found and "\n" not in found
    )


def test_resuming_from_a_checkpoint_gives_the_uninterrupted_bits(
    monkeypatch: pytest.MonkeyPatch, root: Path, imitator: Run, tmp_path: Path
) -> None:
    broken, real, calls = begun(tmp_path / "broken", root / "hidden"), training.save_checkpoint, []

    def die_after_two(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("power cut")
        real(*arguments)

    monkeypatch.setattr(training, "save_checkpoint", die_after_two)
    with pytest.raises(RuntimeError, match="power cut"):
        train(broken, show=False)
    monkeypatch.setattr(training, "save_checkpoint", real)
    runs = broken, imitator
    assert [json.loads((r.folder / "checkpoint.json").read_text())["iteration"] for r in runs] == [
        2,
        4,
    ]
    assert train(open_run(broken.folder), show=False)
    digests = [json.loads((r.folder / "checkpoint.json").read_text())["sha256"] for r in runs]
    assert digests[0] == digests[1]
    plain = [[{k: v for k, v in row.items() if "time/" not in k} for row in rows(r)] for r in runs]
    assert plain[0] == plain[1]
    assert plain[0][0].keys() == {"train/loss_before", "train/loss", "train/grad_norm"}


def rows(run: Run) -> list[dict[str, float]]:
    return read_metrics(run.folder / "metrics.jsonl")


def test_steps_are_those_of_demonstrations_really_shown(
    imitator: Run, demos: Demonstrations
) -> None:
    counted = [demos.trials(2, 1, [0, i]).steps() for i in range(4)]
    totals = [row["time/total_timesteps"] for row in rows(imitator)]
    assert totals == [sum(counted[: i + 1]) for i in range(4)]


def test_a_run_finds_its_demonstrations_again_from_elsewhere(
    monkeypatch: pytest.MonkeyPatch, root: Path, tmp_path: Path
) -> None:
    monkeypatch.chdir(root)
    run = begun(tmp_path / "x", "hidden", steps=1)
    monkeypatch.chdir(tmp_path)
    assert train(open_run(run.folder), show=False)


def test_cloning_behaviour_trains_and_gains_nothing_from_demonstrations(
    root: Path, tmp_path: Path, demos: Demonstrations
) -> None:
    run = trained(tmp_path / "x", root / "hidden", steps=1, inner_steps=0)
    (row,) = rows(run)
    assert row["train/loss"] == row["train/loss_before"]
    agent = run.load_agent()
    context = agent.begin(TASKS)
    shown = demos.rollout(range(TASKS), torch.zeros(TASKS, 1, dtype=torch.int64))
    assert torch.equal(agent.adapt(context, shown)[0], context[0])


SETTINGS = "--worlds 8 --rollouts 4 --width 8 --inner-steps 1 --threads 1"


def test_record_train_and_shots_from_end_to_end(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data, out, report = (tmp_path / n for n in ("data", "x", "report.json"))
    words = (
        f"record Placement --out {data} --tasks 2 --shots 2 --seed 3 --split test "
        "--jitter 0.01 --threads 1"
    )
    code, said, _ = run(capsys, *words.split())
    assert (code, said) == (0, f"wrote 16 demonstrations of 2 tasks to {data}\n")
    assert (read_demonstrations(data).split, read_demonstrations(data).shots) == ("test", 2)
    command = (
        f"train Placement --agent imitation --demos {data} --steps 1000 --out {out} {SETTINGS}"
    )
    assert run(capsys, *command.split())[0] == 0
    code, said, _ = run(
        capsys, *f"shots {out} --demos {data} --shots 2 --json {report} --threads 1".split()
    )
    assert code == 0
    for expected in (
        "Placement, 2 test tasks",
        "0 of each",
        "2 of each",
        "expert",
        "100.0 %",
        "by chance 25 %",
    ):
        assert expected in said
    assert [r["shots"] for r in json.loads(report.read_text())["shots"]] == [0, 2]


@pytest.mark.parametrize(
    "words", ["plot {run} --out {tmp}/a.png", "publish {run} --out {tmp}/a --summary a --command b"]
)
def test_what_tells_of_returns_does_not_stumble_over_a_run_without_any(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, imitator: Run, words: str
) -> None:
    code, _, err = run(
        capsys, *(w.format(run=imitator.folder, tmp=tmp_path) for w in words.split())
    )
    assert code == 0 or (code == 2 and err.startswith("error: "))


IMITATE = "train Placement --agent imitation --out {tmp}/a --steps 1 --threads 1"
BAD = {
    "no demonstrations": (
        IMITATE,
        "agent 'imitation' needs --demos, a dataset that metarobot record makes",
    ),
    "demonstrations for another agent": (
        "train Placement --agent maml --demos {hidden} --out {tmp}/a --steps 1",
        "agent 'maml' learns from its own trials; leave --demos out",
    ),
    "demonstrations nowhere": (
        f"{IMITATE} --demos {{tmp}}/no",
        "/no holds no Minari dataset: it has no folder",
    ),
    "rollouts that are no whole variants": (
        f"{IMITATE} --demos {{hidden}} --worlds 6 --rollouts 6",
        "rollouts = 6 is not a multiple of 4, the variants of Placement",
    ),
    "more rollouts than demonstrations": (
        f"{IMITATE} --demos {{hidden}} --worlds 8 --rollouts 8",
        "2 demonstrations to adapt to and 2 to match need 4 of every variant; there are 2",
    ),
    "demonstrations of another robot": (
        "train CheetahVel --agent imitation --demos {hidden} --out {tmp}/a --steps 1",
        "of CheetahVel",
    ),
    "demonstrations of another family": (f"{IMITATE} --demos {{shown}}", "PlacementShown"),
    "worlds that are no whole tasks": (
        f"{IMITATE} --demos {{hidden}} --worlds 6",
        "worlds = 6 is not a multiple of",
    ),
    "no width": (f"{IMITATE} --demos {{hidden}} --width 0", "width must be at least 1, not 0"),
    "no rollouts": (
        f"{IMITATE} --demos {{hidden}} --rollouts 0",
        "rollouts must be at least 1, not 0",
    ),
    "backward inner rates": (
        f"{IMITATE} --demos {{hidden}} --inner-lr -1",
        "inner_lr must be a finite number of at",
    ),
    "fewer inner steps than none": (
        f"{IMITATE} --demos {{hidden}} --inner-steps -1",
        "inner_steps must be at least",
    ),
    "a taken place": ("record Placement --out {hidden}", "is there already; choose another place"),
    "nobody to record": ("record CheetahVel --out {tmp}/a", "CheetahVel has no scripted expert"),
    "shots of no dataset": ("shots {run} --demos {tmp}", "holds no Minari dataset"),
    "shots of no run": ("shots {tmp}/no --demos {hidden}", "no run folder"),
    "too many shots": (
        "shots {run} --demos {hidden} --shots 3",
        "3 shots were asked for; the dataset holds 1 to 2",
    ),
    "shots of another family": ("shots {run} --demos {shown} --shots 1", "PlacementShown"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line_and_exit_code_two(
    case: str, capsys: pytest.CaptureFixture[str], root: Path, imitator: Run, tmp_path: Path
) -> None:
    argv, message = BAD[case]
    places = {
        "tmp": tmp_path,
        "run": imitator.folder,
        "hidden": root / "hidden",
        "shown": root / "shown",
    }
    code, _, err = run(capsys, *(w.format(**places) for w in argv.split()))
    assert code == 2
    assert message in err
    assert err.startswith("error: ")
    assert err.strip().count("\n") == 0
    assert not list(tmp_path.iterdir())


def test_physics_that_break_down_are_no_success_and_too_many_fail(
    imitator: Run, demos: Demonstrations, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate = Env._simulate
    monkeypatch.setattr(
        Env, "_simulate", lambda self, active: torch.ones_like(simulate(self, active))
    )
    with pytest.raises(EvaluationError, match=r"imitator: \d+ episodes faulted .* 100.0 %"):
        few_shot(brief(imitator, 3), demos, shots=(), threads=1)
