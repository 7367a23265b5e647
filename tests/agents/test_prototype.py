from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run, tiny_run
from torch import Tensor

from metarobot.agents.ppo import PPO, PPOConfig
from metarobot.agents.prototype import CollapseError, Prototype, PrototypeConfig
from metarobot.config_bounds import check_bounds
from metarobot.env.base import Env
from metarobot.errors import MetarobotError
from metarobot.learning.agent_interface import Context, Dimensions
from metarobot.learning.metric_losses import LOSSES, novelty_threshold
from metarobot.tasks.family import families
from metarobot.training.collect import collect
from metarobot.training.train import train
from metarobot.types import Percept, Rollout, Trials

FAMILY = families.get("CheetahVel").replace(
    horizon=12, terminate=lambda state: state.qvel[:, 0].abs() > 0.8
)
TASKS = FAMILY.space.sample("train", 6, 0)
SHAPES = Dimensions(obs=17, act=6, task=1, episodes=2)
SMALL: dict[str, Any] = {
    "worlds": 6,
    "minibatches": 2,
    "epochs": 2,
    "width": 16,
    "lessons": 4,
    "window": 5,
}


def build(seed: int = 0, **settings: Any) -> Prototype:
    torch.manual_seed(seed)
    return Prototype(PrototypeConfig(**SMALL | {"bank": 18} | settings), SHAPES)


def collect_trials(
    learner: Prototype, seed: int = 0, explore: bool = True, tasks: Any = TASKS, **settings: Any
) -> Trials:
    env = Env(FAMILY, tasks, threads=1)
    return collect(learner.agent, env, tasks, episodes=2, seed=seed, explore=explore, **settings)


@pytest.fixture(scope="module")
def skilled() -> Prototype:
    """A learner whose normalisers have seen data and whose actions depend on the embedding."""
    torch.set_num_threads(1)
    learner = build()
    learner.update(collect_trials(learner), 0.0, 0)
    with torch.no_grad():
        for p in learner.agent.parameters():
            p += 0.2 * torch.randn_like(p)
    learner.agent.refresh()
    return learner


def changed(trials: Trials, **values: Callable[[Tensor], Tensor]) -> Trials:
    """Trials with some tensors of every episode replaced."""
    return replace(
        trials,
        episodes=tuple(
            replace(e, **{k: f(getattr(e, k)) for k, f in values.items()}) for e in trials.episodes
        ),
    )


def cut(e: Rollout, steps: int) -> Rollout:
    """An episode with only its first steps valid."""
    valid = e.valid & (torch.arange(len(e.valid)) < steps)[:, None]
    return replace(e, valid=valid, terminated=e.terminated & valid, truncated=e.truncated & valid)


def test_acting_step_by_step_and_adapting_equals_the_pass_over_whole_trials(
    skilled: Prototype,
) -> None:
    agent, contexts = skilled.agent, []

    def watched(context: Context) -> Context:
        contexts.append(context)
        return context

    trials = collect_trials(skilled, seed=3, explore=False, between=watched)
    assert not all(e.valid.all() for e in trials.episodes)
    for e, with_embedding in zip(
        trials.episodes, skilled._with_policy_obs(trials).episodes, strict=True
    ):
        with torch.no_grad():
            mean = agent.policy.actor(agent.policy.features(with_embedding.obs, None))
        assert e.action[e.valid].abs().mean() > 0.05
        assert torch.allclose(mean[e.valid], e.action[e.valid], atol=1e-4)
    first = trials.episodes[0]
    ((_, evidence, z),) = contexts
    with torch.no_grad():
        sums = agent.cumulative_evidence(agent.encoder.begin(6), first)[-1]
    assert torch.allclose(evidence, sums, rtol=1e-4, atol=1e-4)
    assert torch.allclose(z, agent.embed(first), atol=1e-4)


def test_the_learner_shows_the_policy_what_it_acted_on_and_the_critic_the_task(
    skilled: Prototype,
) -> None:
    trials = collect_trials(skilled, seed=3)
    first, second = skilled._with_policy_obs(trials).episodes
    nothing = skilled.agent.encoder.begin(6)
    known = first.obs[..., -1]
    assert torch.equal(first.obs[..., :17], trials.episodes[0].obs)
    assert torch.equal(first.obs[0, :, 17:-1], skilled.agent.encoder(nothing))
    assert not known[0].any()
    assert bool((known[1:].diff(dim=0) >= 0).all())
    assert bool((second.obs[0, :, -1] >= known[-1]).all())
    assert torch.equal(first.final_obs[:, 17:], second.obs[0, :, 17:])
    assert torch.equal(first.critic_obs, trials.task.expand_as(first.critic_obs))


def test_embeddings_do_not_mind_the_order_of_transitions(skilled: Prototype) -> None:
    x = torch.randn(9, 3, 41, generator=torch.Generator().manual_seed(0))
    encoder = skilled.agent.encoder
    with torch.no_grad():
        z, shuffled = (encoder(encoder.evidence(part).sum(0)) for part in (x, x[torch.randperm(9)]))
        other = encoder(encoder.evidence(x + 0.5).sum(0))
    assert torch.allclose(z, shuffled, atol=1e-5)
    assert not torch.allclose(z, other, atol=1e-2)


