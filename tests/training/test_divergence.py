"""A training stops at its first number that is not finite, names it, and keeps what was sound."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import STEADY, example_trials, run, tiny_run
from torch import Tensor

from metarobot.env.base import Env
from metarobot.errors import MetarobotError
from metarobot.learning.agent_interface import Learner, TrainingStep, agents
from metarobot.learning.finite_check import (
    MOST_SKIPPED_STEPS,
    DivergedError,
    FiniteCheck,
    charge_faults,
    finite_state,
    first_non_finite,
    learner_tensors,
    mean_sound_returns,
    valid_trials,
)
from metarobot.tasks.family import Family
from metarobot.training.config import TrainConfig
from metarobot.training.metrics_log import read_metrics
from metarobot.training.run_folder import build_learner, open_run
from metarobot.training.train import (
    _build_iteration,
    _build_worlds,
    open_training,
    rollout_metrics,
)
from metarobot.types import Trials

FAMILY = STEADY.replace(horizon=12)
SMALL = {
    "worlds": 4,
    "rollouts": 2,
    "episodes": 2,
    "minibatches": 2,
    "epochs": 2,
    "width": 8,
    "bank": 4,
    "window": 4,
    "lessons": 2,
    "lesson_tasks": 4,
    "gradient_steps": 2,
    "tasks": 2,
    "batch": 8,
    "replay": 10_000,
    "least": 2,
    "context": 8,
    "updates": 1,
    "start": 4,
    "transitions": 4,
    "posteriors": 2,
}
each_agent = pytest.mark.parametrize("name", agents.names())


def small_training(
    name: str, family: Family = FAMILY, **settings: Any
) -> tuple[Learner, TrainingStep]:
    """An untrained learner, and what trains it for one iteration."""
    kind = agents.get(name)
    known = kind.config.__dataclass_fields__
    values = {**SMALL, **settings}
    agent_config = kind.config(**{key: value for key, value in values.items() if key in known})
    config = TrainConfig(family=family.name, agent=name, threads=1, sim="cpu")
    if kind.imitates:
        # It learns from demonstrations: here those of another agent, which acts at random.
        learner = build_learner(name, agent_config, family, 0)
        trials = example_trials()
        agent_config = replace(agent_config, worlds=6, rollouts=3)
        learner = build_learner(name, agent_config, family, 0)
        return learner, lambda i, progress, seed: (1, learner.update(trials, progress, seed))
    worlds = _build_worlds(family, config, agent_config)
    learner = build_learner(name, agent_config, family, 0, None if worlds is None else worlds.env)
    return learner, _build_iteration(learner, family, config, agent_config, worlds)


def is_finite(learner: Learner) -> bool:
    return first_non_finite(learner_tensors(learner)) is None


@each_agent
def test_whatever_a_checkpoint_holds_is_checked_after_each_iteration(name: str) -> None:
    learner, iterate = small_training(name)
    FiniteCheck(learner).run(iterate, 0, 0.0, 0)  # optimisers have moments only then
    state = {key: value.clone() for key, value in finite_state(learner).items()}
    floats = [
        key
        for key, value in state.items()
        if value.is_floating_point() and value.numel() and not key.startswith("replay.")
    ]
    assert floats
    tried = 0
    for i, key in enumerate(floats):
        broken = state[key].clone()
        broken.view(-1)[-1] = (math.nan, math.inf, -math.inf)[i % 3]
        learner.load({**state, key: broken})
        if bool(learner.state()[key].isfinite().all()):
            continue  # one tensor under several names, of which another was loaded after it
        found = first_non_finite(learner_tensors(learner))
        assert found is not None, key
        assert "in 1 of" in found
        tried += 1
        with pytest.raises(DivergedError):
            finite_state(learner)
    assert tried > len(floats) / 2
    learner.load(state)
    assert is_finite(learner)


@each_agent
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_weights_stop_training_within_the_iteration(name: str, value: float) -> None:
    learner, iterate = small_training(name)
    check = FiniteCheck(learner)
    weights = [p for p in learner.agent.parameters() if p.requires_grad]
    with torch.no_grad():
        weights[-1].view(-1)[0] = value
    with pytest.raises(DivergedError, match=r"^iteration 1: .* (nan|inf)") as e:
        check.run(iterate, 0, 0.0, 0)
    assert "\n" not in str(e.value)
    assert "--lr" in str(e.value)


@each_agent
def test_a_huge_learning_rate_stops_training_before_anything_broken_is_kept(name: str) -> None:
    rates: dict[str, Any] = {"lr": 1e15, "inner_lr": 100.0, "kl": 1e15}
    learner, iterate = small_training(name, **rates)
    check = FiniteCheck(learner)
    try:
        for i in range(2):
            _, metrics = check.run(iterate, i, 0.0, i)
            # learners that skip the step say so, and keep their weights
            assert is_finite(learner)
            for key, metric in metrics.items():
                assert math.isfinite(metric) or key.startswith("train/")
    except DivergedError:
        pass
    except MetarobotError:
        # it collapsed, which is an error of its own
        assert is_finite(learner)


@pytest.mark.parametrize("name", ["ppo", "rl2", "varibad", "sb3:ppo"])
def test_a_diverging_learner_stops_in_its_first_or_second_iteration(name: str) -> None:
    learner, iterate = small_training(name, lr=1e38, grad_norm=1e38)
    check = FiniteCheck(learner)

    def train() -> None:
        for i in range(2):
            check.run(iterate, i, 0.0, i)

    with pytest.raises(DivergedError, match=r"^iteration [12]: .*diverged"):
        train()


@pytest.mark.parametrize("name", [n for n in agents.names() if not agents.get(n).imitates])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_rewards_stop_training_before_anything_is_learned(name: str, value: float) -> None:
    def reward(before: Any, after: Any, dt: float) -> dict[str, Tensor]:
        terms = FAMILY.reward(before, after, dt)
        first = next(iter(terms))
        return {**terms, first: torch.full_like(terms[first], value)}

    learner, iterate = small_training(name, FAMILY.replace(reward=reward))
    with pytest.raises(DivergedError, match=r"^iteration 1: reward.* (nan|inf)"):
        FiniteCheck(learner).run(iterate, 0, 0.0, 0)
    assert is_finite(learner)


@pytest.mark.parametrize("name", ["rl2", "maml", "pearl", "sb3:ppo", "sb3:sac"])
def test_physics_that_always_breaks_down_stop_training(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, iterate = small_training(name)
    monkeypatch.setattr(
        Env, "_simulate", lambda self, active: torch.ones(self.worlds, dtype=torch.bool)
    )
    with pytest.raises(DivergedError, match="the physics broke down in all"):
        FiniteCheck(learner).run(iterate, 0, 0.0, 0)


@pytest.mark.parametrize("name", ["rl2", "maml", "sb3:ppo"])
def test_some_broken_physics_are_counted_and_do_not_raise_the_returns(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The family's rewards are made negative, so that an early end would be the best outcome."""

    def reward(before: Any, after: Any, dt: float) -> dict[str, Tensor]:
        terms = FAMILY.reward(before, after, dt)
        return {key: torch.full_like(value, -1.0) for key, value in terms.items()}

    family = FAMILY.replace(reward=reward, weights=dict.fromkeys(FAMILY.weights, 1.0))
    learner, iterate = small_training(name, family)
    simulate = Env._simulate

    def sometimes(self: Env, active: Tensor | None) -> Tensor:
        faulted = simulate(self, active)
        faulted[0] |= bool(self.elapsed[0] == 3)
        return faulted

    _, metrics = FiniteCheck(learner).run(iterate, 0, 0.0, 0)
    monkeypatch.setattr(Env, "_simulate", sometimes)
    _, with_faults = FiniteCheck(learner).run(iterate, 0, 0.0, 0)
    assert metrics["sim/faults"] == 0
    assert with_faults["sim/faults"] >= 2
    assert with_faults["rollout/ep_rew_mean"] == pytest.approx(metrics["rollout/ep_rew_mean"])


