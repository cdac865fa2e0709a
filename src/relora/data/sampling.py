"""Sampling whose every choice is a pure function of a key and a position: order, mixture and held-out documents.

    permute                    the order of an epoch: a keyed permutation of any size, computed element by element
    spread, keyed_sample       held-out measurements: some of many items, evenly spread over all
    block_shares, block_slots  a mixture: how many sequences of each source a block has, and in which places
    SplitRule                  held-out data: a keyed hash of a text decides on which side it is

Nothing is drawn from a generator, so there is no state to save: a run resumes from its step number alone, and the
choices are the same for any number of workers.

`permute` is a Feistel network with cycle-walking (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
It needs no memory, where a shuffled list would need 8 bytes per element. The price of the mixture: a weight is
realised to 1 in `BLOCK`.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from relora.errors import UserError
from relora.seeding import keyed_seed

Int64Array = npt.NDArray[np.int64]

# The order of an epoch

ROUNDS = 6
"""Rounds of the Feistel network. Four already look random; two more cost microseconds and help with tiny sizes."""


def permute(positions: Int64Array, size: int, key: int) -> Int64Array:
    """Map positions to their places in a keyed permutation of range(size), elementwise, [n] -> [n].

    A Feistel network with halves of h bits permutes 0 .. 4^h - 1; h >= 1 is chosen as the smallest for which this
    range contains range(size), so it is less than 4 times too large. A value that leaves range(size) is put through
    the network again until it is back inside. It must come back, because the values visited form a cycle of the
    network's permutation, and that cycle contains the position where it began.

    Args:
        positions: integers in range(size).
        size: number of elements that are permuted.
        key: selects the permutation.
    """
    half_bits = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    round_keys = [np.uint64(keyed_seed(key, "round", number)) for number in range(ROUNDS)]
    values = positions.astype(np.uint64)
    outside = np.arange(len(values))  # indices of the values that still have to be put through the network
    while len(outside):
        left, right = values[outside] >> half_bits, values[outside] & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix_bits(right + round_key) & mask)
        values[outside] = (left << half_bits) | right
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


def _mix_bits(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Apply the finalizer of splitmix64 (Steele, Lea and Flood 2014): every input bit affects every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


# The sample of a held-out measurement


def spread(count: int, size: int, key: int) -> Int64Array:
    """Draw `count` of range(`size`) at equal distances, in ascending order, [count]: a systematic sample.

    Element i is floor((i + u) size / count), with one keyed u in [0, 1), so there is one of each of `count` equal
    stretches (Cochran, "Sampling Techniques", 1977, chapter 8). Neighbours in a text resemble each other, and such a
    sample has some of every document; one drawn at random has much of one stretch and none of another.

    Args:
        count: at most `size`.
        size: number of elements that are drawn from.
        key: selects the sample, of which there are at most `size`.
    """
    drawn: Int64Array = (np.arange(count, dtype=np.int64) * size + key % size) // count
    return drawn


def keyed_sample(sizes: Int64Array, most: int, key: int) -> Int64Array:
    """Draw items, evenly spread over their order, whose sizes together do not exceed `most`.

    Args:
        sizes: size of each item; those of size 0 do not count.
        most: bound of the sum of the sizes.
        key: selects the sample.

    Returns:
        The numbers of the drawn items in ascending order: all items if they do not exceed `most` together, and at
        least one whose size is not 0.
    """
    total = int(sizes.sum())
    if total <= most:
        return np.arange(len(sizes))
    items = np.flatnonzero(sizes)
    count = max(1, len(items) * most // total)
    drawn = items[spread(count, len(items), key)]
    while count > 1 and (found := int(sizes[drawn].sum())) > most:
        count = max(1, min(count - 1, count * most // found))
        drawn = items[spread(count, len(items), key)]
    return drawn


# The mixture of several sources

BLOCK = 10_000
"""Sequences per block of a mixture; every block has the same number of sequences of each source."""


def block_shares(weighted_sources: Sequence[tuple[str, float]]) -> Int64Array:
    """Return how many sequences of each source are in a block, [sources], rounded by largest remainder.

    A single source needs no mixing: its block has one sequence.

    Args:
        weighted_sources: (name for messages, weight relative to the other sources) of each source.

    Raises:
        UserError: a weight is so small that its source would have no sequence.
    """
    if len(weighted_sources) == 1:
        return np.ones(1, dtype=np.int64)
    shares = apportion([weight for _, weight in weighted_sources], BLOCK)
    for (name, weight), share in zip(weighted_sources, shares.tolist(), strict=True):
        if share == 0:
            raise UserError(f"{name}: weight {weight} is less than 1 in {BLOCK} of the whole; raise it or drop it")
    return shares


def apportion(weights: Sequence[float], total: int) -> Int64Array:
    """Divide `total` into whole numbers in proportion to weights, rounded by largest remainder, [weights]."""
    quotas: npt.NDArray[np.float64] = np.array(weights, dtype=np.float64) / np.sum(weights, dtype=np.float64) * total
    shares: Int64Array = np.floor(quotas).astype(np.int64)
    by_remainder = np.argsort(shares - quotas, kind="stable")
    shares[by_remainder[: total - int(shares.sum())]] += 1
    return shares


def block_slots(shares: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Distribute the sequences of each source evenly over the slots of a block.

    Args:
        shares: sequences of each source in a block, [sources].

    Returns:
        The source of each slot, and how many earlier slots of the block have the same source; both [slots].
    """
    source = np.repeat(np.arange(len(shares)), shares)
    rank = np.concatenate([np.arange(share) for share in shares])
    order = np.argsort((rank + 0.5) / shares[source], kind="stable")
    return source[order], rank[order]


# Held-out documents

DRAWS = 1 << 64
"""The number of values that the hash of a text can have."""


class SplitRule:
    """Decide which texts are held out: those whose keyed hash is below `threshold`.

    The choice depends on the text and the seed only, not on the order of the texts, and equal texts are always on the
    same side.

    Args:
        seed: keys the hash.
        threshold: share of held-out texts times `DRAWS`.
    """

    def __init__(self, seed: int, threshold: int) -> None:
        self._key = keyed_seed(seed, "validation").to_bytes(8, "big")
        self.threshold = threshold

    def draw(self, text: str) -> int:
        """Return the hash of a text: an integer in range(DRAWS), uniformly distributed."""
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=self._key).digest(), "big")

    def is_held_out(self, text: str) -> bool:
        """Return whether a text is held out."""
        return self.draw(text) < self.threshold
