"""Checks that stop a training at its first number that is not finite, and name that number.

Weights that are NaN act as NaN, which the simulator turns into an episode of no reward: without
these checks a diverged training would go on for ever and save what it made of its agent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from metarobot.errors import MetarobotError
from metarobot.learning.agent_interface import Learner, Stateful, TrainingStep
from metarobot.types import Rollout, Trials

REMEDY = "train again with a lower learning rate (--lr)"
"""What to do if a training diverged."""
KEPT = "checkpoints from before it are kept"
CHECK_FAMILY = "check the physics and the rewards of the family"
"""What to do if the numbers were broken before anything was learned from them."""

GRADIENT_METRICS = ("train/grad_norm", "train/way")
"""Norm of the outer gradient of learners that skip a step whose gradient is not finite."""
MOST_SKIPPED_STEPS = 10
"""Iterations in a row without a finite gradient that a training goes on for."""

REPLAY_PREFIX = "replay."
"""How the tensors of a replay are named in a learner's state."""

_REFUSED_NUMBERS = ("Expected parameter", "float without overflow")
"""Words of torch's errors about numbers that overflow in a distribution or an optimiser."""
_MAX_REASON_LENGTH = 120

_METRIC_ORDER = ("reward/", "sim/", "rollout/", "meta/", "train/")
"""Prefixes of metrics, causes before their effects: the first non-finite one is named."""


class DivergedError(MetarobotError):
    """A training met a number that is not finite."""


class FiniteCheck:
    """Runs iterations of a training, and stops it at the first number that is not finite."""

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self._skipped_steps = 0
        """Iterations in a row without a finite gradient."""

    def run(
        self, iterate: TrainingStep, iteration: int, progress: float, seed: int
    ) -> tuple[int, dict[str, float]]:
        """Run one iteration; then check its metrics, all weights and all statistics.

        Takes what a ``TrainingStep`` takes, and returns what it returns.

        Raises:
            DivergedError: One of them is not finite.
        """
        try:
            steps, metrics = iterate(iteration, progress, seed)
        except DivergedError as e:
            raise DivergedError(f"iteration {iteration + 1}: {e}; {KEPT}") from e
        except torch.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError, MetarobotError) as e:
            # Solvers, distributions and checks of collapse refuse NaN in their own words.
            what = first_non_finite(learner_tensors(self._learner))
            if what is None and any(words in str(e) for words in _REFUSED_NUMBERS):
                what = str(e).strip().splitlines()[0][:_MAX_REASON_LENGTH]
            if what is None:
                raise
            raise _diverged(what, iteration) from e

        what = self._first_non_finite_metric(metrics)
        if what is None:
            what = first_non_finite(learner_tensors(self._learner))
        if what is not None:
            raise _diverged(what, iteration)
        return steps, metrics

    def _first_non_finite_metric(self, metrics: Mapping[str, float]) -> str | None:
        """Describe the first metric that is not finite, causes before effects."""
        non_finite = [name for name, value in metrics.items() if not math.isfinite(value)]

        # A step that was not taken changed no weights, which are checked for themselves. Its losses
        # are reported, but training goes on; not for ever, since it learns nothing meanwhile.
        is_skipped = any(name in GRADIENT_METRICS for name in non_finite)
        self._skipped_steps = self._skipped_steps + 1 if is_skipped else 0
        if is_skipped and self._skipped_steps <= MOST_SKIPPED_STEPS:
            non_finite = [name for name in non_finite if not name.startswith("train/")]

        if not non_finite:
            return None
        name = min(non_finite, key=_metric_rank)
        return f"metric {name} is {metrics[name]}"


def _diverged(what: str, iteration: int) -> DivergedError:
    return DivergedError(f"iteration {iteration + 1}: {what}: training diverged; {REMEDY}; {KEPT}")


def _metric_rank(name: str) -> int:
    for rank, prefix in enumerate(_METRIC_ORDER):
        if name.startswith(prefix):
            return rank
    return len(_METRIC_ORDER)


def first_non_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Describe the first tensor that holds NaN or an infinity; None if all are finite.

    All tensors of a device and type are reduced together, and read back once.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel() > 0:
            groups.setdefault((tensor.device, tensor.dtype), []).append(name)

    broken: set[str] = set()
    for names in groups.values():
        # max |x| is NaN or infinite exactly if an element is, and cannot overflow as a sum can
        largest = torch._foreach_norm([tensors[name].detach() for name in names], math.inf)
        is_finite = torch.stack(list(largest)).isfinite().tolist()
        broken.update(name for name, finite in zip(names, is_finite, strict=True) if not finite)

    for name in tensors:
        if name in broken:
            values = tensors[name].detach()
            bad = values[~values.isfinite()]
            return f"{name} is {float(bad[0])} in {len(bad)} of {values.numel()} places"
    return None


def learner_tensors(learner: Stateful) -> dict[str, Tensor]:
    """Return the learner's own weights, statistics and moments, under names that say which.

    Nothing is copied, so this is cheap, unlike ``Learner.state``. Stored trials are not among them.
    """
    tensors: dict[str, Tensor] = {}
    places: set[tuple[int, torch.Size]] = set()
    for name, tensor in _held_tensors(learner, ""):
        # an agent is held by its learner, among its modules, and by the optimiser
        place = (tensor.data_ptr(), tensor.shape)
        if place not in places:
            places.add(place)
            tensors[name] = tensor
    return tensors


