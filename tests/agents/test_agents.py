from dataclasses import replace

import pytest
import torch
from trial_learners import FAMILY, SHAPES, TASKS, build, build_perturbed, collect_trials

from metarobot.errors import MetarobotError
from metarobot.learning.agent_interface import agents
from metarobot.learning.recurrent_memories import MEMORIES
from metarobot.types import Percept, Rollout, join_episodes

NAMES = (
    "blind",
    "oracle",
    "ppo",
    "prototype",
    "rl2",
    "varibad",
)  # test_maml.py has those that adapt by gradient


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("kind", MEMORIES)
def test_rl2_over_a_whole_trial_equals_acting_step_by_step_and_only_its_critic_observes_the_task(
    kind: str,
) -> None:
    learner = build_perturbed("rl2", memory=kind)
    trials = collect_trials(learner, seed=3, explore=False)
    seq = join_episodes(trials.episodes)
    with torch.no_grad():
        x = learner.agent.features(seq.percept)
        mean, value, belief = learner.agent(x, trials.task, seq.critic_obs)
        other_mean, other_value, other_belief = learner.agent(
            x, torch.zeros_like(trials.task), seq.critic_obs
        )
    assert torch.equal(mean, other_mean)
    assert torch.equal(belief, other_belief)
    assert not torch.equal(value, other_value)
    assert seq.action[seq.valid].abs().mean() > 0.05
    assert torch.allclose(mean[seq.valid], seq.action[seq.valid], atol=1e-5)


