"""Keyed sampling: shuffling without memory, mixing sources by weight, holding documents out."""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from relora.data.pretraining.shards import PreparedFolder
from relora.errors import UserError
from relora.seeding import keyed_seed

BLOCK = 10_000
"""Sequences per block of a mixture."""


ROUNDS = 6
"""Feistel rounds: four look random, two more cost microseconds and help tiny domains."""


Int64Array = npt.NDArray[np.int64]


def permute(positions: Int64Array, size: int, key: int) -> Int64Array:
    """A keyed bijection of range(size) onto itself, elementwise, [n] -> [n]; no memory beyond its argument.

    A Feistel network permutes 0 .. 4^h - 1, the smallest such range that holds `size` (less than 4 times too
    large, h >= 1); a value that lands outside is sent through again until it lands inside, which it must, since
    it walks along a cycle of the network's permutation that holds the position it came from.
    """
    half = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
    mask = (np.uint64(1) << half) - np.uint64(1)
    round_keys = [np.uint64(keyed_seed(key, "round", number)) for number in range(ROUNDS)]
    values = positions.astype(np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        left, right = values[outside] >> half, values[outside] & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right + round_key) & mask)
        values[outside] = (left << half) | right
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014): each input bit moves every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _block_shares(sources: Sequence[tuple[PreparedFolder, float]]) -> Int64Array:
    """Sequences of each source in a block, [sources], by largest remainder; one source needs no mixing."""
    if len(sources) == 1:
        return np.ones(1, dtype=np.int64)
    weights = np.array([weight for _, weight in sources], dtype=np.float64)
    quotas: npt.NDArray[np.float64] = weights / weights.sum() * BLOCK
    shares: Int64Array = np.floor(quotas).astype(np.int64)
    by_remainder = np.argsort(shares - quotas, kind="stable")
    shares[by_remainder[: BLOCK - int(shares.sum())]] += 1
    for (folder, weight), share in zip(sources, shares.tolist(), strict=True):
        if share == 0:
            raise UserError(
                f"{folder.path}: weight {weight} is less than 1 in {BLOCK} of the whole; raise it or drop it"
            )
    return shares


def _spread(shares: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Lay out a block with each source's slots evenly: slot -> source, slot -> rank within its source."""
    source = np.repeat(np.arange(len(shares)), shares)
    rank = np.concatenate([np.arange(share) for share in shares])
    order = np.argsort((rank + 0.5) / shares[source], kind="stable")
    return source[order], rank[order]


DRAWS = 1 << 64
"""A document's draw is an integer below this."""


class SplitRule:
    """Which documents are validation: those whose draw is below `threshold`."""

    def __init__(self, seed: int, threshold: int) -> None:
        self._key = keyed_seed(seed, "validation").to_bytes(8, "big")
        self.threshold = threshold

    def draw(self, text: str) -> int:
        """A uniform integer below DRAWS, a function of the text and the seed alone."""
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=self._key).digest(), "big")

    def is_validation(self, text: str) -> bool:
        """On which side a document is."""
        return self.draw(text) < self.threshold
