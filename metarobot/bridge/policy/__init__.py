"""The exported policy: its metadata, its check, and running it."""
