import gc
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    EMPTY,
    IN_TIME,
    STEADY,
    TASKS,
    adapted,
    build,
    changed,
    changed_trials,
    collect_trials,
    directional_derivative,
    directions,
    each_agent,
    episode,
    example_trials,
    fill,
    finite,
    in_float64,
    initial,
    same,
)
from torch import Tensor, nn
from torch.func import vmap

from metarobot.learning.maml_agent import InnerBatch, ignored_rollouts
from metarobot.learning.meta_gradient import first_order_derivatives, per_task_gradients

by_trust_region = pytest.mark.parametrize("name", ["maml", "fomaml"])


@each_agent
def test_rates_that_are_not_learned_have_no_gradient_and_never_change(name: str) -> None:
    learner = build(name, learn_rates=False)
    agent, before = learner.agent, learner.agent.meta_parameters()
    *support, query = agent.batches(example_trials())
    trajectory = agent.adapt_meta_parameters(agent.meta_parameters(), support)
    gradient = agent.meta_vjp(
        trajectory, per_task_gradients(agent.surrogate, trajectory.weights, query)
    )
    assert not gradient[: agent.weight_count].any()
    assert gradient[agent.weight_count :].any()
    assert (
        build("maml")
        .agent.meta_vjp(trajectory, per_task_gradients(agent.surrogate, trajectory.weights, query))[
            : agent.weight_count
        ]
        .any()
    )
    for i in range(2):
        learner.update(example_trials(), 0.0, i)
    assert torch.equal(agent.meta_parameters()[: agent.weight_count], before[: agent.weight_count])
    assert not torch.equal(
        agent.meta_parameters()[agent.weight_count :], before[agent.weight_count :]
    )


def test_promps_meta_gradient_equals_finite_differences() -> None:
    learner, vector, support, query = in_float64("promp", 3, penalty=0.5, grad_norm=1e9)
    agent, c = learner.agent, learner.config
    vector = vector + 0.03 * directions(1, len(vector))[0]
    agent.set_meta_parameters(vector)

    def outer(x: Tensor) -> Tensor:
        value = vmap(learner.clipped_objective)(
            agent.adapt_meta_parameters(x, support).weights, query
        ).mean()
        for k, batch in enumerate(support):
            acting = agent.adapt_meta_parameters(x, support).first(k).weights
            value = value - c.penalty * vmap(agent.divergence)(acting, batch).mean()
        return value

    ratio = vmap(agent.ratio)(agent.adapt_meta_parameters(vector, support).weights, query)
    assert ((ratio - 1).abs() > c.clip).any()
    vectors = directions(4, len(vector))
    expected = torch.stack([directional_derivative(outer, vector, v, 1e-6) for v in vectors])
    learner._outer_step(support, query)
    gradient = -nn.utils.parameters_to_vector([p.grad for p in agent.parameters()])
    assert torch.allclose(vectors @ gradient, expected, rtol=1e-5, atol=1e-7)
    learner, _, support, query = in_float64("maml-ppo", 3, grad_norm=1e9)
    learner.agent.set_meta_parameters(vector)
    learner._outer_step(support, query)
    clipped = -nn.utils.parameters_to_vector([p.grad for p in learner.agent.parameters()])
    assert not torch.allclose(clipped, gradient, atol=1e-3)


def test_fomaml_uses_the_outer_gradient_itself_and_updates_differently_from_maml() -> None:
    learner, vector, support, query = in_float64("fomaml", 3)
    agent = learner.agent
    trajectory = agent.adapt_meta_parameters(vector, support, learner.derivatives)
    outer_gradients = per_task_gradients(agent.surrogate, trajectory.weights, query)
    assert torch.equal(
        agent.meta_vjp(trajectory, outer_gradients)[agent.weight_count :], outer_gradients.mean(0)
    )
    learners = [build(name) for name in ("fomaml", "maml")]
    for one in learners:
        one.update(example_trials(), 0.0, 0)
    assert not torch.allclose(*(one.agent.meta_parameters() for one in learners), atol=1e-4)


