"""Robot drivers: one file for each kind of robot, found by name in ``lookup``."""
