"""Every random draw is keyed: its seed is a function of (run seed, purpose, position), never of what was drawn before.

That is what lets a run continue bit for bit after a kill without saving any generator, and lets ranks agree without
talking.
"""

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def keyed_seed(seed: int, *key: str | int) -> int:
    """A 63-bit seed for the draw named by `key`, e.g. `keyed_seed(0, "redraw", 3, "layers.0.q_proj")`."""
    text = "\x1f".join(str(part) for part in (seed, *key))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def keyed_generator(seed: int, *key: str | int) -> "torch.Generator":
    """A CPU generator for the draw named by `key`; CPU, so that every device draws the same numbers."""
    import torch  # here, so that worker processes that only tokenize need not load torch

    return torch.Generator().manual_seed(keyed_seed(seed, *key))
