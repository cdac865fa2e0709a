"""A run folder on disk: which process may write it, its settings, and the machine that it ran on."""
