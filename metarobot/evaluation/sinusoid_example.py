"""MAML without a robot: few-shot regression of sinusoids (Finn et al. 2017, section 5.1).

A task is a sine wave of unknown amplitude and phase, of which a few points are given. Meta-training
finds initial weights from which one gradient step on those points fits the wave; joint training
finds the mean of all waves, which no gradient step of that size leads away from. The inner loop is
the one that adapts robots.

The paper's network is 2 x 40 with ReLU and takes 70,000 outer steps; this one is 2 x 80 with tanh,
smooth where the inner step is differentiated twice, and takes 8,000.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from metarobot.config_bounds import Count, NonNegative
from metarobot.learning.meta_gradient import (
    adapt_weights,
    call_with_weights,
    per_task_gradients,
    set_ascent_gradients,
    vmap_tasks,
)
from metarobot.learning.ppo_core import set_learning_rate

SinusoidPoints = tuple[Tensor, Tensor]
"""x and y of points on each wave, ``(task, point, 1)`` each."""

TEST_WAVES = 1_000
"""Waves on which both networks are compared."""
TEST_POINTS = 100
"""Points of each of them on which the error is measured."""


@dataclass(frozen=True, kw_only=True)
class SinusoidConfig:
    """Settings of the example."""

    iterations: Count = 8_000
    """Outer steps."""
    tasks: Count = 25
    """Waves an outer step."""
    shots: Count = 10
    """Points of a wave to adapt to, and as many to measure the result."""
    width: Count = 80
    """Width of the network's two hidden layers."""
    inner_lr: NonNegative = 0.02
    """Size of an inner step, and of fine-tuning."""
    lr: NonNegative = 2e-3
    """Adam's learning rate; it falls to a tenth over the last half."""
    steps: Count = 10
    """Gradient steps on a new wave's points when it is tested."""
    seed: int = 0
    """Seed of the initial weights and of all waves."""


