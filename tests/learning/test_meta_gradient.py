import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from metarobot.learning.agent_interface import Dimensions
from metarobot.learning.maml_agent import (
    GaussianPolicy,
    GradientAgent,
    InnerBatch,
    InnerConfig,
)
from metarobot.learning.meta_gradient import (
    InnerTrajectory,
    adapt_weights,
    call_with_weights,
    exact_derivatives,
    first_order_derivatives,
    loop_over_tasks,
    per_task_gradients,
    set_ascent_gradients,
    unflatten,
    vmap_tasks,
)
from metarobot.learning.networks import log_prob

TASKS, SIZE = 3, 11
Points = tuple[Tensor, Tensor]


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def objective(weights: Tensor, points: Points) -> Tensor:
    """A small network's fit, and a wave: no two derivatives of it are equal."""
    x, y = points
    hidden = torch.tanh(x @ weights[:6].view(2, 3) + weights[6:9])
    return (
        -(hidden.sum(-1) * weights[9] + weights[10] - y).square().mean()
        + 0.3 * torch.sin(2 * weights).sum()
    )


def points(seed: int) -> Points:
    return numbers(TASKS, 5, 2, seed=seed), numbers(TASKS, 5, seed=seed + 100)


START = 0.5 * numbers(TASKS, SIZE, seed=0)
QUERY = points(9)
RATES = {
    "one rate": torch.tensor(0.15, dtype=torch.float64),
    "rates": 0.1 + 0.05 * numbers(SIZE, seed=1).abs(),
}
each_rate = pytest.mark.parametrize("rates", RATES.values(), ids=RATES.keys())
each_length = pytest.mark.parametrize("steps", [1, 3])


def adapted(
    weights: Tensor, rates: Tensor, steps: int, derivative: Any = exact_derivatives
) -> InnerTrajectory:
    return adapt_weights(objective, weights, rates, [points(i) for i in range(steps)], derivative)


def differences(f: Callable[[Tensor], Tensor], x: Tensor, h: float = 1e-5) -> Tensor:
    """Central differences of ``f`` ``(...)`` by the last axis of ``x``, ``(..., len)``."""
    moves = h * torch.eye(x.shape[-1], dtype=x.dtype)
    return torch.stack([(f(x + m) - f(x - m)) / (2 * h) for m in moves], -1)


def outer(weights: Tensor, rates: Tensor, steps: int) -> Tensor:
    return vmap(objective)(adapted(weights, rates, steps).weights, QUERY)


@each_rate
@each_length
def test_the_vjp_equals_finite_differences(rates: Tensor, steps: int) -> None:
    trajectory = adapted(START, rates, steps)
    by_weights, by_rates = trajectory.vjp(per_task_gradients(objective, trajectory.weights, QUERY))
    assert torch.allclose(
        by_weights, differences(lambda w: outer(w, rates, steps), START), rtol=1e-6, atol=1e-8
    )
    many = rates.expand(SIZE)
    assert torch.allclose(
        by_rates, differences(lambda r: outer(START, r, steps), many), rtol=1e-6, atol=1e-8
    )
    if rates.dim() == 0:
        h = 1e-5
        by_one = (outer(START, rates + h, steps) - outer(START, rates - h, steps)) / (2 * h)
        assert torch.allclose(by_rates.sum(-1), by_one, rtol=1e-6, atol=1e-8)


@each_rate
@each_length
def test_the_vjp_equals_differentiating_through_the_graph_of_each_task(
    rates: Tensor, steps: int
) -> None:
    trajectory = adapted(START, rates, steps)
    by_weights, by_rates = trajectory.vjp(per_task_gradients(objective, trajectory.weights, QUERY))
    for task in range(TASKS):
        start, rate = START[task].clone().requires_grad_(), rates.clone().requires_grad_()
        weights = start
        for i in range(steps):
            batch = [x[task] for x in points(i)]
            (gradient,) = torch.autograd.grad(objective(weights, batch), weights, create_graph=True)
            weights = weights + rate * gradient
        end = objective(weights, [x[task] for x in QUERY])
        one, two = torch.autograd.grad(end, (start, rate))
        assert torch.allclose(weights, trajectory.weights[task], rtol=1e-12, atol=1e-12)
        assert torch.allclose(one, by_weights[task], rtol=1e-10, atol=1e-12)
        assert torch.allclose(
            two,
            by_rates[task].sum() if rates.dim() == 0 else by_rates[task],
            rtol=1e-10,
            atol=1e-12,
        )


