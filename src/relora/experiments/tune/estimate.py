"""Estimate of the time that a search still takes: the parts of trials to come, by what parts have taken so far.

parts to come   those under way; promotions, by playing the search on: a trial to come is as likely the best one as any
                other; new trials; further seeds of the finalists
time of a part  so many seconds to start and to end its process, and so many for a whole run: fitted to what the
                trials have taken
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from relora.experiments.tune.rungs import Trial, is_pending, may_go_on, percent

WALL_SECONDS = "wall_seconds"
"""Figure of a trial: seconds that its parts have taken, start and end of their processes included."""
_PLAYS = 16


@dataclass(frozen=True, kw_only=True)
class Work:
    """Work that a search still has, and how it is done."""

    trials: int
    """Number of trials of the whole search."""
    rungs: Sequence[float]
    seeds: int = 1
    finalists: int = 0
    lanes: int = 1
    """Processes that work on the study, those of other workers included."""
    elapsed: dict[int, float] = field(default_factory=dict)
    """Number of a trial that runs -> seconds since its part began, as far as they are known."""


def seconds_left(trials: Sequence[Trial], work: Work) -> float | None:
    """Estimate the seconds until a search ends; None before any part has been timed."""
    costs = _costs(trials)
    if costs is None:
        return None
    each, whole = costs
    own = [trial for trial in trials if trial.repeats is None]
    under_way = []
    for trial in trials:
        if is_pending(trial, work.rungs):
            part = each + whole * (work.rungs[trial.target] - trial.share)
            under_way.append(max(part - work.elapsed.get(trial.number, part / 2), 0.0))
    arriving = _arriving(own, work)
    parts = [each + whole * (rung - before) for before, rung in pairwise((0.0, *work.rungs))]
    total = sum(under_way) + sum(count * part for count, part in zip(arriving, parts, strict=True))
    longest = max([part for count, part in zip(arriving, parts, strict=True) if count], default=0.0)
    if repeats := _repeats_left(trials, arriving[-1], work):
        total += repeats * (each + whole)
        longest = each + whole
    longest = max(longest, *under_way, 0.0)
    return total / work.lanes + longest * (1 - 1 / work.lanes) / 2  # at the end not every process has something to do


def seconds_per_token(trials: Sequence[Trial]) -> float | None:
    """Return the seconds of one process for each token that trials have trained on; None before any has been timed."""
    timed = [trial.figures for trial in trials if trial.figures.get(WALL_SECONDS) and trial.figures.get("tokens")]
    tokens = sum(figures["tokens"] for figures in timed)
    return sum(figures[WALL_SECONDS] for figures in timed) / tokens if tokens else None


def _costs(trials: Sequence[Trial]) -> tuple[float, float] | None:
    """Fit the seconds of a part and those of a whole run, neither below 0, to what trials have taken."""
    timed = [
        (len(trial.losses), trial.share, trial.figures[WALL_SECONDS])
        for trial in trials
        if trial.losses and not trial.diverged and trial.figures.get(WALL_SECONDS)
    ]
    if not timed:
        return None
    pp = sum(parts * parts for parts, _, _ in timed)
    ps = sum(parts * share for parts, share, _ in timed)
    ss = sum(share * share for _, share, _ in timed)
    pt = sum(parts * seconds for parts, _, seconds in timed)
    st = sum(share * seconds for _, share, seconds in timed)
    determinant = pp * ss - ps * ps
    each = (pt * ss - st * ps) / determinant if determinant > 1e-9 * pp * ss else 0.0  # one kind of part: all by share
    each = min(max(each, 0.0), pt / pp)
    return each, max(st - each * ps, 0.0) / ss


def _arriving(own: Sequence[Trial], work: Work) -> list[float]:
    """Return how many parts are still to begin for each rung: new trials, and promotions as they are to be expected."""
    new = max(work.trials - len(own), 0)
    played = [_played(own, work.rungs, new, random.Random(seed)) for seed in range(_PLAYS)]
    return [float(new), *(sum(counts) / _PLAYS for counts in zip(*played, strict=True))]


def _played(own: Sequence[Trial], rungs: Sequence[float], new: int, draws: random.Random) -> list[int]:
    """Play a search on and return how many trials are promoted to each rung after the first (see `rungs`).

    The loss of a trial that has not come to a rung yet takes a random place among those that have.
    """
    promoted, coming = [], new
    for index in range(len(rungs) - 1):
        coming += sum(is_pending(trial, rungs) and trial.target == index for trial in own)
        arrived = [trial for trial in own if percent(rungs[index]) in trial.losses]
        ranked = sorted(arrived, key=lambda trial: (trial.losses[percent(rungs[index])], trial.number))
        gone = [trial.target > index for trial in ranked if may_go_on(trial, index)]
        count = 0
        for arrival in range(coming + 1):  # the first turn promotes those that wait
            places = range(len(gone))
            if arrival:
                place = draws.randrange(len(gone) + 1)
                gone.insert(place, False)
            allowed = int((len(arrived) + arrival) * rungs[index] / rungs[index + 1] + 1e-9)
            if arrival:
                places = range(place, place + 1) if place < allowed else range(allowed - 1, allowed)
            for place in places:
                if 0 <= place < min(allowed, len(gone)) and not gone[place]:
                    gone[place], count = True, count + 1
        if gone and not gone[0]:  # nothing more can come, so the best one goes on
            count += 1
        promoted.append(count)
        coming = count
    return promoted


def _repeats_left(trials: Sequence[Trial], arriving: float, work: Work) -> float:
    """Return how many runs with further seeds are to be expected, if so many trials are still sent to their end."""
    last = len(work.rungs) - 1
    own = [trial for trial in trials if trial.repeats is None and not trial.diverged]
    finishing = sum(trial.state == "complete" or (trial.state == "running" and trial.target == last) for trial in own)
    begun = sum(trial.repeats is not None for trial in trials)
    return max(min(work.finalists, finishing + arriving) * (work.seeds - 1) - begun, 0.0)
