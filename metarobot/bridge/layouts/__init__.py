"""Signal layouts: how a robot's readings become a policy's observations and reward."""
