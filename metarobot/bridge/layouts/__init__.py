"""From a robot's signals to a policy's observations and reward."""