@each_rate
@each_length
def test_the_jvp_is_the_transpose_of_the_vjp(rates: Tensor, steps: int) -> None:
    trajectory = adapted(START, rates, steps)
    u, v, faster = (numbers(TASKS, SIZE, seed=s) for s in (5, 6, 7))
    faster = faster[0, 0] if rates.dim() == 0 else faster[0]
    by_weights, by_rates = trajectory.vjp(u)
    jvp_product = trajectory.jvp(v, faster)
    assert torch.allclose(
        (jvp_product * u).sum(-1), (v * by_weights + faster * by_rates).sum(-1), rtol=1e-10
    )
    still = torch.zeros_like(faster)
    assert torch.allclose(
        (trajectory.jvp(v, still) * u).sum(-1), (v * by_weights).sum(-1), rtol=1e-10
    )


@each_rate
@each_length
def test_the_jvp_equals_finite_differences(rates: Tensor, steps: int) -> None:
    v, faster, h = numbers(TASKS, SIZE, seed=6), numbers(*rates.shape, seed=7), 1e-5
    ahead, behind = (adapted(START + s * v, rates + s * faster, steps).weights for s in (h, -h))
    jvp_product = adapted(START, rates, steps).jvp(v, faster)
    assert torch.allclose(jvp_product, (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-8)


def test_products_can_be_taken_again_and_again() -> None:
    trajectory = adapted(START, RATES["rates"], 3)
    u = numbers(TASKS, SIZE, seed=5)
    first, jvp_product = trajectory.vjp(u), trajectory.jvp(u, u[0])
    assert all(torch.equal(a, b) for a, b in zip(first, trajectory.vjp(u), strict=True))
    assert torch.equal(jvp_product, trajectory.jvp(u, u[0]))
    assert not trajectory.weights.requires_grad


@pytest.mark.parametrize("derivative", [exact_derivatives, first_order_derivatives])
def test_many_tasks_at_once_equal_one_after_the_other(derivative: Any) -> None:
    rates, u = RATES["rates"], numbers(TASKS, SIZE, seed=5)
    together = adapted(START, rates, 3, derivative)
    vjp_product, jvp_product = together.vjp(u), together.jvp(u, u[0])
    for i in range(TASKS):
        data = [tuple(x[i : i + 1] for x in points(k)) for k in range(3)]
        alone = adapt_weights(objective, START[i : i + 1], rates, data, derivative)
        gradient = grad(objective)(START[i], [x[i] for x in points(0)])
        assert torch.allclose(
            per_task_gradients(objective, START, points(0))[i], gradient, rtol=1e-12, atol=1e-13
        )
        assert torch.allclose(alone.weights[0], together.weights[i], rtol=1e-12, atol=1e-13)
        for one, many in zip(
            (*alone.vjp(u[i : i + 1]), alone.jvp(u[i : i + 1], u[0])),
            (*vjp_product, jvp_product),
            strict=True,
        ):
            assert torch.allclose(one[0], many[i], rtol=1e-11, atol=1e-12)


def test_a_python_loop_over_tasks_gives_what_vmap_gives() -> None:
    rates, u, one = (
        RATES["rates"],
        numbers(TASKS, SIZE, seed=5),
        lambda w, batch: (objective(w, batch), 2 * w),
    )

    def everything() -> list[Tensor]:
        trajectory = adapted(START, rates, 3)
        return [
            *trajectory.vjp(u),
            trajectory.jvp(u, u[0]),
            per_task_gradients(objective, START, QUERY),
            *vmap_tasks(one)(START, QUERY),
        ]

    mapped = everything()
    with loop_over_tasks():
        found = everything()
        with pytest.raises(IndexError):
            vmap_tasks(lambda w: w[99])(START)
    assert all(
        torch.allclose(a, b, rtol=1e-12, atol=1e-13) for a, b in zip(mapped, found, strict=True)
    )
    with pytest.raises(ZeroDivisionError), loop_over_tasks():
        raise ZeroDivisionError
    assert all(torch.equal(a, b) for a, b in zip(mapped, everything(), strict=True))


def test_first_order_takes_the_same_steps_and_its_vjp_is_the_outer_gradient() -> None:
    rates = RATES["rates"]
    rough, sharp = adapted(START, rates, 3, first_order_derivatives), adapted(START, rates, 3)
    assert torch.allclose(rough.weights, sharp.weights, rtol=1e-13, atol=1e-14)
    u = numbers(TASKS, SIZE, seed=5)
    by_weights, by_rates = rough.vjp(u)
    assert torch.equal(by_weights, u)
    assert torch.allclose(by_rates, sum(s.gradient for s in rough.steps) * u, rtol=1e-12)
    assert not torch.allclose(sharp.vjp(u)[0], u, atol=0.01)
    assert torch.equal(rough.jvp(u, torch.zeros(SIZE, dtype=u.dtype)), u)


def test_the_product_is_with_the_hessian() -> None:
    _, product = exact_derivatives(objective, START, QUERY)
    v = numbers(TASKS, SIZE, seed=5)
    for i in range(TASKS):
        hessian = torch.autograd.functional.hessian(
            lambda w, i=i: objective(w, [x[i] for x in QUERY]), START[i]
        )
        assert torch.allclose(product(v)[i], hessian @ v[i], rtol=1e-10, atol=1e-12)


def test_a_trajectory_can_be_cut_short() -> None:
    rates, u = RATES["rates"], numbers(TASKS, SIZE, seed=5)
    trajectory = adapted(START, rates, 3)
    for k in range(4):
        short, again = trajectory.first(k), adapted(START, rates, k)
        assert torch.equal(short.weights, again.weights)
        assert all(torch.equal(a, b) for a, b in zip(short.vjp(u), again.vjp(u), strict=True))
    assert torch.equal(trajectory.first(0).weights, START)
    assert torch.equal(trajectory.first(0).vjp(u)[0], u)
    assert not trajectory.first(0).vjp(u)[1].any()
    assert trajectory.first(7) is trajectory


def test_calling_a_module_with_other_weights_equals_setting_them() -> None:
    torch.manual_seed(0)
    net, other = (
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double() for _ in range(2)
    )
    x, weights = numbers(5, 3, seed=0), nn.utils.parameters_to_vector(other.parameters()).detach()
    before = [p.clone() for p in net.parameters()]
    assert torch.equal(call_with_weights(net, weights, x), other(x))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    by_weights = grad(lambda w: call_with_weights(net, w, x).square().sum())(weights)
    expected = torch.autograd.grad(other(x).square().sum(), list(other.parameters()))
    assert torch.allclose(by_weights, torch.cat([g.flatten() for g in expected]), rtol=1e-12)


def test_a_minimiser_climbs_along_the_direction_it_is_given() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    net[1].bias.requires_grad_(False)
    before, gradient = nn.utils.parameters_to_vector(net.parameters()).detach(), torch.randn(26)
    pieces = unflatten(gradient, net)
    assert [p.shape for p in pieces] == [p.shape for p in net.parameters()]
    assert torch.equal(nn.utils.parameters_to_vector(pieces), gradient)
    set_ascent_gradients(net, gradient)
    torch.optim.SGD(net.parameters(), lr=0.5).step()
    gradient[24:] = 0.0
    assert torch.allclose(nn.utils.parameters_to_vector(net.parameters()), before + 0.5 * gradient)


class Constant(nn.Module):
    """The actor of a bandit: a mean action, whatever is batch."""

    def __init__(self, mean: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor([mean]))

    def forward(self, x: Tensor) -> Tensor:
        return self.mean.expand(*x.shape[:-1], 1)


NODES, SHARES = (torch.from_numpy(x) for x in np.polynomial.hermite.hermgauss(80))
SHARES = SHARES / math.sqrt(math.pi)


def reward(action: Tensor) -> Tensor:
    return torch.sin(1.5 * action + 0.3) + action * torch.exp(-action.square() / 4)


def quadrature_actions(theta: Tensor) -> Tensor:
    """Actions of the policy (log-deviation, mean), at the nodes of the quadrature: they move as the
    policy does."""
    log_std, mean = theta
    return mean + math.sqrt(2) * log_std.exp() * NODES


def expected(theta: Tensor) -> Tensor:
    """E[r(a)] under the policy, its derivatives by the reparameterised actions: no likelihood ratio
    anywhere."""
    return (SHARES * reward(quadrature_actions(theta))).sum()


def bandit() -> GradientAgent:
    """An agent of one step and two weights, its log-deviation and its mean, each with its own
    rate."""
    agent = GradientAgent(
        Dimensions(obs=1, act=1, task=1, episodes=2), InnerConfig(worlds=2, rollouts=1)
    )
    agent = agent.fine_tuned_from(GaussianPolicy(Constant(0.4), torch.tensor([-0.5])), 1.0)
    agent.set_meta_parameters(agent.meta_parameters() * torch.tensor([0.3, 0.7, 1.0, 1.0]))
    return agent.double().requires_grad_()


def exact_batch(agent: GradientAgent, weights: Tensor) -> InnerBatch:
    """A batch of the policy of these weights ``(1, 2)``, its expectations exact."""
    action = quadrature_actions(weights[0])[None, :, None]
    x = torch.zeros_like(action)
    mean, log_std = agent.distribution(weights, x)
    old = log_prob(mean, log_std, action)
    return InnerBatch(x, action, reward(action[..., 0]), SHARES[None], mean, log_std, old)


def meta_gradient(agent: GradientAgent, inner: Any, episodes: int) -> tuple[Tensor, Tensor]:
    """The derivative of the adapted policy's objective by rates and weights, and the adapted
    weights."""
    weights, rates = agent.split_meta_parameters(agent.meta_parameters())
    support, trajectory = [], adapt_weights(inner, weights[None], rates, [])
    for _ in range(episodes):
        support.append(exact_batch(agent, trajectory.weights))
        trajectory = adapt_weights(inner, weights[None], rates, support)
    gradient = per_task_gradients(
        agent.surrogate, trajectory.weights, exact_batch(agent, trajectory.weights)
    )
    return agent.meta_vjp(trajectory, gradient), trajectory.weights


@pytest.mark.parametrize("episodes", [1, 2])
def test_the_meta_gradient_goes_through_the_sampling_distribution(episodes: int) -> None:
    agent = bandit()

    def adapted(vector: Tensor) -> Tensor:
        theta, rates = agent.split_meta_parameters(vector)
        for _ in range(episodes):
            theta = theta + rates * torch.autograd.functional.jacobian(expected, theta)
        return theta

    truth = differences(lambda v: expected(adapted(v)), agent.meta_parameters())
    found, weights = meta_gradient(agent, agent.surrogate, episodes)
    assert torch.allclose(weights[0], adapted(agent.meta_parameters()), rtol=1e-10)
    assert torch.allclose(found, truth, rtol=1e-6, atol=1e-9)

    def score(weights: Tensor, batch: InnerBatch) -> Tensor:
        mean, log_std = call_with_weights(agent.policy, weights, batch.x)
        return (batch.step_weight * log_prob(mean, log_std, batch.action) * batch.advantage).sum()

    wrong, same = meta_gradient(agent, score, episodes)
    assert torch.allclose(same, weights, rtol=1e-10)
    by_weights = agent.split_meta_parameters(truth)[0]
    assert (agent.split_meta_parameters(wrong)[0] - by_weights).norm() > by_weights.norm()
    rough = per_task_gradients(agent.surrogate, weights, exact_batch(agent, weights))[0]
    assert (agent.split_meta_parameters(found)[0] - rough).norm() > 0.1 * rough.norm()


def test_the_agents_own_trajectory_is_that_of_the_bandit() -> None:
    agent = bandit()
    batch = exact_batch(agent, agent.split_meta_parameters(agent.meta_parameters())[0][None])
    trajectory = agent.adapt_meta_parameters(agent.meta_parameters(), [batch])
    found, weights = meta_gradient(agent, agent.surrogate, 1)
    assert torch.equal(trajectory.weights, weights)
    gradient = per_task_gradients(agent.surrogate, weights, exact_batch(agent, weights))
    assert torch.equal(agent.meta_vjp(trajectory, gradient), found)
