"""Subcommands that list what there is: families and agents."""

from __future__ import annotations

from metarobot import api
from metarobot.errors import MetarobotError


def families() -> None:
    """List the task families: what varies, over which ranges, and the splits tasks are drawn from.

    A split is named on the command line as ``--split``.
    """
    for name in api.families():
        family = api.family(name)
        print(name)
        print(f"  {family.doc}")
        print(f"  horizon {family.horizon} steps, {len(family.observations)} observations")
        for line in family.space.describe().splitlines():
            print(f"  {line}")
        print()


def agents() -> None:
    """List the kinds of agent that can be trained, and the trained agents in the box."""
    from metarobot.learning.agent_interface import agents as registry
    from metarobot.training.run_files import read_card
    from metarobot.training.run_folder import PRETRAINED_FOLDER, pretrained_names

    for name in api.agents():
        try:
            print(f"{name}: {registry.get(name).doc}")
        except MetarobotError as e:  # a package that it needs is not installed
            print(f"{name}: {e}")
    for name in pretrained_names():
        try:
            print(f"{name}: {read_card(PRETRAINED_FOLDER / name / 'card.json')['summary']}")
        except (MetarobotError, KeyError) as e:
            print(f"{name}: its card is damaged: {e}")
