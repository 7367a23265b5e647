"""The step loop, its backends, and environments for Gymnasium and Stable-Baselines3."""

from typing import NoReturn

_NEW_PLACES = {
    "Env": "metarobot.env.base.Env",
    "Step": "metarobot.env.base.StepResult",
    "Control": "metarobot.tasks.family.ActionController",
    "Family": "metarobot.tasks.family.Family",
    "State": "metarobot.tasks.family.WorldState",
    "Tally": "metarobot.tasks.family.EpisodeStatistics",
    "families": "metarobot.tasks.family.families",
    "family_on": "metarobot.tasks.family.family_on",
    "TaskModels": "metarobot.tasks.task_models.TaskModels",
}
"""Names of the former module ``metarobot.env``; the hints go with the next release."""


def __getattr__(name: str) -> NoReturn:
    """Name the new place of what was moved from here."""
    if name in _NEW_PLACES:
        raise ImportError(f"metarobot.env.{name} is {_NEW_PLACES[name]} now: import from there")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
