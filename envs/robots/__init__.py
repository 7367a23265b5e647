"""Robot models and how they are driven."""