@pytest.mark.parametrize("inner_steps", [1, 2])
def test_the_fisher_product_is_the_hessian_of_the_adapted_policies_divergence(
    inner_steps: int,
) -> None:
    learner, vector, support, query = in_float64(
        "maml", 3, thin=1, damping=0.0, inner_steps=inner_steps
    )
    agent = learner.agent
    fisher = learner.fisher(vector, support, query)

    def divergence_gradient(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        weights = agent.adapt_meta_parameters(x, support, first_order_derivatives).weights
        return torch.autograd.grad(vmap(agent.divergence)(weights, query).mean(), x)[0]

    for v in directions(4, len(vector)):
        product = fisher(v)
        assert torch.allclose(
            product,
            directional_derivative(divergence_gradient, vector, v),
            rtol=1e-5,
            atol=1e-6 * float(product.abs().max()),
        )


@by_trust_region
def test_thinning_touches_the_curvature_alone(name: str) -> None:
    learner, vector, support, query = in_float64(name, 3, thin=4, damping=0.0)
    agent = learner.agent
    trajectory = agent.adapt_meta_parameters(vector, support, learner.derivatives)
    sparse = (
        learner.derivatives(agent.surrogate, s.start, b.thin(4))[1]
        for s, b in zip(trajectory.steps, support, strict=True)
    )
    trajectory = replace(
        trajectory,
        steps=tuple(replace(s, hessian=h) for s, h in zip(trajectory.steps, sparse, strict=True)),
    )
    for v in directions(2, len(vector)):
        tangents, moved = agent.meta_jvp(trajectory, v), []
        for i in range(len(TASKS)):
            shown = InnerBatch(*(x[i] for x in query.thin(4)))
            kl = torch.autograd.functional.hvp(
                lambda w, b=shown: agent.divergence(w, b), trajectory.weights[i], tangents[i]
            )
            moved.append(kl[1])
        assert torch.allclose(
            learner.fisher(vector, support, query)(v),
            agent.meta_vjp(trajectory, torch.stack(moved)),
            rtol=1e-9,
        )


@by_trust_region
@pytest.mark.parametrize("thin", [1, 4])
def test_the_fisher_matrix_is_symmetric_and_positive(name: str, thin: int) -> None:
    learner, vector, support, query = in_float64(name, 3, thin=thin, damping=0.0)
    fisher = learner.fisher(vector, support, query)
    vectors = directions(5, len(vector))
    gram = torch.stack([fisher(v) for v in vectors]) @ vectors.T
    assert torch.allclose(gram, gram.T, rtol=1e-9)
    assert torch.linalg.eigvalsh(gram).min() > 0
    damped = build(name, episodes=3, thin=thin, damping=0.5)
    damped.agent.double()
    assert torch.allclose(
        damped.fisher(vector, support, query)(vectors[0]), fisher(vectors[0]) + 0.5 * vectors[0]
    )


@by_trust_region
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("progress", "bound"), [(0.0, 0.02), (0.5, 0.012), (1.0, 0.004)])
def test_an_outer_step_gains_within_a_bound_that_shrinks(
    name: str, seed: int, progress: float, bound: float
) -> None:
    learner, old = build(name, kl=0.02, kl_end=0.2), build(name)
    trials = collect_trials(old.agent, seed=seed)
    *support, query = old.agent.batches(trials)
    query, explained = old.agent.with_critic_advantages(query, trials, old.critic, 0)
    metrics = learner.update(trials, progress, 0)
    step = learner.agent.meta_parameters() - old.agent.meta_parameters()
    before, none = old.objective(
        old.agent.meta_parameters(), support, query, torch.zeros_like(step)
    )
    after, divergence = old.objective(old.agent.meta_parameters(), support, query, step)
    assert metrics["train/is_line_search_success"] == 1.0
    assert none == pytest.approx(0.0, abs=1e-6)
    assert 0.4 * bound < divergence <= bound * (1 + 1e-4)
    assert after > before + 0.01
    assert metrics["train/policy_objective"] == pytest.approx(after - before, abs=1e-5)
    assert metrics["train/kl_divergence_loss"] == pytest.approx(divergence, abs=1e-5)
    assert metrics["train/explained_variance"] == float(explained)


