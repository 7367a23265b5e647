"""MAML without a robot: few-shot regression of sinusoids (Finn et al. 2017, section 5.1), by the
same inner loop.

A task is a sine wave of unknown amplitude and phase, of which a few points are seen. Meta-training
finds initial weights from which one gradient step on those points gives the wave; joint training
finds the mean of all waves, which no gradient step of that size leads away from. The paper's
network is 2 x 40 with ReLU and takes 70,000 outer steps; this one is 2 x 80 with tanh, smooth where
the inner step is differentiated twice, and takes 8,000.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from metarobot.learning.meta_gradient import (
    adapt_weights,
    call_with_weights,
    per_task_gradients,
    set_ascent_gradients,
    vmap_tasks,
)

Points = tuple[Tensor, Tensor]
"""x and y, ``(task, point, 1)`` each."""


@dataclass(frozen=True, kw_only=True)
class SinusoidConfig:
    """Settings of the example."""

    iterations: int = 8_000
    """Outer steps."""
    tasks: int = 25
    """Waves an outer step."""
    shots: int = 10
    """Points of a wave to adapt to, and as many to show it."""
    width: int = 80
    """Width of the network's two hidden layers."""
    inner_lr: float = 0.02
    """Size of an inner step, and of fine-tuning."""
    lr: float = 2e-3
    """Adam's learning rate; it falls to a tenth over the last half."""
    steps: int = 10
    """Gradient steps on a new wave's points when it is tested."""
    seed: int = 0
    """Draws the first weights and all waves."""


def waves(tasks: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw amplitudes U[0.1, 5] and phases U[0, π], ``(task, 1, 1)`` each."""
    amplitude, phase = torch.rand(2, tasks, 1, 1, generator=generator)
    return 0.1 + 4.9 * amplitude, math.pi * phase


def points(wave: tuple[Tensor, Tensor], n: int, generator: torch.Generator) -> Points:
    """Draw points of each wave at x ~ U[−5, 5]."""
    amplitude, phase = wave
    x = 10 * torch.rand(len(amplitude), n, 1, generator=generator) - 5
    return x, amplitude * torch.sin(x - phase)


class Regressor:
    """A network that regresses a wave, and the initial weights it adapts from."""

    def __init__(self, config: SinusoidConfig, adapted: bool) -> None:
        """Meta-train if ``adapted`` is true, else train jointly on all waves: no inner step."""
        self.config, self.inner_steps = config, int(adapted)
        sizes = (1, config.width, config.width, 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())]
        self.net = nn.Sequential(*layers[:-1])
        self.rates = torch.tensor(config.inner_lr)
        self.optimiser = torch.optim.Adam(self.net.parameters(), lr=config.lr)

    def objective(self, weights: Tensor, seen: Points) -> Tensor:
        """Return minus the mean squared error of one task."""
        x, y = seen
        loss: Tensor = (call_with_weights(self.net, weights, x) - y).square().mean()
        return -loss

    def begin(self, tasks: int) -> Tensor:
        """Return the initial weights for each task, ``(task, P)``."""
        return nn.utils.parameters_to_vector(self.net.parameters()).detach().expand(tasks, -1)

    def update(self, support: Points, query: Points) -> float:
        """Take one outer step; return the mean squared error on the query points before it."""
        path = adapt_weights(
            self.objective, self.begin(len(support[0])), self.rates, [support] * self.inner_steps
        )
        by_weights, _ = path.vjp(per_task_gradients(self.objective, path.weights, query))
        set_ascent_gradients(self.net, by_weights.mean(0))
        self.optimiser.step()
        return -float(vmap_tasks(self.objective)(path.weights, query).mean())

    def train(
        self, watch: Callable[[int, float], None] = lambda iteration, error: None
    ) -> Regressor:
        """Train; ``watch`` is told the error of every outer step."""
        c, generator = self.config, torch.Generator().manual_seed(self.config.seed)
        for i in range(c.iterations):
            for group in self.optimiser.param_groups:
                group["lr"] = c.lr * min(1.0, 1.9 - 1.8 * i / c.iterations)
            wave = waves(c.tasks, generator)
            support, query = (points(wave, c.shots, generator) for _ in range(2))
            watch(i, self.update(support, query))
        return self

    @torch.no_grad()
    def curve(self, support: Points, query: Points, steps: int) -> tuple[Tensor, Tensor]:
        """Return predictions ``(step, task, point, 1)`` and errors ``(step, task)`` after 0, 1, …
        gradient steps.
        """
        weights, predictions = self.begin(len(support[0])), []
        for _ in range(steps + 1):
            predictions.append(
                vmap_tasks(lambda w, x: call_with_weights(self.net, w, x))(weights, query[0])
            )
            weights = weights + self.rates * per_task_gradients(self.objective, weights, support)
        made = torch.stack(predictions)
        return made, (made - query[1]).square().mean((2, 3))


@dataclass(frozen=True)
class Comparison:
    """Both ways of training on waves that neither has seen: one wave to look at, and errors over
    many.

    ``curves``: name -> predictions of the one wave ``(step, point)`` after 0, 1, … gradient steps;
    ``errors``: name -> mean squared errors over all waves after as many.
    """

    x: Tensor
    truth: Tensor
    seen: tuple[Tensor, Tensor]
    curves: dict[str, Tensor]
    errors: dict[str, list[float]]


def compare(
    config: SinusoidConfig,
    watch: Callable[[str, int, float], None] = lambda name, iteration, error: None,
) -> Comparison:
    """Train by MAML and jointly, and fine-tune both on 1,000 new waves."""
    generator = torch.Generator().manual_seed(config.seed + 1)
    wave = waves(1000, generator)
    support, query = points(wave, config.shots, generator), points(wave, 100, generator)
    amplitude, phase = (v[:1] for v in wave)
    x = torch.linspace(-5, 5, 200)[None, :, None]
    one = x, amplitude * torch.sin(x - phase)
    curves, errors = {}, {}
    for name, adapted in (("MAML", True), ("joint training", False)):
        trained = Regressor(config, adapted).train(partial(watch, name))
        curves[name] = trained.curve((support[0][:1], support[1][:1]), one, config.steps)[0][
            :, 0, :, 0
        ]
        errors[name] = trained.curve(support, query, config.steps)[1].mean(1).tolist()
    return Comparison(
        one[0].flatten(),
        one[1].flatten(),
        (support[0][0, :, 0], support[1][0, :, 0]),
        curves,
        errors,
    )