def test_context_comes_from_nothing_but_the_tasks_own_episodes(skilled: Prototype) -> None:
    """The same task, the same start: other tasks beside it, and other prototypes, change not one
    action."""
    other = build()
    other.load(skilled.state())
    with torch.no_grad():
        other.agent.bank.windows += 1.0
        other.agent.bank.prototype += 1.0
    other.agent.bank.threshold.zero_()
    alone = collect_trials(skilled, seed=3)
    company = collect_trials(other, seed=3, tasks=[TASKS[0], *(TASKS[i] for i in (3, 5, 1, 2, 4))])
    for a, b in zip(alone.episodes, company.episodes, strict=True):
        steps = min(len(a.valid), len(b.valid))
        assert torch.allclose(a.action[:steps, 0], b.action[:steps, 0], atol=1e-6)
    moved = collect_trials(other, seed=3, tasks=[TASKS[3], *TASKS[1:]]).episodes[1]
    steps = min(len(moved.valid), len(alone.episodes[1].valid))
    assert not torch.allclose(
        moved.action[:steps, 0], alone.episodes[1].action[:steps, 0], atol=1e-3
    )


def test_the_context_of_another_task_changes_embedding_and_behaviour(skilled: Prototype) -> None:
    agent, first = skilled.agent, collect_trials(skilled, seed=3).episodes[0]
    kept = []
    for flip in (False, True):
        context: list[Context] = []

        def tamper(c: Context, flip: bool = flip, seen: list[Context] = context) -> Context:
            seen.append(tuple(x.flip(0) for x in c) if flip else c)
            return seen[-1]

        second = collect_trials(skilled, seed=3, between=tamper).episodes[1]
        kept.append((context[0][2], second.action[0]))
    (z, action), (wrong_z, wrong_action) = kept
    assert torch.equal(wrong_z, z.flip(0))
    assert (wrong_action - action).abs().amax(1).min() > 1e-3
    zeros = torch.zeros(6)
    fresh, _ = agent.act(
        Percept(first.obs[0], first.action[0], zeros, zeros, zeros + 1), agent.begin(6)
    )
    assert (fresh - action).abs().max() > 1e-3


def test_the_last_transition_of_an_episode_waits_for_adapt(skilled: Prototype) -> None:
    """The observation after an episode's end is of the next one: nothing may be read from that
    pair."""
    agent = skilled.agent
    context = agent.begin(2)
    obs, action, zeros = torch.randn(2, 17), torch.randn(2, 6), torch.zeros(2)
    _, context = agent.act(Percept(obs, action, zeros, zeros, zeros + 1), context)
    assert not context[1].any()
    _, after = agent.act(Percept(obs + 1, action, zeros - 1, zeros + 1, zeros), context)
    assert torch.equal(after[1], context[1])
    _, inside = agent.act(Percept(obs + 1, action, zeros - 1, zeros, zeros), context)
    assert bool((inside[1][:, -1] > 0).all())


@pytest.mark.parametrize("loss", LOSSES)
def test_encoder_steps_bring_windows_of_a_task_together_whatever_the_loss(loss: str) -> None:
    learner = build(loss=loss, lessons=150, encoder_lr=3e-3)
    metrics = [learner.update(collect_trials(learner, seed=i), 0.0, i) for i in range(3)]
    names = {
        "metric/loss",
        "metric/distance_loss",
        "metric/accuracy",
        "metric/spread",
        "metric/threshold",
    }
    assert names <= metrics[0].keys()
    assert metrics[2]["metric/distance_loss"] < 0.6 * metrics[0]["metric/distance_loss"]
    assert metrics[2]["metric/accuracy"] > 2 / 18
    z = learner.agent.embedded()
    within = (z - z.mean(1, keepdim=True)).norm(dim=-1).mean()
    assert within < 0.5 * metrics[2]["metric/spread"]


def test_the_bank_holds_the_latest_tasks_with_prototypes_of_the_encoder_as_it_is(
    skilled: Prototype,
) -> None:
    learner = build(bank=9)
    for i in range(2):
        trials = collect_trials(learner, seed=i, tasks=FAMILY.space.sample("train", 6, i))
        learner.update(trials, 0.0, i)
        assert len(learner.agent.bank) == min(6 * (i + 1), 9)
    bank = learner.agent.bank
    assert torch.equal(bank.task[[6, 7, 8, 0, 1, 2]], trials.task)
    z = learner.agent.embedded()
    assert torch.equal(bank.prototype, z.mean(1))
    assert float(bank.threshold) == pytest.approx(novelty_threshold(z, z.mean(1)))
    with torch.no_grad():
        learner.agent.encoder.place[0].weight *= 1.5
    learner.agent.refresh()
    assert torch.equal(bank.prototype, learner.agent.embedded().mean(1))
    assert not torch.equal(bank.prototype, z.mean(1))


