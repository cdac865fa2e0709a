"""The fastest configuration that fits: of micro-batch, activation checkpointing, base, and at last the rank.

Memory grows with the micro-batch, so the largest that fits is found by halving the list. What is kept from the user:
the method, the tokens of a step and, unless nothing else fits, the rank.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Candidate(NamedTuple):
    """What may be changed to make a run fit."""

    micro_sequences: int
    activation_checkpointing: str
    base: str
    r: int


class Fit(NamedTuple):
    """A candidate that fits."""

    candidate: Candidate
    peak: int
    """Bytes."""
    seconds: float
    """Of one low-rank step, or of a full-rank one where there is no other."""


def best_fit(
    cost: Callable[[Candidate], tuple[int, float]],
    limit: int,
    *,
    micro_sequences: Sequence[int],
    activation_checkpointing: Sequence[str],
    bases: Sequence[str],
    ranks: Sequence[int],
) -> Fit | None:
    """The fastest candidate whose peak is within `limit` bytes; None where not even the smallest is.

    Args:
        cost: peak in bytes, seconds of a step.
        micro_sequences: ascending.
        ranks: in the order in which they are tried; a lower one only where no candidate of those before fits.
    """
    for r in ranks:
        fits = []
        for base in bases:
            for checkpointing in activation_checkpointing:
                fit = _largest(cost, limit, micro_sequences, checkpointing, base, r)
                if fit is not None:
                    fits.append(fit)
        if fits:
            return min(fits, key=lambda fit: fit.seconds)
    return None


def _largest(
    cost: Callable[[Candidate], tuple[int, float]],
    limit: int,
    micro_sequences: Sequence[int],
    checkpointing: str,
    base: str,
    r: int,
) -> Fit | None:
    """That of the largest micro-batch that fits."""
    found, low, high = None, 0, len(micro_sequences)
    while low < high:  # those before `low` fit, those from `high` on do not
        middle = (low + high) // 2
        candidate = Candidate(micro_sequences[middle], checkpointing, base, r)
        peak, seconds = cost(candidate)
        if peak <= limit:
            found, low = Fit(candidate, peak, seconds), middle + 1
        else:
            high = middle
    return found
