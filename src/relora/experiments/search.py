"""Successive halving over learning rates: which runs to take, and which rate they speak for. It trains nothing itself.

    4 rates at 1/4 of the run    the better half of them at full length    the best of these

(Jamieson & Talwalkar 2016, arXiv 1502.07943.) Each round has half the rates of the one before and a longer part of the
run; the first has a quarter of it, the last two rates and all of it. A best rate at the edge of what was tried proves
little, so the round goes on beyond it, one step at a time. The price: a rate that only pays late is dropped early. A
shortened run has every period shortened alike, which takes the most of that away.
"""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass

SHORTEST = 0.25
"""Of a run: the first round."""
MOST_BEYOND = 2
"""Steps beyond the edges of the grid that one search may take."""


@dataclass(frozen=True)
class Trial:
    """One run that a search asks for."""

    rate: float
    length: float
    """Of the whole run, as a share."""


@dataclass(frozen=True)
class Choice:
    """What a search ends with."""

    rate: float
    at_edge: bool
    """Whether no rate beyond it, on one side, was tried: a better one may lie there."""


Search = Generator[list[Trial], list[float], Choice]
"""Yields trials, takes their losses in that order (not finite: diverged), and returns its choice."""


def lengths_of(rates: int) -> list[float]:
    """Of the rounds, from as many rates down to two: from SHORTEST to 1, each longer by the same factor."""
    rounds = max(1, (rates - 1).bit_length())  # 1, 2 -> 1; 3, 4 -> 2; 5 to 8 -> 3
    return [SHORTEST ** ((rounds - 1 - n) / max(1, rounds - 1)) for n in range(rounds)]


def halving(rates: Sequence[float], *, most_beyond: int = MOST_BEYOND) -> Search:
    """Search among `rates` by successive halving; a single rate is taken as it is."""
    tried = sorted(set(rates))
    left = most_beyond if len(tried) > 1 else 0
    running, best = list(tried), tried[0]
    for length in lengths_of(len(tried)):
        losses = yield from _scores(running, length)
        best = _ranking(losses)[0]
        while left and best in (tried[0], tried[-1]):
            beyond = _beyond(tried, best)
            tried, left = sorted([*tried, beyond]), left - 1
            losses |= yield from _scores([beyond], length)
            best = _ranking(losses)[0]
        running = _ranking(losses)[: math.ceil(len(running) / 2)]
    return Choice(best, at_edge=len(tried) > 1 and best in (tried[0], tried[-1]))


def best_of(rates: Sequence[float]) -> Search:
    """Search among `rates` by a full run of each."""
    losses = yield from _scores(sorted(set(rates)), 1.0)
    best = _ranking(losses)[0]
    return Choice(best, at_edge=len(losses) > 1 and best in (min(losses), max(losses)))


def run_searches(
    searches: Mapping[str, Search], score: Callable[[list[tuple[str, Trial]]], list[float]]
) -> dict[str, Choice]:
    """Drive searches by name side by side, so that what they ask for at the same time is run together.

    Args:
        score: (search, trial) pairs -> their losses.
    """
    asked = {name: next(search) for name, search in searches.items()}
    choices: dict[str, Choice] = {}
    while asked:
        pairs = [(name, trial) for name, trials in asked.items() for trial in trials]
        losses = dict(zip(pairs, score(pairs), strict=True))
        further = {}
        for name, trials in asked.items():
            try:
                further[name] = searches[name].send([losses[name, trial] for trial in trials])
            except StopIteration as end:
                choices[name] = end.value
        asked = further
    return {name: choices[name] for name in searches}


def _scores(rates: list[float], length: float) -> Generator[list[Trial], list[float], dict[float, float]]:
    losses = yield [Trial(rate, length) for rate in rates]
    return dict(zip(rates, losses, strict=True))


def _ranking(losses: Mapping[float, float]) -> list[float]:
    """Rates from the best on; of runs that all diverged the lowest rate comes first."""
    return sorted(losses, key=lambda rate: (losses[rate] if math.isfinite(losses[rate]) else math.inf, rate))


def _beyond(tried: Sequence[float], edge: float) -> float:
    """One step of the grid beyond its edge; three digits, so that it can be typed."""
    inner = tried[1] if edge == tried[0] else tried[-2]
    return float(f"{edge * edge / inner:.3g}")
