"""The scores of classification and regression tasks, from predictions and labels alone: plain numbers, no tensors.

    accuracy   the share of predictions that are right
    F1         2 TP / (2 TP + FP + FN) of one class; macro: the mean over classes
    Matthews   (n c - sum_k t_k p_k) / sqrt((n^2 - sum_k p_k^2) (n^2 - sum_k t_k^2)): c of n are right, class k is true
               t_k times and predicted p_k times (Gorodkin 2004; for two classes Matthews 1975)
    Pearson    the cosine between the deviations of predictions and labels from their means
    Spearman   Pearson of the ranks, those of ties being their mean

These are GLUE's (Wang et al. 2018, arXiv 1804.07461, table 1). Where a quotient is 0 / 0, each says what it gives: what
scikit-learn and scipy give, too. Counts are exact integers and sums rounded once; the price is Python's pace, about a
second for a million examples.
"""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import groupby


def accuracy(predictions: Sequence[int], labels: Sequence[int]) -> float:
    """The share of predictions that equal their label."""
    pairs = _counted(predictions, labels)
    return _right(pairs) / pairs.total()


def f1(predictions: Sequence[int], labels: Sequence[int], positive: int = 1) -> float:
    """F1 of one class; 0 where it is neither predicted nor true."""
    return _f1_of(_counted(predictions, labels), positive)


def macro_f1(predictions: Sequence[int], labels: Sequence[int]) -> float:
    """The mean of F1 over the classes that are predicted or true at least once."""
    pairs = _counted(predictions, labels)
    classes = {one for pair in pairs for one in pair}
    return math.fsum(_f1_of(pairs, one) for one in classes) / len(classes)


def matthews(predictions: Sequence[int], labels: Sequence[int]) -> float:
    """Matthews' correlation, -1 to 1; 0 where all predictions, or all labels, are of one class."""
    pairs = _counted(predictions, labels)
    predicted, true = Counter(predictions), Counter(labels)
    squared = pairs.total() ** 2
    common = pairs.total() * _right(pairs) - sum(predicted[one] * true[one] for one in true)
    spread = (squared - sum(n * n for n in predicted.values())) * (squared - sum(n * n for n in true.values()))
    return common / math.sqrt(spread) if spread else 0.0


def pearson(predictions: Sequence[float], labels: Sequence[float]) -> float:
    """Linear correlation, -1 to 1; NaN where either side is constant (one example alone is) or not finite."""
    if not _can_correlate(predictions, labels):
        return math.nan
    pairs = zip(_direction(predictions), _direction(labels), strict=True)
    return max(-1.0, min(1.0, math.fsum(a * b for a, b in pairs)))


def spearman(predictions: Sequence[float], labels: Sequence[float]) -> float:
    """Correlation of ranks, -1 to 1; NaN where `pearson` is."""
    if not _can_correlate(predictions, labels):
        return math.nan
    return pearson(_ranks(predictions), _ranks(labels))


def _counted(predictions: Sequence[int], labels: Sequence[int]) -> Counter[tuple[int, int]]:
    """(prediction, label) -> how often."""
    pairs = Counter(zip(predictions, labels, strict=True))
    if not pairs:
        raise ValueError("no example to score")
    return pairs


def _right(pairs: Counter[tuple[int, int]]) -> int:
    return sum(number for (prediction, label), number in pairs.items() if prediction == label)


def _f1_of(pairs: Counter[tuple[int, int]], one: int) -> float:
    """F1 of a class. Predicted or true as often as both together, TP + FP + TP + FN, is the denominator."""
    found = 2 * pairs[one, one]
    either = sum(number * pair.count(one) for pair, number in pairs.items())
    return found / either if either else 0.0


def _can_correlate(predictions: Sequence[float], labels: Sequence[float]) -> bool:
    if len(predictions) != len(labels) or not len(labels):
        raise ValueError(f"{len(predictions)} predictions of {len(labels)} examples")
    return all(all(map(math.isfinite, side)) and min(side) < max(side) for side in (predictions, labels))


def _direction(values: Sequence[float]) -> list[float]:
    """The deviations from the mean, as a vector of length 1."""
    mean = math.fsum(value / len(values) for value in values)
    deviations = [value - mean for value in values]
    length = math.hypot(*deviations)  # squares nothing that would overflow or vanish
    return [deviation / length for deviation in deviations]


def _ranks(values: Sequence[float]) -> list[float]:
    """1 for the smallest; equal values share the mean of their ranks."""
    ranks = [0.0] * len(values)
    below = 0
    for _, group in groupby(sorted(range(len(values)), key=values.__getitem__), key=values.__getitem__):
        tied = list(group)
        for index in tied:
            ranks[index] = below + (len(tied) + 1) / 2
        below += len(tied)
    return ranks
