"""The metrics agree with scikit-learn and scipy, edge cases included."""

import math
import random
import warnings
from collections.abc import Callable, Sequence

import pytest
import scipy.stats
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from relora.evaluation import label_metrics

Score = Callable[[Sequence[float], Sequence[float]], float]


@st.composite
def two_sides(draw: st.DrawFn, values: st.SearchStrategy[float]) -> tuple[list[float], list[float]]:
    """Draw predictions and as many labels."""
    pairs = draw(st.lists(st.tuples(values, values), min_size=1, max_size=40))
    predictions, labels = zip(*pairs, strict=True)
    return list(predictions), list(labels)


def quietly(score: Callable[[], float]) -> float:
    """Call a library without its warnings: the edge cases that it warns of are the subject of these tests."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(score())


@given(sides=two_sides(st.integers(0, 1)))
def test_two_classes_score_as_in_scikit_learn(sides: tuple[list[int], list[int]]) -> None:
    predictions, labels = sides
    assert label_metrics.f1(predictions, labels) == pytest.approx(
        quietly(lambda: sklearn.metrics.f1_score(labels, predictions, labels=[0, 1], zero_division=0))
    )
    wanted = quietly(lambda: sklearn.metrics.f1_score(labels, predictions, labels=[0, 1], pos_label=0, zero_division=0))
    assert label_metrics.f1(predictions, labels, positive=0) == pytest.approx(wanted)


@given(sides=two_sides(st.integers(0, 4)))
def test_classes_score_as_in_scikit_learn(sides: tuple[list[int], list[int]]) -> None:
    predictions, labels = sides
    for ours, theirs in (
        (label_metrics.accuracy, lambda: sklearn.metrics.accuracy_score(labels, predictions)),
        (label_metrics.macro_f1, lambda: sklearn.metrics.f1_score(labels, predictions, average="macro")),
        (label_metrics.matthews, lambda: sklearn.metrics.matthews_corrcoef(labels, predictions)),
    ):
        assert ours(predictions, labels) == pytest.approx(quietly(theirs), abs=1e-12), ours.__name__


@given(sides=two_sides(st.integers(-3, 3).map(float)))
def test_numbers_with_ties_correlate_as_in_scipy(sides: tuple[list[float], list[float]]) -> None:
    if len(sides[0]) > 1:  # scipy raises an error for a single example
        check_correlations(*sides)


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1e-3, 1e3), (1e150, -1e150)])
def test_numbers_correlate_as_in_scipy(scale: float, offset: float) -> None:
    draw = random.Random(0)
    labels = [draw.gauss(0, 1) for _ in range(200)]
    noisy = [offset + scale * (label + draw.gauss(0, 1)) for label in labels]
    check_correlations(noisy, labels)


def check_correlations(predictions: list[float], labels: list[float]) -> None:
    for ours, theirs in (
        (label_metrics.pearson, scipy.stats.pearsonr),
        (label_metrics.spearman, scipy.stats.spearmanr),
    ):
        wanted = quietly(lambda theirs=theirs: theirs(predictions, labels).statistic)
        assert ours(predictions, labels) == pytest.approx(wanted, abs=1e-9, nan_ok=True), ours.__name__


def test_all_right_and_all_wrong() -> None:
    labels = [0, 1, 1, 0, 1]
    wrong = [1 - label for label in labels]
    for score in (label_metrics.accuracy, label_metrics.f1, label_metrics.macro_f1, label_metrics.matthews):
        assert score(labels, labels) == 1.0
    assert [score(wrong, labels) for score in (label_metrics.accuracy, label_metrics.f1, label_metrics.matthews)] == [
        0.0,
        0.0,
        -1.0,
    ]


def test_a_monotonic_curve_has_rank_correlation_one() -> None:
    labels = [float(number) for number in range(20)]
    predictions = [math.exp(label) for label in labels]
    assert label_metrics.spearman(predictions, labels) == pytest.approx(1.0, abs=1e-15)
    assert label_metrics.pearson(predictions, labels) < 0.8


def test_a_constant_prediction() -> None:
    assert label_metrics.matthews([1, 1, 1], [0, 1, 1]) == 0.0
    assert label_metrics.f1([0, 0], [0, 0]) == 0.0
    assert math.isnan(label_metrics.pearson([2.0, 2.0], [1.0, 3.0]))
    assert math.isnan(label_metrics.spearman([1.0, 3.0], [2.0, 2.0]))
    assert math.isnan(label_metrics.pearson([1.0], [1.0]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_prediction_that_is_not_finite_does_not_correlate(bad: float) -> None:
    for score in (label_metrics.pearson, label_metrics.spearman):
        assert math.isnan(score([1.0, bad, 2.0, -bad], [1.0, 2.0, 3.0, 4.0]))


@pytest.mark.parametrize(
    "score",
    [
        label_metrics.accuracy,
        label_metrics.f1,
        label_metrics.macro_f1,
        label_metrics.matthews,
        label_metrics.pearson,
        label_metrics.spearman,
    ],
)
def test_two_sides_of_different_length_are_refused(score: Score) -> None:
    for predictions, labels in (([], []), ([1, 0], [1, 0, 1])):
        with pytest.raises(ValueError):
            score(predictions, labels)
