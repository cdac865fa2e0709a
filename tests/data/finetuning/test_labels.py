import math
from typing import Any

import numpy as np
import pytest

from relora.data.finetuning.labels import (
    Label,
    class_names,
    class_numbers,
    is_labelled,
    label_of,
    regression_targets,
)
from relora.data.finetuning.records import Record
from relora.errors import UserError
from relora.model.head import IGNORED


@pytest.mark.parametrize(
    ("value", "label"),
    [
        *((3, 3), (True, "True"), (2.5, 2.5), ("yes", "yes"), (" yes ", "yes")),
        *(("3", 3), ("-3", -3), ("007", "007"), ("1" * 19, "1" * 19), ("2.5", 2.5), ("1e3", 1000.0), (".5", 0.5)),
        ("nan", "nan"),
    ],
)
def test_a_label_is_what_its_value_spells(value: Any, label: Label) -> None:
    found = label_of(Record("line 1", {"label": value}), "label")
    assert (found, type(found)) == (label, type(label))


@pytest.mark.parametrize("value", [None, math.nan, "", " "])
def test_a_record_may_have_no_label(value: Any) -> None:
    assert label_of(Record("line 1", {"label": value}), "label") is None


def test_a_dash_is_no_label_in_snli() -> None:
    assert label_of(Record("line 1", {"gold_label": "-"}), "gold_label") is None
    assert label_of(Record("line 1", {"label": "-"}), "label") == "-"


@pytest.mark.parametrize(
    ("labels", "labelled"),
    [
        ([0, -1, 1, None], [True, False, True, False]),
        ([0.0, -1.0, 1.0], [True, False, True]),
        *(([-1, 1], [True, True]), ([-1, 0], [True, True])),  # otherwise there would be only one class
        ([0, 1, "nan", "NULL"], [True, True, False, False]),
        (["yes", "none"], [True, True]),
        *(([-2, -1, 0, 1], [True] * 4), (["yes", -1, "no"], [True] * 3), ([0.5, -1, 1], [True] * 3)),
    ],
)
def test_minus_one_is_no_label_beside_classes_from_zero_on(labels: list[Any], labelled: list[bool]) -> None:
    assert is_labelled(labels) == labelled


def test_held_out_labels_are_told_by_the_classes_of_the_training_data() -> None:
    assert is_labelled([-1, 0, None, -1], ("0", "1")) == [False, True, False, False]
    assert is_labelled([-1, 0], ("-1", "0")) == is_labelled([-1, 0], ("no", "yes")) == [True, True]
    assert is_labelled(["nan", 0], ("0", "1")) == [False, True]
    assert is_labelled(["nan", "yes"], ("no", "yes")) == [True, True]
    assert is_labelled([-100, 0, 1]) == [False, True, True]
    assert is_labelled([-100, 0], ("0", "1")) == [False, True]
    assert is_labelled([-1, 0.5], ()) == [True, True]  # numbers to be predicted


def test_whole_numbers_are_classes_however_they_are_written() -> None:
    assert class_names([0.0, 1.0, 1], ["a", "b", "c"]) == ("0", "1")
    assert class_numbers([0.0, 1.0, 1], ("0", "1"), ["a", "b", "c"]).tolist() == [0, 1, 1]
    assert class_names([0.0, 1.0, 1.5], ["a", "b", "c"]) == ()
    assert class_names([0.0, 1e300], ["a", "b"]) == ()


@pytest.mark.parametrize("value", [[1], math.inf])
def test_what_is_no_label_is_refused(value: Any) -> None:
    with pytest.raises(UserError, match=r"line 1: column `label` is .*, which is neither class nor number"):
        label_of(Record("line 1", {"label": value}), "label")
    with pytest.raises(UserError, match="line 1: no column `score`; there are `label`"):
        label_of(Record("line 1", {"label": value}), "score")


def test_classes_are_sorted_integers_by_value() -> None:
    assert class_names([10, 9, 10], ["a", "b", "c"]) == ("9", "10")
    assert class_names([10, 9, "x"], ["a", "b", "c"]) == ("10", "9", "x")
    assert class_numbers([10, 9, 9.0], ("9", "10"), ["a", "b", "c"]).tolist() == [1, 0, 0]
    with pytest.raises(UserError, match="b: the label 8 is none of the training data's: `9`, `10`"):
        class_numbers([9, 8], ("9", "10"), ["a", "b"])


def test_a_fraction_makes_all_labels_numbers() -> None:
    assert class_names([1, 2.5], ["a", "b"]) == ()
    targets = regression_targets([1, 2.5, IGNORED], ["a", "b", "c"])
    assert targets.dtype == np.float32
    assert targets[:2].tolist() == [1.0, 2.5]
    assert targets[2] != IGNORED and targets[2] == pytest.approx(IGNORED)
    for label in ("x", 1e39):
        with pytest.raises(UserError, match=r"b: the label .* is no number"):
            regression_targets([1, label], ["a", "b"])
    with pytest.raises(UserError, match="b: the label is a word, that of a a number with a fraction"):
        class_names([2.5, "x"], ["a", "b"])
