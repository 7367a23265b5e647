import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FALLING, TASKS, run, same
from torch import Tensor, nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from metarobot.agents.pearl import PEARL, PEARLConfig, TwinCritics, sample_squashed
from metarobot.env.base import Env
from metarobot.learning.agent_interface import Dimensions
from metarobot.learning.gaussian_posterior import PosteriorError
from metarobot.learning.trial_replay import Transitions
from metarobot.tasks.family import Family, families
from metarobot.training.checkpoints import save_checkpoint
from metarobot.training.collect import collect
from metarobot.training.run_folder import agent_dimensions, build_learner, open_run
from metarobot.types import Percept, Trials, join_episodes

SMALL = {
    "worlds": 2,
    "width": 16,
    "tasks": 4,
    "batch": 4,
    "context": 8,
    "gradient_steps": 3,
    "replay": 10_000,
}


def build(family: Family = FALLING, **settings: Any) -> PEARL:
    learner = build_learner("pearl", PEARLConfig(**SMALL | settings), family, 0)
    assert isinstance(learner, PEARL)
    return learner


def collect_trials(
    learner: PEARL, tasks: Any = TASKS, family: Family = FALLING, seed: int = 0, **settings: Any
) -> Trials:
    usual = {"episodes": learner.config.episodes, "seed": seed}
    return collect(learner.agent, Env(family, tasks, threads=1), tasks, **usual | settings)


def skilled(**settings: Any) -> PEARL:
    """A learner whose normalisers have data and whose weights are far from its initial ones."""
    learner = build(**settings)
    learner.update(collect_trials(learner), 0.0, 0)
    with torch.no_grad():
        for p in learner.agent.parameters():
            p += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return learner


def random_transitions(tasks: int, steps: int, seed: int = 0) -> Transitions:
    g = torch.Generator().manual_seed(seed)
    sizes = (17, 6, 0, 0, 17)
    return Transitions(
        *(torch.randn(*(tasks, steps, n) if n else (tasks, steps), generator=g) for n in sizes)
    )


