"""What varies from task to task, and from there to a compiled model."""

from metarobot._moved import moved_names

__getattr__ = moved_names(
    __name__, "metarobot.tasks.space", Few="SparseFaults", assignments="parse_assignments"
)
