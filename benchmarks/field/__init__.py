"""Low-rank pretraining methods from the literature, for benchmarks/field.py."""
