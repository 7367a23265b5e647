"""The base class of all errors that a user can correct.

It imports nothing, so that the robot side can use it too.
"""

from __future__ import annotations


class MetarobotError(Exception):
    """A mistake that the user can correct: one line names the bad value and what would be right."""
