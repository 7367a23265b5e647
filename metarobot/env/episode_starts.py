"""How episodes start: the joint state, the variant, and the noise of the observations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import mujoco
import numpy as np
import torch
from torch import Tensor

from metarobot.tasks.family import Family


class EpisodeStart(NamedTuple):
    """Where episodes start, one row for each world that was asked for."""

    qpos: Tensor
    """Joint positions ``(world, nq)``."""
    qvel: Tensor
    """Joint velocities ``(world, nv)``."""
    variant: Tensor
    """Which of the family's variants each episode is ``(world,)``, int64."""


class StartSource(Protocol):
    """Draws what is random in an environment, all of it keyed by the environment's seed."""

    def set_models(self, models: Sequence[mujoco.MjModel], ids: Sequence[int]) -> None:
        """Note that the worlds ``ids`` are now on these models."""

    def draw(self, seed: int, ids: Sequence[int], episodes: Sequence[int]) -> EpisodeStart:
        """Draw the starts of worlds ``ids`` for their episodes of these numbers."""

    def noise(self, elapsed: Tensor) -> Tensor:
        """Return the noise ``(world, noisy)`` of observations made ``elapsed`` steps after a start.

        It is uniform within the family's amplitudes, for those observations alone that have noise.
        """


class WorldStarts:
    """Draws from one random stream a world and episode, keyed by (seed, world id, episode).

    What happens in one world therefore never changes another world's starts or noise.
    """

    def __init__(
        self, family: Family, models: Sequence[mujoco.MjModel], world_ids: Sequence[int]
    ) -> None:
        self._family = family
        self._models = list(models)
        self._world_ids = world_ids

        amplitude = torch.tensor(family.interaction.noise)
        self._amplitude = amplitude[amplitude != 0]
        # The observation at the start has noise too: one more than there are steps.
        self._noise = torch.zeros(len(models), family.horizon + 1, len(self._amplitude))
        self._rows = torch.arange(len(models))

    def set_models(self, models: Sequence[mujoco.MjModel], ids: Sequence[int]) -> None:
        """Note that the worlds ``ids`` are now on these models."""
        for world, model in zip(ids, models, strict=True):
            self._models[world] = model

    def draw(self, seed: int, ids: Sequence[int], episodes: Sequence[int]) -> EpisodeStart:
        """Draw the starts of worlds ``ids``, and the noise of their whole episodes."""
        interaction = self._family.interaction
        qpos = []
        qvel = []
        variants = []
        for world, episode in zip(ids, episodes, strict=True):
            stream = np.random.Philox(
                key=[seed, self._world_ids[world]], counter=[0, 0, 0, int(episode)]
            )
            rng = np.random.Generator(stream)

            # The order of the draws decides what a seed gives: start, noise, variant.
            start_qpos, start_qvel = self._family.start(rng, self._models[world])
            qpos.append(start_qpos)
            qvel.append(start_qvel)

            if interaction.noise:
                noise = self._noise[world]
                rng.random(dtype=np.float32, out=noise.numpy())
                noise.mul_(2).sub_(1).mul_(self._amplitude)

            has_variants = interaction.variants > 1
            variants.append(int(rng.integers(interaction.variants)) if has_variants else 0)

        return EpisodeStart(
            torch.from_numpy(np.stack(qpos)),
            torch.from_numpy(np.stack(qvel)),
            torch.tensor(variants),
        )

    def noise(self, elapsed: Tensor) -> Tensor:
        """Return the noise ``(world, noisy)`` drawn at the starts for this step."""
        return self._noise[self._rows, elapsed]
