"""The root of all errors that a user can mend; it needs no package, so that the robot side has it
too.
"""

from __future__ import annotations


class MetarobotError(Exception):
    """A mistake the user can mend: one line that names the bad value and what would be right."""
