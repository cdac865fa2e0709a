"""Successive halving without training: losses are a function of the rate."""

import math
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relora.experiments.search import MOST_BEYOND, Choice, Search, Trial, best_of, halving, lengths_of, run_searches

GRID = [1e-3, 2e-3, 4e-3, 8e-3]


def play(search: Search, loss: Callable[[Trial], float]) -> tuple[Choice, list[list[Trial]]]:
    """Run a search; return its choice and the trials of each round."""
    rounds: list[list[Trial]] = []

    def score(pairs: list[tuple[str, Trial]]) -> list[float]:
        rounds.append([trial for _, trial in pairs])
        return [loss(trial) for trial in rounds[-1]]

    return run_searches({"one": search}, score)["one"], rounds


def valley(best: float) -> Callable[[Trial], float]:
    """Return losses with one minimum, the same for runs of every length."""
    return lambda trial: abs(math.log(trial.rate / best))


@given(st.sampled_from(GRID[1:-1]), st.floats(0.8, 1.2))
def test_the_best_rate_within_the_grid_is_found(best: float, off: float) -> None:
    choice, rounds = play(halving(GRID), valley(best * off))
    assert choice == Choice(best, at_edge=False)
    assert [len(asked) for asked in rounds] == [4, 2]
    assert {trial.length for trial in rounds[0]} == {0.25} and {trial.length for trial in rounds[1]} == {1.0}
    assert best in {trial.rate for trial in rounds[1]}


@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=16, unique=True), st.data())
def test_the_best_of_a_round_stays_to_the_end(rates: list[float], data: st.DataObject) -> None:
    """The lowest loss of all wins; every round has half the rates of the one before, and the last round has two."""
    losses: dict[float, float] = {}

    def loss(trial: Trial) -> float:
        if trial.rate not in losses:
            losses[trial.rate] = data.draw(st.floats(0, 20))
        return losses[trial.rate]

    choice, rounds = play(halving(rates), loss)
    assert losses[choice.rate] == min(losses.values())
    asked = [trial for trials in rounds for trial in trials]
    assert all(1 < len(trials) <= math.ceil(len(rates) / 2) for trials in rounds[1:] if len(trials) > 1)
    assert len(losses) <= len(set(rates)) + MOST_BEYOND
    at_full_length = [trial for trial in asked if trial.length == 1.0]
    assert choice.rate in {trial.rate for trial in at_full_length}
    assert len(at_full_length) <= min(2, len(rates)) + MOST_BEYOND
    assert max(Counter(asked).values()) == 1  # no run is asked for twice


@given(st.integers(1, 64), st.sampled_from([1e-4, 1e-2]), st.sampled_from([1.7, 2.0]))
def test_the_budget_is_that_of_the_number_of_rates(count: int, low: float, factor: float) -> None:
    """Without rates beyond the edge, the cost depends on the number of rates alone, not on their losses."""
    grid = [low * factor**n for n in range(count)]
    spent = []
    for loss in (valley(grid[0]), valley(grid[-1]), lambda trial: math.nan):
        _, rounds = play(halving(grid, most_beyond=0), loss)
        spent.append(sum(trial.length for trials in rounds for trial in trials))
    assert len(set(spent)) == 1
    assert spent[0] <= count  # as many full-length runs


def test_rounds_grow_from_a_quarter_to_the_whole_run() -> None:
    assert [lengths_of(count) for count in (1, 2, 3, 4)] == [[1.0], [1.0], [0.25, 1.0], [0.25, 1.0]]
    assert lengths_of(8) == [0.25, 0.5, 1.0]


@pytest.mark.parametrize(("best", "beyond"), [(1.6e-2, [1.6e-2, 3.2e-2]), (5e-4, [5e-4, 2.5e-4])])
def test_an_optimum_at_the_edge_is_no_optimum(best: float, beyond: list[float]) -> None:
    choice, rounds = play(halving(GRID), valley(best))
    assert [trials[0].rate for trials in rounds[1:3]] == pytest.approx(beyond)
    assert choice.rate == pytest.approx(best) and not choice.at_edge
    # an optimum more than two steps away is not reached, and the choice says so
    choice, _ = play(halving(GRID), valley(100.0 if best > 1e-3 else 1e-9))
    assert choice.at_edge


def test_runs_that_diverged_lose_and_the_search_goes_down() -> None:
    choice, _ = play(halving(GRID), lambda trial: math.inf if trial.rate > 1.5e-3 else 1 / trial.rate)
    assert choice == Choice(1e-3, at_edge=False)
    choice, rounds = play(halving(GRID), lambda trial: math.nan)
    assert choice == Choice(2.5e-4, at_edge=True)
    assert min(trial.rate for trials in rounds for trial in trials) == 2.5e-4


def test_a_single_rate_is_one_full_run() -> None:
    assert play(halving([3e-3]), valley(1.0)) == (Choice(3e-3, at_edge=False), [[Trial(3e-3, 1.0)]])
    assert play(best_of([3e-3]), valley(1.0)) == (Choice(3e-3, at_edge=False), [[Trial(3e-3, 1.0)]])


def test_rates_that_were_given_are_all_run_in_full() -> None:
    choice, rounds = play(best_of(GRID), valley(4e-3))
    assert choice == Choice(4e-3, at_edge=False) and rounds == [[Trial(rate, 1.0) for rate in GRID]]
    assert play(best_of(GRID), valley(1.0))[0] == Choice(8e-3, at_edge=True)


def test_searches_go_side_by_side() -> None:
    rounds: list[list[tuple[str, Trial]]] = []

    def score(pairs: list[tuple[str, Trial]]) -> list[float]:
        rounds.append(pairs)
        return [valley(2e-3 if name == "full" else 4e-3)(trial) for name, trial in pairs]

    choices = run_searches({"full": halving(GRID), "relora": halving(GRID), "lora": halving([1e-2])}, score)
    assert {name: choice.rate for name, choice in choices.items()} == {"full": 2e-3, "relora": 4e-3, "lora": 1e-2}
    assert [len(pairs) for pairs in rounds] == [9, 4]
