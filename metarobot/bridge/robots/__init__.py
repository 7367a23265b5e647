"""Robot drivers: one file for each kind of robot, found by name in ``lookup``."""

from metarobot._moved import moved_names

__getattr__ = moved_names(__name__, "metarobot.bridge.robots.lookup")