def with_fault(trials: Trials, world: int = 0) -> Trials:
    """The trials, with a fault in the last step of the first episode of one world."""
    first, *others = trials.episodes
    faulted = first.faulted.clone()
    faulted[world] = True
    return replace(trials, episodes=(replace(first, faulted=faulted), *others))


def test_a_faulted_episode_has_the_worst_return_and_no_return_is_raised() -> None:
    trials = example_trials()
    assert charge_faults(with_fault(trials)) is not trials
    assert valid_trials(trials) is trials
    before = trials.returns()
    for world in range(before.shape[1]):
        charged = valid_trials(with_fault(trials, world)).returns()
        others = before.clone()
        others[0, world] = math.inf
        expected = before.clone()
        expected[0, world] = torch.minimum(before[0, world], others.min())
        torch.testing.assert_close(charged, expected)

        mean = mean_sound_returns(with_fault(trials, world))
        rows = [w for w in range(before.shape[1]) if w != world]
        torch.testing.assert_close(mean[0], before[0, rows].mean())
        assert rollout_metrics(with_fault(trials, world))["sim/faults"] == 1
    assert torch.equal(mean_sound_returns(trials), before.mean(1))


def test_learners_may_skip_some_steps_but_not_for_ever() -> None:
    learner, _ = small_training("maml")
    check = FiniteCheck(learner)
    skipped = {"train/grad_norm": math.nan, "train/loss": math.inf, "meta/post_adapt_return": 1.0}

    def iterate(metrics: dict[str, float]) -> TrainingStep:
        return lambda i, progress, seed: (1, metrics)

    for _ in range(3):
        for i in range(MOST_SKIPPED_STEPS):
            check.run(iterate(skipped), i, 0.0, 0)
        check.run(iterate({"train/grad_norm": 1.0}), 0, 0.0, 0)
    for i in range(MOST_SKIPPED_STEPS):
        check.run(iterate(skipped), i, 0.0, 0)
    with pytest.raises(DivergedError, match="train/grad_norm is nan"):
        check.run(iterate(skipped), 10, 0.0, 0)
    # a loss alone is no skipped step, and neither is a return
    for broken in ({"train/loss": math.nan}, {**skipped, "meta/post_adapt_return": math.nan}):
        with pytest.raises(DivergedError, match="is nan"):
            FiniteCheck(learner).run(iterate(broken), 0, 0.0, 0)


