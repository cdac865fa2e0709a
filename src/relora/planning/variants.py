"""Settings that a plan may change: base, activation checkpointing, micro-batch and rank."""

from typing import Any

from relora.config import RunConfig, parse_config

CHECKPOINTING = ("none", "selective", "full")
"""Kinds of activation checkpointing, from the fastest to the one that takes least memory."""
BASES = ("fp32", "bf16", "int8")
"""Ways to store frozen weights."""


def bases_for(config: RunConfig) -> tuple[str, ...]:
    """Return the ways to store frozen weights; those that move in every step (`lowrank.residual`) must be exact."""
    return BASES[:1] if config.lowrank.residual.scale else BASES


def halved_ranks(r: int) -> tuple[int, ...]:
    """Return r, and halves of it down to 8."""
    return (r, *(r >> times for times in range(1, r.bit_length()) if r >> times >= 8))


def with_changes(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """Return the configuration with other values, checked again.

    Args:
        changes: key -> value; the value of a section is a dict with the keys to change in it.

    Raises:
        UserError: the changed configuration is not valid.
    """
    tree = config.model_dump(mode="json", exclude_none=True)
    for key, value in changes.items():
        tree[key] = {**tree[key], **value} if isinstance(value, dict) else value
    return parse_config(tree)
