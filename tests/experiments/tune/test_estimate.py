"""Time that a search still takes, against searches that are played to their end with a clock of their own."""

import heapq
import random
from dataclasses import replace
from statistics import fmean

import pytest

from relora.experiments.tune.estimate import WALL_SECONDS, Work, seconds_left, seconds_per_token
from relora.experiments.tune.rungs import Trial, is_pending, next_promotion, percent

Snapshot = tuple[float, list[Trial], dict[int, float]]


def played(work: Work, *, start: float, whole: float, seed: int) -> tuple[list[Snapshot], float]:
    """Play a search by the rules of `search`; return what its storage holds after each part, and how long it took.

    A part takes `start` seconds and its share of `whole`, with a tenth of noise; the losses of a trial are alike.
    """
    draws, rungs = random.Random(seed), work.rungs
    trials, running, began = list[Trial](), list[tuple[float, int]](), dict[int, float]()
    snapshots, now = list[Snapshot](), 0.0
    quality: dict[int, float] = {}

    def begin(trial: Trial) -> None:
        share = rungs[trial.target] - trial.share
        heapq.heappush(running, (now + (start + whole * share) * draws.uniform(0.9, 1.1), trial.number))
        began[trial.number] = now

    while True:
        while len(running) < work.lanes:
            own = [trial for trial in trials if trial.repeats is None]
            found = next_promotion(own, rungs, more_to_come=len(own) < work.trials)
            done = sorted((trial for trial in own if trial.state == "complete"), key=lambda one: quality[one.number])
            wanted = [(one.number, seed) for one in done[: work.finalists] for seed in range(1, work.seeds)]
            left = [one for one in wanted if one not in {(trial.repeats, trial.seed) for trial in trials}]
            if found is not None:
                trials[found.number] = replace(found, target=found.target + 1)
                begin(trials[found.number])
            elif len(own) < work.trials:
                quality[len(trials)] = draws.random()
                trials.append(Trial(len(trials), "running"))
                begin(trials[-1])
            elif left and not any(is_pending(trial, rungs) for trial in own):
                number, again = left[0]
                quality[len(trials)] = quality[number]
                trials.append(Trial(len(trials), "running", target=len(rungs) - 1, repeats=number, seed=again))
                begin(trials[-1])
            else:
                break
        if not running:
            return snapshots, now
        now, number = heapq.heappop(running)
        trial, share = trials[number], rungs[trials[number].target]
        seconds = trial.figures.get(WALL_SECONDS, 0.0) + now - began.pop(number)
        trials[number] = replace(
            trial,
            losses={**trial.losses, percent(share): quality[number] + draws.uniform(0, 0.2)},
            state="complete" if share == 1 else "running",
            figures={WALL_SECONDS: seconds, "tokens": 1000 * share},
        )
        snapshots.append((now, list(trials), {number: now - then for number, then in began.items()}))


SEARCHES = [
    Work(trials=24, rungs=(0.25, 0.5, 1.0)),
    Work(trials=24, rungs=(0.25, 0.5, 1.0), lanes=3),
    Work(trials=12, rungs=(0.5, 1.0), seeds=3, finalists=3, lanes=2),
    Work(trials=40, rungs=(1 / 9, 1 / 3, 1.0), lanes=4),
    Work(trials=8, rungs=(1.0,), seeds=2, finalists=2),
]


@pytest.mark.parametrize("work", SEARCHES, ids=lambda work: f"{work.trials}x{work.lanes}")
@pytest.mark.parametrize(("start", "whole"), [(0.0, 100.0), (20.0, 100.0)])
def test_what_is_left_is_what_the_rest_takes(work: Work, start: float, whole: float) -> None:
    errors = []
    for seed in range(12):
        snapshots, took = played(work, start=start, whole=whole, seed=seed)
        for at, trials, elapsed in snapshots[::4]:
            left = seconds_left(trials, replace(work, elapsed=elapsed))
            assert left is not None
            if len(trials) >= work.trials / 4:  # a quarter of the trials has begun
                errors.append((left - (took - at)) / took)
    assert abs(fmean(errors)) < 0.05  # of the whole search
    assert sorted(errors)[len(errors) // 10] > -0.15 and sorted(errors)[len(errors) * 9 // 10] < 0.15


def test_nothing_is_left_at_the_end_and_nothing_is_known_at_the_beginning() -> None:
    work = SEARCHES[2]
    snapshots, _ = played(work, start=1.0, whole=10.0, seed=0)
    assert seconds_left(snapshots[-1][1], work) == 0
    assert seconds_left([], work) is None and seconds_left([Trial(0, "running")], work) is None
    assert seconds_per_token([]) is None


def test_trials_that_failed_or_diverged_leave_no_work() -> None:
    ended = {WALL_SECONDS: 10.0}
    trials = [
        Trial(0, "complete", losses={50: 1.0, 100: 1.0}, target=1, figures={WALL_SECONDS: 20.0, "tokens": 10.0}),
        Trial(1, "complete", losses={50: float("inf")}, figures=ended),
        Trial(2, "failed"),
        Trial(3, "pruned", losses={50: 2.0}, figures=ended),
    ]
    assert seconds_left(trials, Work(trials=4, rungs=(0.5, 1.0))) == 0
    more = seconds_left(trials, Work(trials=5, rungs=(0.5, 1.0)))
    assert more is not None and 10 <= more <= 20
    assert seconds_per_token(trials) == 2