def test_other_errors_of_an_iteration_are_left_alone() -> None:
    learner, _ = small_training("maml")

    def iterate(i: int, progress: float, seed: int) -> tuple[int, dict[str, float]]:
        raise ValueError("something else")

    with pytest.raises(ValueError, match="something else"):
        FiniteCheck(learner).run(iterate, 0, 0.0, 0)


def plant(after: int) -> Callable[[Any], None]:
    """Make a training's weights NaN at the start of an iteration."""

    def change(training: Any) -> None:
        iterate = training.iterate

        def planted(i: int, progress: float, seed: int) -> tuple[int, dict[str, float]]:
            if i == after:
                with torch.no_grad():
                    training.learner.agent.log_std.fill_(math.nan)
            result: tuple[int, dict[str, float]] = iterate(i, progress, seed)
            return result

        training.iterate = planted

    return change


def test_the_last_checkpoint_is_kept_and_the_log_says_why_it_ends(tmp_path: Path) -> None:
    # one iteration is 800 steps
    out = tmp_path / "run"
    done = tiny_run(out, steps=1600)
    sound = (out / "checkpoint.json").read_bytes()
    config = json.loads((out / "config.json").read_text())
    training = open_training(done)
    training.run = replace(done, train_config=replace(done.train_config, steps=8000))
    plant(3)(training)
    object.__setattr__(training.run.train_config, "save_every", 100)
    with pytest.raises(DivergedError, match=r"^iteration 4: .*checkpoints from before it are kept"):
        training.train(show=False)

    assert json.loads((out / "config.json").read_text()) == config
    assert (out / "checkpoint.json").read_bytes() == sound
    assert open_run(out).load_agent() is not None
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["error"].startswith("iteration 4: ")
    assert [row["time/iterations"] for row in read_metrics(out / "metrics.jsonl")] == [1, 2, 3]


def test_what_is_not_finite_is_not_saved_either(tmp_path: Path) -> None:
    """Even if it becomes so between the iteration and the checkpoint."""
    out = tmp_path / "run"
    done = tiny_run(out, steps=800)
    training = open_training(done)
    training.run = replace(done, train_config=replace(done.train_config, steps=1600))

    def tick(metrics: dict[str, float]) -> None:
        with torch.no_grad():
            training.learner.agent.log_std.fill_(math.inf)

    sound = (out / "checkpoint.json").read_bytes()
    with pytest.raises(DivergedError, match="log_std is inf in 6 of 6 places"):
        training.train(show=False, tick=tick)
    assert (out / "checkpoint.json").read_bytes() == sound


def test_on_the_command_line_it_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--agent ppo --steps 1e5 --worlds 4 --minibatches 2 --epochs 2 --width 8 --threads 1"
    diverging = ["--lr", "1e15", "--grad-norm", "1e15"]
    out = str(tmp_path / "run")
    code, _, err = run(capsys, "train", "CheetahDir100", "--out", out, *words.split(), *diverging)
    assert code == 2
    error = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert "iteration" in error[0]
    assert "lower learning rate" in error[0]
    assert "Traceback" not in err
