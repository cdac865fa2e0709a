"""Processes that are slower than the others: all wait for the slowest one at every step, so it is worth a name."""

from collections.abc import Sequence
from statistics import median

SLOW = 1.5
"""A rank is slow if it takes so many times as long as the median of the others."""
LOGS = 3
"""A rank is named after so many logged steps in a row in which it was slow."""


class Pace:
    """Observer of the time that each rank computes, apart from its waiting for others."""

    def __init__(self) -> None:
        self._slow: dict[int, int] = {}
        self._named: set[int] = set()

    def slow_ranks(self, seconds: Sequence[float]) -> dict[int, float]:
        """Note the computing time of each rank since the last logged step; return those to name, and how slow they are.

        A rank is returned once, with its time relative to the median of the others.
        """
        if len(seconds) < 2:
            return {}
        found = {}
        for rank, own in enumerate(seconds):
            others = median([other for number, other in enumerate(seconds) if number != rank])
            self._slow[rank] = self._slow.get(rank, 0) + 1 if own > SLOW * others > 0 else 0
            if self._slow[rank] == LOGS and rank not in self._named:
                self._named.add(rank)
                found[rank] = own / others
        return found
