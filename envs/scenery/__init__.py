"""Surroundings of the robots: ground and objects."""