@by_trust_region
@pytest.mark.parametrize(("kl", "tries"), [(0.05, 1), (0.0, 10)])
def test_where_the_line_search_finds_nothing_the_weights_stay(
    name: str, kl: float, tries: int
) -> None:
    learner = build(name, kl=kl, tries=tries)
    before = learner.agent.meta_parameters()
    metrics = learner.update(example_trials(), 0.0, 0)
    assert metrics["train/is_line_search_success"] == 0.0
    assert metrics["train/policy_objective"] == metrics["train/kl_divergence_loss"] == 0.0
    assert torch.equal(learner.agent.meta_parameters(), before)
    assert learner.agent.norm.count == example_trials().steps()


@each_agent
def test_without_a_signal_the_weights_stay(name: str) -> None:
    learner = build(name)
    before = learner.agent.meta_parameters()
    if name != "reptile":
        for p in learner.critic.net.parameters():  # expects nothing
            nn.init.zeros_(p)
    metrics = learner.update(changed_trials(reward=fill(slice(None), 0.0)), 0.0, 0)
    assert torch.allclose(
        learner.agent.meta_parameters(), before, rtol=0, atol=1e-7 if name == "promp" else 0.0
    )
    assert metrics.get("train/is_line_search_success", 0.0) == 0.0


@each_agent
def test_an_update_is_a_function_of_weights_trials_and_seed(name: str) -> None:
    states = []
    for clutter, seed in ((1, 0), (2, 0), (1, 5)):
        learner = build(name)
        torch.manual_seed(clutter)
        metrics = learner.update(example_trials(), 0.0, seed)
        assert all(isinstance(v, float) and math.isfinite(v) for v in metrics.values())
        assert finite(learner)
        states.append(learner.state())
    assert same(states[0], states[1])
    assert same(
        states[0], states[2], "critic"
    )  # the seed orders the critic's minibatches, after its advantages are computed
    assert same(states[0], states[2]) == (name == "reptile")
    for (k, p), q in zip(
        learner.agent.named_parameters(), build(name).agent.parameters(), strict=True
    ):
        assert torch.equal(p, q) != p.requires_grad, k


@each_agent
def test_a_restored_learner_goes_on_bit_for_bit(name: str) -> None:
    learner, restored = build(name), build(name, seed=1)
    learner.update(example_trials(), 0.0, 0)
    state = learner.state()
    kept = {k: v.clone() for k, v in state.items()}
    restored.load(state)
    assert same(restored.state(), state)
    trials = collect_trials(learner.agent, seed=1)
    assert torch.equal(
        collect_trials(restored.agent, seed=1).episodes[1].action, trials.episodes[1].action
    )
    for i in range(2):
        for one in (learner, restored):
            one.update(trials, 0.3, i)
    assert same(learner.state(), restored.state())
    assert same(kept, state)
    assert not same(kept, learner.state(), "norm", "optimiser", "critic")


@pytest.mark.parametrize("name", ["promp", "maml-ppo"])
@pytest.mark.parametrize("trained", [False, True])
def test_a_step_that_breaks_the_bound_is_undone(name: str, trained: bool) -> None:
    learner = build(name, lr=10.0)
    if trained:
        veteran = build(name)
        assert veteran.update(example_trials(), 0.0, 0)["train/undone"] == 0.0
        learner.load(veteran.state())
    before = learner.state()
    metrics = learner.update(example_trials(), 0.0, 0)
    assert metrics["train/undone"] == 1.0
    assert metrics["train/gradient_steps"] == 0.0
    state = learner.state()
    assert same(
        *({k: v for k, v in x.items() if "critic" not in k} for x in (state, before)), "norm"
    )
    assert any(k.startswith("optimiser") for k in before) == trained
    assert not torch.equal(state["critic.net.0.weight"], before["critic.net.0.weight"])
    assert not torch.equal(learner.agent.norm.count, before["agent.norm.count"])