@pytest.mark.parametrize("name", ["blind", "oracle"])
def test_ppo_over_a_whole_trial_equals_acting_step_by_step(name: str) -> None:
    learner = build_perturbed(name)
    trials = collect_trials(learner, seed=3, explore=False)
    seq = join_episodes(trials.episodes)
    with torch.no_grad():
        x = learner.agent.features(seq.percept.obs, trials.task if name == "oracle" else None)
        mean = learner.agent.actor(x)
    assert seq.action[seq.valid].abs().mean() > 0.05
    assert torch.allclose(mean[seq.valid], seq.action[seq.valid], atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_exploration_adds_noise_of_the_policys_deviation(name: str) -> None:
    learner = build(name, std=0.3)
    noise = torch.Generator().manual_seed(0)
    (first, *_) = collect_trials(learner).episodes
    drawn = torch.randn(12, 6, 6, generator=noise)[: len(first.valid)]
    with torch.inference_mode():
        mean = collect_trials(learner, explore=False).episodes[0].action[0]
    assert torch.allclose(first.action[0], mean + 0.3 * drawn[0], atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_adapting_leaves_the_old_context_as_it_was(name: str) -> None:
    learner = build(name)
    context = learner.agent.begin(
        6, FAMILY.space.encode(TASKS) if learner.agent.privileged else None
    )
    before = [x.clone() for x in context]
    learner.agent.adapt(context, collect_trials(learner).episodes[0])
    assert all(torch.equal(x, y) for x, y in zip(context, before, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_one_update_changes_every_weight_and_keeps_it_finite(name: str) -> None:
    learner = build(name)
    before = {k: v.clone() for k, v in learner.agent.named_parameters()}
    metrics = learner.update(collect_trials(learner), 0.0, 0)
    for k, v in learner.agent.named_parameters():
        assert v.isfinite().all(), k
        assert not torch.equal(v, before[k]), k
    assert all(isinstance(v, float) and torch.tensor(v).isfinite() for v in metrics.values())
    assert learner.agent.norm.count == collect_trials(build(name)).steps()


@pytest.mark.parametrize("name", NAMES)
def test_updates_report_the_usual_metrics(name: str) -> None:
    learner = build(name)
    metrics = learner.update(collect_trials(learner), 0.5, 0)
    names = {
        "policy_gradient_loss",
        "value_loss",
        "approx_kl",
        "clip_fraction",
        "std",
        "explained_variance",
    }
    names |= {"learning_rate", "gradient_steps"} | (
        {"belief_loss"} if name in ("rl2", "varibad") else set()
    )
    assert {f"train/{n}" for n in names} <= metrics.keys()
    assert metrics["train/gradient_steps"] == 4
    assert metrics["train/learning_rate"] == pytest.approx(learner.config.lr * (1 - 0.5 * 0.95))
    assert metrics["train/approx_kl"] >= 0
    assert metrics["train/std"] == pytest.approx(0.6, abs=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_learning_stops_at_the_kl_bound(name: str) -> None:
    learner = build(name, kl_stop=-1.0)
    assert learner.update(collect_trials(learner), 0.0, 0)["train/gradient_steps"] == 1


@pytest.mark.parametrize("name", NAMES)
def test_an_update_is_a_function_of_weights_trials_and_seed(name: str) -> None:
    trials = collect_trials(build(name))
    states = []
    for seed, global_seed in ((0, 1), (0, 2), (5, 1)):
        learner = build(name)
        torch.manual_seed(global_seed)
        learner.update(trials, 0.0, seed)
        states.append(learner.state())
    assert same(states[0], states[1])
    assert not same(states[0], states[2])


@pytest.mark.parametrize("name", NAMES)
def test_a_restored_learner_goes_on_bit_for_bit(name: str) -> None:
    learner, restored = build(name), build(name, seed=1)
    learner.update(collect_trials(learner), 0.0, 0)
    state = learner.state()
    kept = {k: v.clone() for k, v in state.items()}
    restored.load(state)
    assert same(restored.state(), state)
    trials = collect_trials(learner, seed=1)
    assert torch.equal(
        collect_trials(restored, seed=1).episodes[1].action, trials.episodes[1].action
    )
    for one in (learner, restored):
        one.update(trials, 0.3, 1)
    assert same(learner.state(), restored.state())
    assert same(kept, state)
    assert not same(kept, learner.state())


def advantages(delta: list[float], fell: list[bool], decay: float) -> list[float]:
    """Σ_k (γλ)^k δ_{t+k} from each step t up to the next fall or the end."""
    out = []
    for t in range(len(delta)):
        end = next((s for s in range(t, len(delta)) if fell[s]), len(delta) - 1)
        out.append(sum(decay ** (s - t) * delta[s] for s in range(t, end + 1)))
    return out


def test_rl2_bootstraps_through_time_limits_inside_a_trial_and_at_its_end() -> None:
    learner = build_perturbed("rl2")
    trials = collect_trials(build("rl2"))
    seq, c = join_episodes(trials.episodes), learner.config
    ends = seq.valid.sum(0) - 1
    assert 0 < seq.truncated[ends, torch.arange(6)].sum() < 6
    batch = learner._targets(seq, trials.task)
    value, target = batch.value, batch.target
    for w, n in enumerate((ends + 1).tolist()):
        percept = Percept(*(x[:n, w : w + 1] for x in seq.percept))
        zero = torch.zeros(1, 1)
        after = (
            seq.next_obs[n - 1 : n, w : w + 1],
            *(x[n - 1 : n, w : w + 1] for x in (seq.action, seq.reward)),
        )
        whole = Percept(
            *(torch.cat(pair) for pair in zip(percept, (*after, zero, zero), strict=True))
        )
        with torch.no_grad():
            _, v, _ = learner.agent(
                learner.agent.features(whole),
                trials.task[w : w + 1],
                torch.zeros(len(whole.obs), 1, 0),
            )
        fell = seq.terminated[:n, w]
        delta = (
            seq.reward[:n, w] * learner.return_norm.scale + c.gamma * v[1:, 0] * ~fell - v[:-1, 0]
        )
        expected = (
            torch.tensor(advantages(delta.tolist(), fell.tolist(), c.gamma * c.lam)) + v[:-1, 0]
        )
        assert torch.allclose(value[:n, w], v[:-1, 0], atol=1e-5)
        assert torch.allclose(target[:n, w], expected, atol=1e-4)


@pytest.mark.parametrize("name", ["blind", "oracle"])
def test_ppo_bootstraps_each_episode_from_its_own_final_observation(name: str) -> None:
    learner = build_perturbed(name)
    trials = collect_trials(build(name))
    seq, c, start = join_episodes(trials.episodes), learner.config, [0] * 6
    target = learner._targets(seq, trials.task).target
    assert any(e.truncated.any() for e in trials.episodes)
    for e in trials.episodes:
        for w, n in enumerate(e.valid.sum(0).tolist()):
            seen = torch.cat([e.obs[:n, w], e.final_obs[w : w + 1]])
            with torch.no_grad():
                v = learner.agent.critic(
                    learner.agent.features(seen, trials.task[w] if name == "oracle" else None)
                )
            fell, v = e.terminated[:n, w], v[:, 0]
            delta = e.reward[:n, w] * learner.return_norm.scale + c.gamma * v[1:] * ~fell - v[:-1]
            expected = (
                torch.tensor(advantages(delta.tolist(), fell.tolist(), c.gamma * c.lam)) + v[:-1]
            )
            assert torch.allclose(target[start[w] : start[w] + n, w], expected, atol=1e-4)
            start[w] += n


def with_noise_in_padding(episode: Rollout) -> Rollout:
    """Write noise into the padding."""
    rng = torch.Generator().manual_seed(0)

    def fill(x: torch.Tensor) -> torch.Tensor:
        mask = episode.valid.view(*episode.valid.shape, *[1] * (x.dim() - 2))
        return torch.where(mask, x, 3 * torch.randn(x.shape, generator=rng))

    return replace(
        episode, obs=fill(episode.obs), action=fill(episode.action), reward=fill(episode.reward)
    )


@pytest.mark.parametrize(
    ("name", "settings"), [(n, {}) for n in NAMES] + [("rl2", {"memory": "gru"})]
)
def test_the_content_of_padding_does_not_matter(name: str, settings) -> None:
    trials = collect_trials(build(name, **settings))
    noisy = replace(trials, episodes=tuple(with_noise_in_padding(e) for e in trials.episodes))
    assert not torch.equal(
        join_episodes(noisy.episodes).action, join_episodes(trials.episodes).action
    )
    learners = [build(name, **settings) for _ in range(2)]
    metrics = [one.update(t, 0.0, 0) for one, t in zip(learners, (trials, noisy), strict=True)]
    assert same(learners[0].state(), learners[1].state())
    assert metrics[0] == metrics[1]


def test_the_collected_rewards_matter() -> None:
    trials = collect_trials(build("rl2"))
    first, second = trials.episodes
    worse = replace(second, reward=second.reward - 10.0 * second.valid)
    learners = [build("rl2") for _ in range(2)]
    for one, episodes in zip(learners, ((first, second), (first, worse)), strict=True):
        one.update(replace(trials, episodes=episodes), 0.0, 0)
    assert not same(learners[0].state(), learners[1].state())


@pytest.mark.parametrize(
    ("name", "changes"),
    [("blind", False), ("oracle", True), ("rl2", True), ("varibad", True)],
)
def test_the_encoded_task_changes_updates_of_all_but_the_blind_policy(
    name: str, changes: bool
) -> None:
    trials = collect_trials(build(name))
    learners = [build(name) for _ in range(2)]
    for one, task in zip(learners, (trials.task, trials.task.flip(0)), strict=True):
        one.update(replace(trials, task=task), 0.0, 0)
    assert same(learners[0].state(), learners[1].state()) != changes


def test_the_belief_learns_to_tell_tasks_apart() -> None:
    learner = build("rl2", lr=1e-2, epochs=20, kl_stop=1e9)
    trials = collect_trials(learner)
    losses = [learner.update(trials, 0.0, i)["train/belief_loss"] for i in range(6)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", ["blind", "rl2", "varibad"])
def test_several_threads_give_the_same_gradients(name: str) -> None:
    trials = collect_trials(build(name))
    learners = [build(name, epochs=1, minibatches=1) for _ in range(3)]
    for one, threads in zip(learners, (1, 2, 2), strict=True):
        torch.set_num_threads(threads)
        one.update(trials, 0.0, 0)
        assert torch.get_num_threads() == threads
    torch.set_num_threads(1)
    assert same(learners[1].state(), learners[2].state())
    for (k, p), q in zip(
        learners[0].agent.named_parameters(), learners[1].agent.parameters(), strict=True
    ):
        assert torch.allclose(p.grad, q.grad, atol=1e-5), k


def test_worlds_that_do_not_divide_into_minibatches_are_refused() -> None:
    with pytest.raises(MetarobotError, match="worlds = 6 is not a multiple of minibatches = 4"):
        build("rl2", minibatches=4)


@pytest.mark.parametrize("name", agents.names())
def test_the_defaults_build(name: str) -> None:
    kind = agents.get(name)
    assert kind.name == name
    assert kind.doc
    learner = kind.build(kind.config(), SHAPES)
    assert learner.config.worlds
    assert learner.config.episodes
