"""Speed and memory: what an environment and an agent reach, beside what they could reach."""