def test_a_step_within_the_bound_is_taken() -> None:
    learner, old = build("promp", epochs=3), build("promp").agent
    metrics = learner.update(example_trials(), 0.5, 0)
    *support, query = old.batches(example_trials())
    reached = vmap(old.divergence)(
        old.adapt_meta_parameters(learner.agent.meta_parameters(), support).weights, query
    ).mean()
    assert metrics["train/approx_kl"] == pytest.approx(float(reached), rel=1e-3)
    assert metrics["train/undone"] == 0.0
    assert metrics["train/gradient_steps"] == 3.0
    assert 0.0 < metrics["train/approx_kl"] <= learner.config.kl_stop
    assert metrics["train/learning_rate"] == pytest.approx(learner.config.lr * (1 - 0.5 * 0.95))


def test_promp_without_its_penalty_is_maml_ppo() -> None:
    learners = [build("promp", penalty=0.0), build("maml-ppo"), build("promp", penalty=0.5)]
    for one in learners:
        one.update(example_trials(), 0.0, 0)
    states = [one.state() for one in learners]
    assert same(states[0], states[1])
    assert not same(states[0], states[2])


def test_reptile_follows_the_mean_change_of_its_tasks_over_all_episodes() -> None:
    learner, old = build("reptile", grad_norm=1e6), build("reptile").agent
    context = old.begin(2)
    for e in example_trials().episodes:
        context = old.adapt(context, e)
    mean_change = (context[0] - initial(old)).mean(0)
    metrics = learner.update(example_trials(), 0.0, 0)
    followed = -nn.utils.parameters_to_vector([p.grad for p in learner.agent.policy.parameters()])
    assert torch.equal(followed, mean_change)
    assert metrics["train/way"] == pytest.approx(float(mean_change.norm()))
    moved = learner.agent.begin(1)[0][0] - initial(old)[0]
    assert (moved * mean_change)[mean_change.abs() > 1e-3].gt(0).all()


@each_agent
@pytest.mark.parametrize("where", [0, 1], ids=["first episode", "last episode"])
def test_a_rollout_with_a_broken_number_is_not_learned_from(name: str, where: int) -> None:
    learners = [build(name) for _ in range(2)]
    trials = []
    for change in (
        {"obs": fill((0, 4, 3), math.nan), "reward": fill((0, 2), math.inf)},
        {"valid": fill((slice(None), [2, 4]), False)},
    ):
        episodes = list(example_trials().episodes)
        episodes[where] = changed(episodes[where], **change)
        trials.append(replace(example_trials(), episodes=tuple(episodes)))
    counts = [
        one.update(t, 0.0, 0)["train/ignored_rollouts"]
        for one, t in zip(learners, trials, strict=True)
    ]
    assert counts == [2.0, 0.0]
    assert ignored_rollouts(trials[0]) == 2.0
    assert same(*(one.state() for one in learners))
    assert finite(learners[0])
    assert not torch.equal(learners[0].agent.meta_parameters(), build(name).agent.meta_parameters())


@each_agent
@pytest.mark.parametrize("empty", EMPTY.values(), ids=EMPTY.keys())
def test_where_there_is_nothing_to_learn_from_nothing_is_lost(
    name: str, empty: dict[str, Any]
) -> None:
    learner = build(name)
    before = learner.agent.meta_parameters()
    trials = changed_trials(**empty)
    assert torch.equal(adapted(learner.agent, trials.episodes[0]), initial(learner.agent))
    learner.update(trials, 0.0, 0)
    assert torch.equal(learner.agent.meta_parameters(), before)
    assert finite(learner)


