"""Training around an objective: schedules, optimizer, state, checkpoints, metrics and the loop."""
