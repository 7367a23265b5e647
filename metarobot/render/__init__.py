"""Pictures and videos of simulated worlds."""