def sample_waves(tasks: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sample amplitudes U[0.1, 5] and phases U[0, π], ``(task, 1, 1)`` each."""
    amplitude, phase = torch.rand(2, tasks, 1, 1, generator=generator)
    return 0.1 + 4.9 * amplitude, math.pi * phase


def sample_points(
    wave: tuple[Tensor, Tensor], count: int, generator: torch.Generator
) -> SinusoidPoints:
    """Sample points of each wave at x ~ U[−5, 5]."""
    amplitude, phase = wave
    x = 10 * torch.rand(len(amplitude), count, 1, generator=generator) - 5
    return x, amplitude * torch.sin(x - phase)


class SinusoidRegressor:
    """A network that regresses a wave, and the initial weights it adapts from."""

    def __init__(self, config: SinusoidConfig, meta_train: bool) -> None:
        """Initialise the network from the seed.

        Args:
            config: Settings.
            meta_train: Train by MAML with one inner step; else jointly on all waves, without.
        """
        self.config = config
        self.inner_steps = 1 if meta_train else 0
        sizes = (1, config.width, config.width, 1)
        layers: list[nn.Module] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            for inputs, outputs in pairwise(sizes):
                layers.append(nn.Linear(inputs, outputs))
                layers.append(nn.Tanh())
        self.net = nn.Sequential(*layers[:-1])
        self.rates = torch.tensor(config.inner_lr)
        self.optimiser = torch.optim.Adam(self.net.parameters(), lr=config.lr)

    def objective(self, weights: Tensor, points: SinusoidPoints) -> Tensor:
        """Return minus the mean squared error of one task."""
        x, y = points
        loss: Tensor = (call_with_weights(self.net, weights, x) - y).square().mean()
        return -loss

    def begin(self, tasks: int) -> Tensor:
        """Return the initial weights for each task, ``(task, P)``."""
        weights = nn.utils.parameters_to_vector(self.net.parameters()).detach()
        return weights.expand(tasks, -1)

    def update(self, support: SinusoidPoints, query: SinusoidPoints) -> float:
        """Take one outer step; return the mean squared error on the query points before it."""
        start = self.begin(len(support[0]))
        trajectory = adapt_weights(self.objective, start, self.rates, [support] * self.inner_steps)

        # meta-gradient ∇ mean_i J_i(θ_i), with θ_i the adapted weights of task i
        outer_gradients = per_task_gradients(self.objective, trajectory.weights, query)
        weights_gradient, _ = trajectory.vjp(outer_gradients)
        set_ascent_gradients(self.net, weights_gradient.mean(0))
        self.optimiser.step()
        return -float(vmap_tasks(self.objective)(trajectory.weights, query).mean())

    def train(
        self, watch: Callable[[int, float], None] = lambda iteration, error: None
    ) -> SinusoidRegressor:
        """Train; ``watch`` is called with the iteration and error of every outer step."""
        c = self.config
        generator = torch.Generator().manual_seed(c.seed)
        for i in range(c.iterations):
            # constant over the first half, then linear to a tenth
            set_learning_rate(self.optimiser, c.lr * min(1.0, 1.9 - 1.8 * i / c.iterations))

            wave = sample_waves(c.tasks, generator)
            support = sample_points(wave, c.shots, generator)
            query = sample_points(wave, c.shots, generator)
            watch(i, self.update(support, query))
        return self

    @torch.no_grad()
    def learning_curve(
        self, support: SinusoidPoints, query: SinusoidPoints, steps: int
    ) -> tuple[Tensor, Tensor]:
        """Fine-tune to the support points of each wave, and evaluate on the query points.

        Returns:
            Predictions ``(step, task, point, 1)`` and mean squared errors ``(step, task)`` after
            0, 1, … gradient steps.
        """
        query_x, query_y = query
        weights = self.begin(len(query_x))
        curve = []
        for _ in range(steps + 1):
            curve.append(vmap_tasks(partial(call_with_weights, self.net))(weights, query_x))
            weights = weights + self.rates * per_task_gradients(self.objective, weights, support)
        predictions = torch.stack(curve)
        return predictions, (predictions - query_y).square().mean((2, 3))


@dataclass(frozen=True)
class SinusoidComparison:
    """MAML and joint training on waves that neither was trained on."""

    x: Tensor
    """Where the example wave is drawn, ``(point,)``."""
    truth: Tensor
    """The example wave there, ``(point,)``."""
    support: tuple[Tensor, Tensor]
    """x and y of the points of the example wave that were adapted to, ``(shot,)`` each."""
    curves: dict[str, Tensor]
    """Name -> predictions of the example wave, ``(step, point)``, after 0, 1, … gradient steps."""
    errors: dict[str, list[float]]
    """Name -> mean squared errors over all waves after 0, 1, … gradient steps."""


def compare(
    config: SinusoidConfig,
    watch: Callable[[str, int, float], None] = lambda name, iteration, error: None,
) -> SinusoidComparison:
    """Train by MAML and jointly, and fine-tune both on new waves.

    Args:
        config: Settings.
        watch: Called with the name of the training, the iteration and its error.
    """
    generator = torch.Generator().manual_seed(config.seed + 1)
    wave = sample_waves(TEST_WAVES, generator)
    support = sample_points(wave, config.shots, generator)
    query = sample_points(wave, TEST_POINTS, generator)

    # the example is the first wave, on a grid
    amplitude, phase = wave
    x = torch.linspace(-5, 5, 200)[None, :, None]
    example = (x, amplitude[:1] * torch.sin(x - phase[:1]))
    example_support = (support[0][:1], support[1][:1])

    curves = {}
    errors = {}
    for name, meta_train in (("MAML", True), ("joint training", False)):
        regressor = SinusoidRegressor(config, meta_train).train(partial(watch, name))
        predictions, _ = regressor.learning_curve(example_support, example, config.steps)
        _, squared_errors = regressor.learning_curve(support, query, config.steps)
        curves[name] = predictions[:, 0, :, 0]
        errors[name] = squared_errors.mean(1).tolist()
    return SinusoidComparison(
        x=example[0].flatten(),
        truth=example[1].flatten(),
        support=(support[0][0, :, 0], support[1][0, :, 0]),
        curves=curves,
        errors=errors,
    )
