"""Adapters: PEFT's format on disk, save and load, several at once, combine, merge, extract; LLaMA-Adapter."""
