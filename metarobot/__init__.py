"""Meta-train an agent once over a distribution of situations; it adapts to a new one within a few episodes."""