def close(a: tuple[Tensor, ...], b: tuple[Tensor, ...], **tolerance: float) -> bool:
    return all(torch.allclose(x, y, **tolerance) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_the_posterior_is_the_normalised_product_of_prior_and_factors(steps: int) -> None:
    agent = skilled(latent=2).agent.double()
    transitions = Transitions(*(x.double() for x in random_transitions(1, steps)))
    factors, got = agent.factors(transitions), agent.infer(transitions)
    z = torch.linspace(-8, 8, 40_001, dtype=torch.float64)
    for dim in range(2):
        each = Normal(factors.mean[0, :, dim], factors.var[0, :, dim].sqrt()).log_prob(z[:, None])
        density = torch.softmax(Normal(0.0, 1.0).log_prob(z) + each.sum(1), 0)
        mean = (density * z).sum()
        var = (density * (z - mean).square()).sum()
        assert got.mean[0, dim].item() == pytest.approx(mean.item(), abs=1e-6)
        assert got.var[0, dim].item() == pytest.approx(var.item(), rel=1e-5)


def test_before_any_transition_the_posterior_is_the_prior() -> None:
    agent = build().agent
    mean, var = agent.posterior(agent.begin(3))
    assert torch.equal(mean, torch.zeros(3, 5))
    assert torch.equal(var, torch.ones(3, 5))


def test_the_order_of_transitions_and_of_episodes_does_not_matter() -> None:
    learner = skilled()
    agent, (first, second, _) = learner.agent, collect_trials(learner).episodes
    start = agent.begin(2)
    there = agent.adapt(agent.adapt(start, first), second)
    back = agent.adapt(agent.adapt(start, second), first)
    assert close(there, back, rtol=1e-5, atol=1e-5)
    assert not close(agent.adapt(start, first), there, rtol=1e-2)
    transitions, order = (
        random_transitions(2, 50),
        torch.randperm(50, generator=torch.Generator().manual_seed(0)),
    )
    shuffled = Transitions(*(x[:, order] for x in transitions))
    assert close(agent.infer(transitions), agent.infer(shuffled), rtol=1e-5, atol=1e-6)


def test_adapting_by_episodes_equals_inferring_from_all_transitions_at_once() -> None:
    learner = skilled()
    agent, trials = learner.agent, collect_trials(learner)
    context = agent.begin(2)
    for episode in trials.episodes:
        context = agent.adapt(context, episode)
    seq = join_episodes(trials.episodes)
    parts = (seq.percept.obs, seq.action, seq.reward, seq.terminated.float(), seq.next_obs)
    for world in (0, 1):
        transitions = Transitions(*(x[:, world][seq.valid[:, world]][None] for x in parts))
        want = tuple(x[world : world + 1] for x in agent.posterior(context))
        assert close(agent.infer(transitions), want, rtol=1e-4, atol=1e-5)


def test_what_stands_in_the_padding_changes_nothing() -> None:
    learner = skilled()
    episode = next(e for e in collect_trials(learner).episodes if not e.valid.all())
    agent, start = learner.agent, learner.agent.begin(2)
    clean = agent.adapt(start, episode)
    for value in (7.0, float("nan")):
        names = ("obs", "action", "reward")
        hidden = {k: _outside(getattr(episode, k), episode.valid, value) for k in names}
        assert same(
            dict(enumerate(agent.adapt(start, replace(episode, **hidden)))), dict(enumerate(clean))
        )


def _outside(x: Tensor, valid: Tensor, value: float) -> Tensor:
    return torch.where(valid if x.dim() == 2 else valid[..., None], x, value)


def test_adapting_is_pure_and_an_episode_narrows_the_posterior() -> None:
    learner = skilled()
    agent, episode = learner.agent, collect_trials(learner).episodes[0]
    start = agent.begin(2)
    before = tuple(x.clone() for x in start)
    after = agent.adapt(start, episode)
    assert all(torch.equal(a, b) for a, b in zip(start, before, strict=True))
    assert (agent.posterior(after).var < agent.posterior(start).var).all()


def percept(done: float = 0.0, first: float = 0.0) -> Percept:
    obs = torch.randn(2, 17, generator=torch.Generator().manual_seed(3))
    one = torch.ones(2)
    return Percept(obs, torch.zeros(2, 6), one, done * one, first * one)


def test_z_is_sampled_at_an_episodes_first_step_and_kept() -> None:
    learner = skilled()
    agent, noise = learner.agent, torch.randn(2, 11, generator=torch.Generator().manual_seed(0))
    context = agent.adapt(agent.begin(2), collect_trials(learner).episodes[0])
    mean, var = agent.posterior(context)
    for start in (percept(first=1.0), percept(done=1.0)):
        assert torch.equal(agent.act(start, context)[1][2], mean)
        assert torch.equal(agent.act(start, context, noise)[1][2], mean + var.sqrt() * noise[:, 6:])
    _, kept = agent.act(percept(first=1.0), context, noise)
    for other in (None, -noise):
        assert torch.equal(agent.act(percept(), kept, other)[1][2], kept[2])
    assert all(torch.equal(a, b) for a, b in zip(kept[:2], context[:2], strict=True))


def test_actions_depend_on_z_and_stay_within_their_bounds() -> None:
    shapes = Dimensions(
        obs=17, act=6, task=1, episodes=3, horizon=12, low=(-4.0,) * 6, high=(2.0,) * 6
    )
    agent = PEARL(PEARLConfig(**SMALL), shapes).agent
    nn.init.constant_(agent.actor[-1].bias, 0.3)
    zeros = torch.zeros(2, 5)
    with torch.no_grad():
        agent.actor[0].weight[:, 17:] += 1.0
        action, _ = agent.act(percept(), (zeros, zeros + 1, zeros))
        other, _ = agent.act(percept(), (zeros, zeros + 1, zeros + 2))
        wild, _ = agent.act(percept(), (zeros, zeros + 1, zeros), torch.full((2, 11), 50.0))
    assert not torch.allclose(action, other)
    assert torch.allclose(wild, torch.tensor(2.0))
    assert torch.allclose(agent.normalised_action(action), torch.tanh(torch.tensor(0.3)), atol=0.1)
    assert torch.equal(
        agent.normalised_action(torch.tensor([-4.0, -1.0, 2.0]).repeat(2)),
        torch.tensor([-1.0, 0.0, 1.0]).repeat(2),
    )


def test_dimensions_hold_a_familys_bounds_and_horizon() -> None:
    shapes = agent_dimensions(families.get("QuadrupedFlat"), 2)
    assert shapes.horizon == 200
    assert shapes.low == (-4.0,) * 12
    assert shapes.high == (4.0,) * 12


def test_exploring_samples_noise_for_z_too() -> None:
    learner = skilled()
    quiet, noisy = (collect_trials(learner, explore=x, seed=4) for x in (False, True))
    assert torch.equal(quiet.episodes[0].obs[0], noisy.episodes[0].obs[0])
    noise = torch.randn(12, 2, 11, generator=torch.Generator().manual_seed(4))
    agent, first = learner.agent, noisy.episodes[0]
    zeros = torch.zeros(2)
    context = Percept(first.obs[0], torch.zeros(2, 6), zeros, zeros, zeros + 1)
    assert torch.equal(first.action[0], agent.act(context, agent.begin(2), noise[0])[0])


@pytest.mark.parametrize("log_std", [-3.0, 0.0, 1.0])
def test_the_log_density_of_a_squashed_action_is_torchs(log_std: float) -> None:
    g = torch.Generator().manual_seed(0)
    mean, noise = (torch.randn(50, 3, generator=g, dtype=torch.float64) for _ in range(2))
    std = torch.full_like(mean, log_std)
    action, density = sample_squashed(mean, std, noise)
    u = mean + std.exp() * noise
    truth = TransformedDistribution(Normal(mean, std.exp()), [TanhTransform(cache_size=1)])
    assert torch.equal(action, torch.tanh(u))
    # far out the inverse of tanh loses digits
    inside = action.abs().amax(-1) < 0.999
    assert inside.sum() > 10
    assert torch.allclose(density[inside], truth.log_prob(action).sum(-1)[inside], atol=1e-8)
    exact = Normal(mean, std.exp()).log_prob(u) - TanhTransform().log_abs_det_jacobian(u, action)
    assert torch.allclose(density, exact.sum(-1), atol=1e-8)


def test_twin_critics_equal_two_perceptrons() -> None:
    torch.manual_seed(0)
    twins = TwinCritics(9, 8)
    x = torch.randn(20, 9)
    for i, value in enumerate(twins(x)):
        h = x
        for k, (w, b) in enumerate(zip(twins.weights, twins.biases, strict=True)):
            h = (torch.relu(h) if k else h) @ w[i] + b[i]
        assert torch.allclose(value, h[:, 0], atol=1e-6)
    assert not torch.allclose(twins(x)[0], twins(x)[1])


def test_the_actors_loss_reaches_no_critic() -> None:
    torch.manual_seed(0)
    twins, x = TwinCritics(9, 8), torch.randn(20, 9, requires_grad=True)
    learning, given = twins(x), twins(x, train_weights=False)
    assert torch.equal(learning, given)
    slopes = torch.autograd.grad(given.sum(), [x, *twins.parameters()], allow_unused=True)
    assert slopes[0].abs().sum() > 0
    assert all(s is None for s in slopes[1:])
    assert all(
        s.abs().sum() > 0 for s in torch.autograd.grad(learning.sum(), [x, *twins.parameters()])
    )


def test_target_critics_follow_by_tau() -> None:
    learner = build(tau=0.25, gradient_steps=1)
    old = [p.detach().clone() for p in learner.targets.parameters()]
    learner.update(collect_trials(learner), 0.0, 0)
    for before, target, critic in zip(
        old, learner.targets.parameters(), learner.critics.parameters(), strict=True
    ):
        assert torch.allclose(target, 0.75 * before + 0.25 * critic, atol=1e-7)
        assert not torch.equal(target, before)
        assert not target.requires_grad


def test_several_threads_learn_the_same_reproducibly() -> None:
    learners = [build(gradient_steps=1) for _ in range(3)]
    trials = collect_trials(learners[0])
    for learner, threads in zip(learners, (1, 2, 2), strict=True):
        torch.set_num_threads(threads)
        learner.update(trials, 0.0, 0)
    torch.set_num_threads(1)
    assert same(learners[1].state(), learners[2].state())
    for p, q in zip(learners[0]._parameters, learners[1]._parameters, strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-6)
    assert all(p.grad.abs().sum() > 0 for p in learners[0]._parameters)


def test_the_belief_loss_does_not_train_the_encoder() -> None:
    learner = skilled()
    batch = learner._sample_batch(torch.Generator().manual_seed(0))
    names, weights = zip(*learner.agent.named_parameters(), strict=True)
    found = []
    for shift in (0.0, 3.0):
        loss, _ = learner._loss(batch._replace(task=batch.task + shift))
        found.append(dict(zip(names, torch.autograd.grad(loss, weights), strict=True)))
    changed = {k for k in found[0] if not torch.equal(found[0][k], found[1][k])}
    assert changed == {k for k in found[0] if k.startswith("head.")}


def test_a_restored_learner_goes_on_bit_for_bit_replay_and_all() -> None:
    whole, broken = build(), build()
    for i in range(2):
        whole.update(collect_trials(whole, seed=i), 0.1 * i, i)
    broken.load(whole.state())
    for i in (2, 3):
        for learner in (whole, broken):
            learner.update(collect_trials(learner, seed=i), 0.1 * i, i)
    assert same(whole.state(), broken.state())
    assert len(whole.replay) == 8
    assert len(whole.state()["replay.data"]) == 8


def test_an_update_is_a_function_of_state_trials_and_seed() -> None:
    states = []
    for seed, noise in ((5, 0), (5, 1), (6, 0)):
        torch.manual_seed(noise)
        learner = build()
        learner.update(collect_trials(learner), 0.0, seed)
        states.append(learner.state())
    assert same(*states[:2])
    assert not same(states[0], states[2])


def test_at_test_time_there_is_nothing_but_the_test_tasks_own_episodes() -> None:
    learner, fresh = skilled(), build()
    fresh.agent.load_state_dict(learner.agent.state_dict())
    for i in range(3):
        learner.replay.add(collect_trials(learner, seed=50 + i))
    space = FALLING.space
    a, b = (space.task(direction=d) for d in (1.0, -1.0))
    transitions = [
        collect_trials(x, tasks, seed=9)
        for x, tasks in ((learner, [a, b]), (fresh, [a, b]), (learner, [a, a]))
    ]
    for other in transitions[1:]:
        for one, two in zip(transitions[0].episodes, other.episodes, strict=True):
            time = min(len(one.obs), len(two.obs))
            assert torch.equal(one.valid[:time, 0], two.valid[:time, 0])
            assert torch.equal(one.action[:time, 0], two.action[:time, 0])
    assert not torch.equal(
        transitions[0].episodes[2].reward[:3, 1], transitions[2].episodes[2].reward[:3, 1]
    )


def changed(trials: Trials, **values: Any) -> Trials:
    return replace(
        trials,
        episodes=tuple(replace(e, **{k: f(e) for k, f in values.items()}) for e in trials.episodes),
    )


def test_a_task_with_too_few_transitions_is_named() -> None:
    learner = build()
    trials = changed(collect_trials(learner), valid=lambda e: e.valid & (torch.arange(2) == 0))
    with pytest.raises(
        PosteriorError,
        match=r"task 1 of 2 has 0 transitions to infer it from, fewer than least = 4",
    ):
        learner.update(trials, 0.0, 0)
    assert len(learner.replay) == 0


def test_identical_contexts_are_named() -> None:
    learner = build()
    alike = {
        k: lambda e, k=k: getattr(e, k)[:, :1].expand_as(getattr(e, k))
        for k in ("obs", "action", "reward")
    }
    trials = changed(collect_trials(learner), **alike, valid=lambda e: torch.ones_like(e.valid))
    with pytest.raises(PosteriorError, match="contexts of all 2 tasks are identical"):
        learner.update(trials, 0.0, 0)


def test_a_collapsed_posterior_is_named() -> None:
    learner = build()
    nn.init.zeros_(learner.agent.encoder[-1].weight)
    with pytest.raises(PosteriorError, match="collapsed"):
        learner._checked_posterior_std(collect_trials(learner))


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_named(broken: float) -> None:
    learner = build()
    trials = changed(collect_trials(learner), reward=lambda e: e.reward + broken)
    with pytest.raises(PosteriorError, match="not finite"):
        learner.update(trials, 0.0, 0)


def test_training_that_breaks_down_leaves_the_last_checkpoint(tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    argv = [
        "train",
        "CheetahDir100",
        "--agent",
        "pearl",
        "--threads",
        "1",
        "--save-every",
        "1",
        "--out",
        str(out),
    ]
    argv += [
        "--worlds",
        "2",
        "--width",
        "8",
        "--gradient-steps",
        "2",
        "--tasks",
        "2",
        "--batch",
        "4",
    ]
    assert run(capsys, *argv, "--steps", "600")[0] == 0
    before = json.loads((out / "checkpoint.json").read_text())
    tensors, counters = open_run(out).checkpoint()
    save_checkpoint(out, tensors | {"temperature.log": torch.tensor(float("nan"))}, counters)
    code, _, errors = run(capsys, *argv, "--steps", "1200", "--resume")
    assert code == 2
    assert "is nan in" in errors
    assert "training diverged" in errors
    after = json.loads((out / "checkpoint.json").read_text())
    assert after["iteration"] == before["iteration"] == 1
    assert (out / after["weights"]).exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("--replay", "1000000000000"), "a replay of 1,000,000,000,000 transitions needs"),
        (
            ("--replay", "100"),
            "does not hold the 20 trials of an iteration, 3 x 100 transitions each",
        ),
        (("--episodes", "1"), "episodes must be at least 2"),
        (("--context", "3"), "context must be at least 4"),
        (("--gamma", "nan"), "gamma must be a finite number"),
        (("--latent", "0"), "latent must be at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_training(
    tmp_path: Path, capsys, settings, message
) -> None:
    out = tmp_path / "run"
    argv = ("train", "CheetahDir100", "--agent", "pearl", "--threads", "1", "--out", str(out))
    code, _, errors = run(capsys, *argv, *settings)
    assert code == 2
    assert message in errors
    assert len(errors.strip().splitlines()) == 1
    assert not out.exists()
