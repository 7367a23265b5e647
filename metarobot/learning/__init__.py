"""Parts that learning algorithms share: networks, memories, losses, and the agent's interface."""
