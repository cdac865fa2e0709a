"""Metrics of classification and regression, computed from predictions and labels: plain numbers, no tensors.

    accuracy   share of predictions that are right
    F1         2 TP / (2 TP + FP + FN) of one class; macro F1: its mean over the classes
    Matthews   (n c - sum_k t_k p_k) / sqrt((n^2 - sum_k p_k^2) (n^2 - sum_k t_k^2)), where c of n predictions are
               right, and class k is the label t_k times and predicted p_k times (Gorodkin 2004; for two classes
               Matthews 1975)
    Pearson    cosine of the angle between the predictions' and the labels' deviations from their means
    Spearman   Pearson correlation of the ranks; tied values share the mean of their ranks

These are the metrics of GLUE (Wang et al. 2018, arXiv 1804.07461, table 1). Where a quotient is 0 / 0, the docstring of
the metric says what it returns; scikit-learn and scipy return the same. Counts are exact integers, and sums are rounded
once. The price is the speed of Python: about a second for a million examples.
"""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import groupby


def accuracy(predictions: Sequence[int], labels: Sequence[int]) -> float:
    """Return the share of predictions that equal their label."""
    pairs = _count_pairs(predictions, labels)
    return _count_correct(pairs) / pairs.total()


def f1(predictions: Sequence[int], labels: Sequence[int], positive: int = 1) -> float:
    """Return F1 of the class `positive`; 0 if it is neither predicted nor a label."""
    return _class_f1(_count_pairs(predictions, labels), positive)


def macro_f1(predictions: Sequence[int], labels: Sequence[int]) -> float:
    """Return the mean of F1 over the classes that are predicted or a label at least once."""
    pairs = _count_pairs(predictions, labels)
    classes = {label for pair in pairs for label in pair}
    return math.fsum(_class_f1(pairs, label) for label in classes) / len(classes)


def matthews(predictions: Sequence[int], labels: Sequence[int]) -> float:
    """Return Matthews' correlation, -1 to 1; 0 if all predictions, or all labels, are of one class."""
    pairs = _count_pairs(predictions, labels)
    predicted, true = Counter(predictions), Counter(labels)
    total = pairs.total()
    covariance = total * _count_correct(pairs) - sum(predicted[label] * true[label] for label in true)
    predicted_variance = total**2 - sum(count**2 for count in predicted.values())
    true_variance = total**2 - sum(count**2 for count in true.values())
    product = predicted_variance * true_variance
    return covariance / math.sqrt(product) if product else 0.0


def pearson(predictions: Sequence[float], labels: Sequence[float]) -> float:
    """Return the linear correlation, -1 to 1.

    It is NaN if predictions or labels are all equal (as those of a single example are) or not all finite.
    """
    if not _can_correlate(predictions, labels):
        return math.nan
    pairs = zip(_unit_deviations(predictions), _unit_deviations(labels), strict=True)
    cosine = math.fsum(prediction * label for prediction, label in pairs)
    return max(-1.0, min(1.0, cosine))


def spearman(predictions: Sequence[float], labels: Sequence[float]) -> float:
    """Return the correlation of the ranks, -1 to 1; NaN where `pearson` is."""
    if not _can_correlate(predictions, labels):
        return math.nan
    return pearson(_ranks(predictions), _ranks(labels))


def _count_pairs(predictions: Sequence[int], labels: Sequence[int]) -> Counter[tuple[int, int]]:
    """Count how often each pair (prediction, label) occurs; raise `ValueError` if there is none."""
    pairs = Counter(zip(predictions, labels, strict=True))
    if not pairs:
        raise ValueError("no example to score")
    return pairs


def _count_correct(pairs: Counter[tuple[int, int]]) -> int:
    return sum(count for (prediction, label), count in pairs.items() if prediction == label)


def _class_f1(pairs: Counter[tuple[int, int]], positive: int) -> float:
    """Return F1 of one class.

    Its denominator 2 TP + FP + FN is the number of times that the class is predicted plus the number of times that it
    is the label.
    """
    numerator = 2 * pairs[positive, positive]
    denominator = sum(count * pair.count(positive) for pair, count in pairs.items())
    return numerator / denominator if denominator else 0.0


def _can_correlate(predictions: Sequence[float], labels: Sequence[float]) -> bool:
    """Whether a correlation is defined: all values are finite, and neither predictions nor labels are all equal.

    Raises:
        ValueError: there are no examples, or not as many predictions as labels.
    """
    if len(predictions) != len(labels) or not len(labels):
        raise ValueError(f"{len(predictions)} predictions of {len(labels)} examples")
    return all(all(map(math.isfinite, values)) and min(values) < max(values) for values in (predictions, labels))


def _unit_deviations(values: Sequence[float]) -> list[float]:
    """Return the deviations of the values from their mean, scaled to a vector of length 1."""
    mean = math.fsum(value / len(values) for value in values)
    deviations = [value - mean for value in values]
    length = math.hypot(*deviations)  # unlike a sum of squares, it neither overflows nor vanishes
    return [deviation / length for deviation in deviations]


def _ranks(values: Sequence[float]) -> list[float]:
    """Return the rank of each value, 1 for the smallest; equal values share the mean of their ranks."""
    ranks = [0.0] * len(values)
    smaller = 0
    in_order = sorted(range(len(values)), key=values.__getitem__)
    for _, group in groupby(in_order, key=values.__getitem__):
        tied = list(group)
        for index in tied:
            ranks[index] = smaller + (len(tied) + 1) / 2
        smaller += len(tied)
    return ranks