def _held_tensors(held: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of modules, of optimisers, and of learners in a learner."""
    if isinstance(held, nn.Module):
        yield from ((f"{name}.{key}", value) for key, value in held.state_dict().items())
    elif isinstance(held, torch.optim.Optimizer):
        parameters = [p for group in held.param_groups for p in group["params"]]
        for i, parameter in enumerate(parameters):
            yield f"{name}.{i}", parameter
            for key, value in held.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    yield f"{name}.{i}.{key}", value
    elif isinstance(held, dict):
        for key, value in held.items():
            yield from _held_tensors(value, f"{name}.{key}")
    elif isinstance(held, Stateful):
        # the trained agent first: its names are the best known
        members = sorted(vars(held).items(), key=lambda item: item[0] != "agent")
        for key, value in members:
            yield from _held_tensors(value, f"{name}.{key}" if name else key)


def finite_state(learner: Stateful) -> dict[str, Tensor]:
    """Return ``learner.state()``, for a checkpoint.

    Stored trials may hold anything where an episode was shorter, so they are not checked.

    Raises:
        DivergedError: Another tensor is not finite.
    """
    state = learner.state()
    checked = {key: value for key, value in state.items() if not key.startswith(REPLAY_PREFIX)}
    name = first_non_finite(checked)
    if name is not None:
        raise DivergedError(f"{name}: training diverged; {REMEDY}; {KEPT}")
    return state


def check_finite_weights(where: str, tensors: Mapping[str, Tensor]) -> None:
    """Check the tensors of a checkpoint, before they act, are evaluated or are written.

    Args:
        where: What holds them, for the message.
        tensors: Name -> tensor.

    Raises:
        DivergedError: One is not finite.
    """
    name = first_non_finite(tensors)
    if name is not None:
        raise DivergedError(f"{where} holds an agent that diverged: {name}; {REMEDY}")


# ---------------------------------------------------------------------------------------------
# Collected trials
# ---------------------------------------------------------------------------------------------


def valid_trials(trials: Trials) -> Trials:
    """Check trials before anything is learned from them, and charge for faulted episodes.

    Returns:
        The trials; those without a fault unchanged. See ``charge_faults``.

    Raises:
        DivergedError: A collected number is not finite, or the physics broke down in all episodes.
    """
    for k, episode in enumerate(trials.episodes, start=1):
        first = _first_broken_field(episode)
        if first is not None:
            remedy = REMEDY if first.startswith("action") else CHECK_FAMILY
            raise DivergedError(f"{first} of episode {k}: {remedy}")

    faults = trials.faults()
    if faults == 0:
        return trials
    if faults == sum(len(episode.faulted) for episode in trials.episodes):
        raise DivergedError(f"the physics broke down in all {faults} episodes: {CHECK_FAMILY}")
    return charge_faults(trials)


def _first_broken_field(episode: Rollout) -> str | None:
    """Describe the first collected number that is not finite, as the steps came; None if all are.

    What an agent observes comes before how it acts on that, and that before the reward.
    """
    first: tuple[int, str] | None = None
    for name in ("obs", "action", "reward"):
        values: Tensor = getattr(episode, name)
        if bool(values[episode.valid].isfinite().all()):
            continue
        is_valid = episode.valid.view(*episode.valid.shape, *[1] * (values.dim() - 2))
        place = (~values.isfinite() & is_valid).nonzero()[0].tolist()
        step, world, *element = place
        if first is not None and first[0] <= step:
            continue
        label = _field_label(episode, name, element)
        first = step, f"{label} is {float(values[tuple(place)])} in world {world} at step {step}"
    return None if first is None else first[1]


def _field_label(episode: Rollout, name: str, element: list[int]) -> str:
    """Name an element of an observation or an action, or a reward with its broken terms."""
    if element:
        return f"{'observation' if name == 'obs' else name} {element[0]}"
    terms = [key for key, sums in episode.terms.items() if not bool(sums.isfinite().all())]
    return f"{name} ({', '.join(terms)})" if terms else name


def charge_faults(trials: Trials) -> Trials:
    """Lower the last reward of every faulted episode until its return is the worst of the others.

    Where the physics broke down, the environment ends the episode with a reward of 0. In a family
    of negative rewards that would be the best outcome, and agents would learn to break the physics;
    so would they where a robot that is flung away earns much before. No return is raised.
    """
    returns = trials.returns()
    sound = torch.stack([~episode.faulted for episode in trials.episodes])
    worst = returns[sound].min()

    episodes = []
    for episode, episode_returns in zip(trials.episodes, returns, strict=True):
        worlds = episode.faulted.nonzero()[:, 0]
        last_step = episode.valid.sum(0)[worlds] - 1
        reward = episode.reward.clone()
        reward[last_step, worlds] -= (episode_returns[worlds] - worst).clamp_min(0.0)
        episodes.append(replace(episode, reward=reward))
    return replace(trials, episodes=tuple(episodes))


def mean_sound_returns(trials: Trials) -> Tensor:
    """Return the mean return of each episode over the worlds in which it did not fault.

    Returns:
        ``(episode,)``; NaN for an episode that faulted in every world.
    """
    returns = trials.returns()
    if trials.faults() == 0:
        return returns.mean(1)
    sound = torch.stack([~episode.faulted for episode in trials.episodes])
    return torch.where(sound, returns, 0.0).sum(1) / sound.sum(1)
