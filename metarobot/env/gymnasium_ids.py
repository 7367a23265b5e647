"""Gymnasium ids of task families, registered without importing a family or torch."""

from __future__ import annotations

from collections.abc import Iterable


def register_gymnasium_ids(families: Iterable[str]) -> None:
    """Register each family as ``metarobot/<Name>-v0``; without Gymnasium, do nothing."""
    try:
        import gymnasium
    except ImportError:  # a robot does without it
        return

    for name in families:
        gymnasium_id = f"metarobot/{name}-v0"
        if gymnasium_id not in gymnasium.registry:
            gymnasium.register(
                gymnasium_id,
                entry_point="metarobot.env.gymnasium_envs:GymEnv",
                vector_entry_point="metarobot.env.gymnasium_envs:GymVecEnv",
                kwargs={"family": name},
            )
