"""What robots meet: ground and objects."""
