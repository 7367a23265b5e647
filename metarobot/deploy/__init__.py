"""From a trained agent to a robot's controller, and the simulated robot."""
