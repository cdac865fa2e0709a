"""Keyed random draws: the seed of a draw is a function of (run seed, purpose, position), not of earlier draws.

Therefore a run continues bit for bit after a kill without any saved generator state, and ranks draw the same numbers
without communication.
"""

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def keyed_seed(seed: int, *key: str | int) -> int:
    """Return a 63-bit seed for the draw named by `key`, e.g. `keyed_seed(0, "redraw", 3, "layers.0.q_proj")`."""
    text = "\x1f".join(str(part) for part in (seed, *key))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def keyed_generator(seed: int, *key: str | int) -> "torch.Generator":
    """Return a generator for the draw named by `key`, on the CPU, so that runs on all devices draw the same numbers."""
    import torch  # imported here so that worker processes that only tokenize do not load torch

    return torch.Generator().manual_seed(keyed_seed(seed, *key))
