"""What varies from task to task, and from there to a compiled model."""
