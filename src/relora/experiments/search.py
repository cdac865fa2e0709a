"""Search over learning rates: which runs to make, and which rate is the best. This module trains nothing itself.

Successive halving (Jamieson & Talwalkar 2016, arXiv 1502.07943):

    4 rates for 1/4 of the run    ->    the best 2 of them go on to its end    ->    the best of these

Each round has half the rates of the round before, whose runs go on; the last round has two rates and ends their runs.
If the best rate of a round is the lowest or highest that was tried, a better one may lie beyond it, so the round tries
one more rate there, at most two in a whole search. The price: a rate that is better late in a run only is lost early.

`relora tune` decides otherwise who goes on (`tune.rungs`): there nobody waits for a round to be full. Here a round has
to be, since its edges are known only then, and since every method is to get the same runs whichever ends first.
"""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass

SHORTEST = 0.25
"""Share of the whole run after which the first round measures."""
MOST_BEYOND = 2
"""Rates beyond the given ones that one search may try."""


@dataclass(frozen=True)
class Trial:
    """A run that a search asks for."""

    rate: float
    length: float
    """Share of the whole run after which it is measured."""


@dataclass(frozen=True)
class Choice:
    """The result of a search."""

    rate: float
    at_edge: bool
    """Whether the rate is the lowest or highest that was tried, so a better one may lie beyond it."""


Search = Generator[list[Trial], list[float], Choice]
"""A search yields trials, is sent their losses in the same order (not finite: diverged), and returns its choice."""


def lengths_of(rates: int) -> list[float]:
    """Return the run length of each round of a search among so many rates: from SHORTEST to 1, by equal factors."""
    rounds = max(1, (rates - 1).bit_length())  # 1 or 2 rates: 1 round; 3 or 4: 2; 5 to 8: 3
    return [SHORTEST ** ((rounds - 1 - n) / max(1, rounds - 1)) for n in range(rounds)]


def halving(rates: Sequence[float], *, most_beyond: int = MOST_BEYOND) -> Search:
    """Search among `rates` by successive halving; a single rate gets one full-length run and is chosen."""
    tried = sorted(set(rates))
    left_beyond = most_beyond if len(tried) > 1 else 0
    running, best = list(tried), tried[0]
    for length in lengths_of(len(tried)):
        losses = yield from _losses(running, length)
        best = best_rate(losses)
        while left_beyond and best in (tried[0], tried[-1]):
            beyond = _beyond(tried, best)
            tried = sorted([*tried, beyond])
            left_beyond -= 1
            losses |= yield from _losses([beyond], length)
            best = best_rate(losses)
        running = _ranking(losses)[: math.ceil(len(running) / 2)]
    return Choice(best, at_edge=len(tried) > 1 and best in (tried[0], tried[-1]))


def best_of(rates: Sequence[float]) -> Search:
    """Search among `rates` by a full-length run of each."""
    losses = yield from _losses(sorted(set(rates)), 1.0)
    best = best_rate(losses)
    return Choice(best, at_edge=len(losses) > 1 and best in (min(losses), max(losses)))


def run_searches(
    searches: Mapping[str, Search], losses_of: Callable[[list[tuple[str, Trial]]], list[float]]
) -> dict[str, Choice]:
    """Run several searches side by side, round by round, and return their choices by name.

    Args:
        losses_of: takes (name of the search, trial) pairs, all that the searches ask for at a time, and returns their
            losses.
    """
    asked = {name: next(search) for name, search in searches.items()}
    choices: dict[str, Choice] = {}
    while asked:
        pairs = [(name, trial) for name, trials in asked.items() for trial in trials]
        losses = dict(zip(pairs, losses_of(pairs), strict=True))
        asked_next = {}
        for name, trials in asked.items():
            try:
                asked_next[name] = searches[name].send([losses[name, trial] for trial in trials])
            except StopIteration as end:
                choices[name] = end.value
        asked = asked_next
    return {name: choices[name] for name in searches}


def best_rate(losses: Mapping[float, float]) -> float:
    """Return the rate with the lowest loss; among equals, or if all runs diverged, the lowest rate.

    Args:
        losses: rate -> loss; a loss that is not finite means that the run diverged.
    """
    return _ranking(losses)[0]


def _losses(rates: list[float], length: float) -> Generator[list[Trial], list[float], dict[float, float]]:
    """Ask for one run of each rate and return rate -> loss."""
    losses = yield [Trial(rate, length) for rate in rates]
    return dict(zip(rates, losses, strict=True))


def _ranking(losses: Mapping[float, float]) -> list[float]:
    """Sort rates from the lowest loss to the highest, diverged runs last; equal ones by rate."""
    return sorted(losses, key=lambda rate: (losses[rate] if math.isfinite(losses[rate]) else math.inf, rate))


def _beyond(tried: Sequence[float], edge: float) -> float:
    """Return the rate one step of the grid beyond its edge, rounded to three digits so that a person can type it."""
    inner = tried[1] if edge == tried[0] else tried[-2]
    return float(f"{edge * edge / inner:.3g}")
