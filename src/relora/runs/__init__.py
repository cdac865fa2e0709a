"""A run's folder on disk: who may write into it, its settings, its environment."""
