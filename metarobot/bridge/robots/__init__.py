"""Drivers: one file a kind of robot."""
