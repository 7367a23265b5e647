"""The step loop, its backends, and its faces for Gymnasium and Stable-Baselines3."""