@each_agent
def test_an_episode_of_no_steps_teaches_nothing(name: str) -> None:
    learner = build(name)
    none = replace(episode(), **{k: getattr(episode(), k)[:0] for k in IN_TIME})
    assert torch.equal(adapted(learner.agent, none), initial(learner.agent))
    before = learner.agent.meta_parameters()
    learner.update(replace(example_trials(), episodes=(none, none)), 0.0, 0)
    assert torch.equal(learner.agent.meta_parameters(), before)


ODD = {
    "constant rewards": {"reward": fill(slice(None), 1.0)},
    "huge rewards": {"reward": lambda x: x.mul_(1e30)},
    "one huge reward": {"reward": fill((1, 2), 1e30)},
    "the largest reward": {"reward": fill((1, 2), 3e38)},
    "tiny rewards": {"reward": lambda x: x.mul_(1e-30)},
    "huge observations": {"obs": lambda x: x.mul_(1e30)},
    "the same observation": {"obs": fill(slice(None), 1.0)},
    "broken final observations": {"final_obs": fill(slice(None), math.nan)},
    "infinite final observations": {"final_obs": fill(slice(None), math.inf)},
    "one step": {"valid": fill(slice(1, None), False)},
    "one world": {"valid": fill((slice(None), slice(1, None)), False)},
    "one step of one world": {"valid": lambda x: x.fill_(False)[0, :1].fill_(True)},
    "two steps of one world": {"valid": lambda x: x.fill_(False)[:2, :1].fill_(True)},
}


@each_agent
@pytest.mark.parametrize("odd", ODD)
def test_odd_episodes_leave_all_weights_finite(name: str, odd: str) -> None:
    learner = build(name)
    trials = changed_trials(**ODD[odd])
    assert adapted(learner.agent, trials.episodes[0]).isfinite().all()
    metrics = learner.update(trials, 0.0, 0)
    assert finite(learner)
    assert all(math.isfinite(v) for v in metrics.values())


@each_agent
def test_one_rollout_is_enough(name: str) -> None:
    learner = build(name, worlds=2, rollouts=1)
    trials = collect_trials(learner.agent, STEADY)
    assert not torch.equal(
        trials.episodes[1].action, collect_trials(learner.agent, STEADY, seed=1).episodes[1].action
    )
    before = learner.agent.meta_parameters()
    learner.update(trials, 0.0, 0)
    assert finite(learner)
    assert not torch.equal(learner.agent.meta_parameters(), before)


@each_agent
@pytest.mark.parametrize("inner_lr", [1.0, 100.0])
def test_inner_steps_far_too_long_leave_all_weights_finite(name: str, inner_lr: float) -> None:
    learner = build(name, inner_lr=inner_lr, inner_steps=5)
    for seed in range(2):
        trials = collect_trials(learner.agent, STEADY, seed=seed)
        assert all(adapted(learner.agent, e).isfinite().all() for e in trials.episodes)
        learner.update(trials, 0.0, 0)
        assert finite(learner)


def footprint() -> tuple[int, int, int]:
    """Tensors and objects that Python holds, and bytes of memory in use by this process."""
    gc.collect()
    held = gc.get_objects()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return (
        sum(issubclass(type(x), Tensor) for x in held),
        len(held),
        pages * os.sysconf("SC_PAGE_SIZE"),
    )


@pytest.mark.parametrize(
    ("name", "settings"), [("maml", {"cg_steps": 3}), ("promp", {"epochs": 2}), ("reptile", {})]
)
def test_updates_leave_nothing_behind(name: str, settings: dict[str, int]) -> None:
    learner, trials, found = build(name, **settings), example_trials(), []
    for i in range(25):
        if i == 5:
            found.append(footprint())
        learner.update(trials, 0.0, i)
    (tensors, objects, resident), (more_tensors, more_objects, more_resident) = (
        *found,
        footprint(),
    )
    assert more_tensors == tensors
    assert more_objects - objects < 60
    assert more_resident - resident < 5_000_000
