"""The training loop and its parts: schedule, step, optimizer, decisions, checkpoints, recovery."""
