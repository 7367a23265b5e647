"""Collecting trials, training, run folders."""
