"""The loop and what it stands on: schedule, step, optimizer, checkpoints."""
