"""Batched physics behind one protocol."""
