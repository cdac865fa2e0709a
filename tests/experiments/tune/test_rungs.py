"""Successive halving: who goes on, and that a search ends with a finished trial."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relora.errors import UserError
from relora.experiments.tune.rungs import Trial, is_pending, next_promotion, parse_rungs, percent

Losses = st.lists(st.sampled_from([1.0, 2.0, 3.0, 4.0, math.inf]), min_size=1, max_size=24)


def played(losses: list[float], rungs: tuple[float, ...], seed: int) -> list[Trial]:
    """Play a search in which a trial has the same loss at every rung; up to three parts end in a random order."""
    draws, trials = random.Random(seed), list[Trial]()
    running: list[int] = []
    while True:
        while len(running) < 3:
            more = len(trials) < len(losses)
            found = next_promotion(trials, rungs, more_to_come=more)
            if found is not None:
                trials[found.number] = Trial(found.number, "running", losses=found.losses, target=found.target + 1)
                running.append(found.number)
            elif more:
                running.append(len(trials))
                trials.append(Trial(len(trials), "running"))
            else:
                break
        if not running:
            return trials
        number = running.pop(draws.randrange(len(running)))
        trial = trials[number]
        reached = {**trial.losses, percent(rungs[trial.target]): losses[number]}
        ended = math.isinf(losses[number]) or trial.target == len(rungs) - 1
        trials[number] = Trial(number, "complete" if ended else "running", losses=reached, target=trial.target)


@given(losses=Losses, seed=st.integers(0, 100), rungs=st.sampled_from([(0.25, 0.5, 1.0), (1 / 9, 1 / 3, 1.0), (1.0,)]))
def test_a_search_ends_with_its_best_trials_finished(losses: list[float], seed: int, rungs: tuple[float, ...]) -> None:
    trials = played(losses, rungs, seed)
    assert len(trials) == len(losses)
    finished = [trial for trial in trials if 100 in trial.losses]
    finite = [loss for loss in losses if math.isfinite(loss)]
    assert bool(finished) == bool(finite) or len(rungs) == 1
    if finite and len(rungs) > 1:
        assert min(trial.losses[100] for trial in finished) == min(
            finite
        )  # equal losses at all rungs: the best is kept


def test_the_better_half_goes_on_and_no_more() -> None:
    rungs = (0.5, 1.0)
    waiting = [Trial(number, "running", losses={50: float(loss)}) for number, loss in enumerate([4, 3, 2, 1, 5])]
    found = next_promotion(waiting, rungs, more_to_come=True)
    assert found is not None and found.number == 3
    waiting[3] = Trial(3, "running", losses=waiting[3].losses, target=1)
    found = next_promotion(waiting, rungs, more_to_come=True)
    assert found is not None and found.number == 2
    waiting[2] = Trial(2, "running", losses=waiting[2].losses, target=1)
    assert next_promotion(waiting, rungs, more_to_come=True) is None
    assert next_promotion(waiting, rungs, more_to_come=False) is None
    assert is_pending(waiting[2], rungs) and not is_pending(waiting[0], rungs)


def test_a_lone_trial_goes_on_once_nothing_more_can_come() -> None:
    alone = [Trial(0, "running", losses={25: 1.0})]
    assert next_promotion(alone, (0.25, 0.5, 1.0), more_to_come=True) is None
    assert next_promotion(alone, (0.25, 0.5, 1.0), more_to_come=False) == alone[0]
    behind = [*alone, Trial(1, "running")]  # still on its way to the first rung
    assert next_promotion(behind, (0.25, 0.5, 1.0), more_to_come=False) is None


def test_trials_that_diverged_failed_or_were_given_up_never_go_on() -> None:
    trials = [
        Trial(0, "complete", losses={50: math.inf}),
        Trial(1, "failed"),
        Trial(2, "pruned", losses={50: 1.0}, reason="time"),
        Trial(3, "running", losses={50: 2.0}),
    ]
    found = next_promotion(trials, (0.5, 1.0), more_to_come=False)
    assert found is not None and found.number == 3


@pytest.mark.parametrize("text", ["", "a", "0.5", "1,0.5", "0,1", "0.5,0.5,1", "0.5,1,2", "nan,1", "0.001,1"])
def test_rungs_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--rungs"):
        parse_rungs(text)


def test_rungs_are_read() -> None:
    assert parse_rungs("0.25,0.5,1") == (0.25, 0.5, 1.0) and parse_rungs("1") == (1.0,)