def test_windows_are_collected_transitions_and_the_last_is_how_the_trial_began() -> None:
    learner = build()
    trials = collect_trials(learner)
    learner._add_to_bank(trials, torch.Generator().manual_seed(0))
    bank = learner.agent.bank
    first = trials.episodes[0]
    after = torch.where(first.valid.sum(0)[:, None] > 1, first.obs[1], first.final_obs)
    expected = torch.cat(
        [first.obs[0], first.action[0], first.reward[0][:, None], after - first.obs[0]], 1
    )
    assert torch.equal(bank.windows[:6, -1, 0], expected)
    collected = {tuple(x.tolist()) for e in trials.episodes for x in e.obs[e.valid]}
    for w, real in zip(bank.windows[:6].flatten(0, 2), bank.lived[:6].flatten(), strict=True):
        assert tuple(w[:17].tolist()) in collected if real else not w.any()
    assert bank.lived[:6].sum() > 6 * 4


def test_the_policys_gradient_leaves_the_encoder_alone_and_it_can_start_from_a_blind_policy() -> (
    None
):
    learner = build()
    before = {k: v.clone() for k, v in learner.agent.encoder.state_dict().items()}
    learner.ppo.update(learner._with_policy_obs(collect_trials(learner)), 0.0, 0)
    assert all(torch.equal(v, before[k]) for k, v in learner.agent.encoder.state_dict().items())
    torch.manual_seed(1)
    blind = PPO(PPOConfig(width=16), SHAPES).agent
    blind.norm.update(torch.randn(50, 17))
    learner.warm_start(blind)
    obs, zeros = torch.randn(3, 17), torch.zeros(3)
    percept = Percept(obs, torch.zeros(3, 6), zeros, zeros, zeros + 1)
    expected, _ = blind.act(percept, ())
    mine, _ = learner.agent.act(percept, learner.agent.begin(3))
    assert torch.allclose(mine, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (
            lambda a: a.encoder.place[-1].weight.zero_(),
            "collapsed: 6 tasks lie within .* of one point",
        ),
        (lambda a: a.encoder.place[-1].weight.fill_(float("nan")), "not finite"),
        (lambda a: a.encoder.read[0].weight.fill_(float("inf")), "not finite"),
    ],
)
def test_embeddings_that_collapsed_or_are_not_finite_are_named(
    break_it: Callable[[Any], Any], says: str
) -> None:
    learner = build()
    learner.update(collect_trials(learner), 0.0, 0)
    with torch.no_grad():
        break_it(learner.agent)
    before = learner.agent.bank.prototype.clone()
    with pytest.raises(CollapseError, match=says) as e:
        learner.agent.refresh()
    assert "last checkpoint" in str(e.value)
    assert torch.equal(learner.agent.bank.prototype, before)


def test_training_stops_at_a_collapse_with_the_checkpoint_safe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tiny_run(tmp_path / "run", agent="prototype")
    held = made.checkpoint()
    assert {
        "agent.bank.prototype",
        "agent.bank.task",
        "agent.bank.windows",
        "agent.bank.threshold",
    } <= held[0].keys()
    with monkeypatch.context() as m:
        m.setattr("metarobot.agents.prototype.COLLAPSED", 1e9)
        more = [
            "--agent",
            "prototype",
            "--out",
            str(tmp_path / "run"),
            "--resume",
            "--steps",
            "4000",
        ]
        code, _, err = run(capsys, "train", "CheetahDir100", *more)
    assert code == 2
    assert "the embeddings collapsed" in err.splitlines()[-1]
    tensors, counters = made.checkpoint()
    assert counters == held[1]
    assert all(torch.equal(v, held[0][k]) for k, v in tensors.items())
    assert train(made, show=False)


def test_identical_tasks_and_too_few_transitions_are_refused_in_a_line() -> None:
    learner = build()
    trials = collect_trials(learner)
    same = changed(
        trials,
        **{
            k: lambda x: x[:, :1].expand_as(x)
            for k in ("obs", "action", "reward", "valid", "terminated", "truncated")
        },
        final_obs=lambda x: x[:1].expand_as(x),
    )
    with pytest.raises(CollapseError, match="6 tasks have identical transitions"):
        learner.update(same, 0.0, 0)
    short = replace(trials, episodes=(cut(trials.episodes[0], 1),))
    with pytest.raises(
        MetarobotError, match="a task has 1 transitions; support and query need at least 2"
    ):
        learner._add_to_bank(short, torch.Generator())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"loss": "triplet"},
            "no loss called 'triplet'; there are: prototypical, contrastive, siamese",
        ),
        ({"bank": 5}, "bank = 5 cannot hold the tasks of one iteration, worlds = 6"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(MetarobotError, match=says):
        build(**settings)


def test_a_window_of_support_and_one_of_query_are_needed() -> None:
    config = PrototypeConfig(windows=1)
    with pytest.raises(MetarobotError, match="windows must be at least 2, a support and a query"):
        check_bounds(config)
    check_bounds(replace(config, windows=2))
