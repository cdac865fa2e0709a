import math
from typing import Any

import numpy as np
import pytest

from relora.data.finetuning.labels import (
    Label,
    class_names,
    class_numbers,
    label_of,
    regression_targets,
    why_unlabelled,
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


def is_labelled(labels: list[Any], names: tuple[str, ...] | None = None, **options: Any) -> list[bool]:
    return [reason is None for reason in why_unlabelled(labels, names, **options)]


@pytest.mark.parametrize(
    ("labels", "labelled"),
    [
        ([0, -1, 1, None], [True, False, True, False]),
        ([0.0, -1.0, 1.0], [True, False, True]),
        *(([-1, 1], [True, True]), ([-1, 0], [True, True])),  # otherwise there would be only one class
        ([0, 1, "nan", "NULL", "-"], [True, True, False, False, False]),
        *(([-100, 0, 1], [False, True, True]), ([-1, -100, 0, 1], [False, False, True, True])),
        *((["yes", "none"], [True, True]), (["yes", -1, "no", "-"], [True, False, True, False])),
        *(([-2, -1, 0, 1], [True] * 4), ([0.5, -1, 1], [True] * 3), (["007", "008", -1], [True] * 3)),
        *((["+", "-"], [True] * 2), (["a+", "-", "?"], [True] * 3), (["-", "same"], [True] * 2)),
        (["-", "neutral", "entailment", "contradiction"], [False, True, True, True]),
    ],
)
def test_some_labels_stand_for_none_beside_others(labels: list[Any], labelled: list[bool]) -> None:
    assert is_labelled(labels) == labelled
    assert is_labelled(list(reversed(labels))) == labelled[::-1]


def test_held_out_labels_are_told_by_the_classes_of_the_training_data() -> None:
    assert is_labelled([-1, 0, None, -1], ("0", "1")) == [False, True, False, False]
    assert is_labelled([-1, 0], ("-1", "0")) == [True, True]
    assert is_labelled([-1, "-", "no"], ("no", "yes")) == [False, False, True]
    assert is_labelled(["-", "+"], ("+", "-")) == [True, True]
    assert is_labelled(["nan", 0], ("0", "1")) == [False, True]
    assert is_labelled(["nan", "yes"], ("no", "yes")) == [True, True]
    assert is_labelled([-100, 0], ("0", "1")) == [False, True]
    assert is_labelled([-1, 0.5, "-"], ()) == [True, True, False]  # numbers to be predicted


def test_a_user_says_which_labels_stand_for_none() -> None:
    labels = [0, -1, 1, None, 99, 99.0, "?"]
    assert is_labelled(labels, unlabelled=()) == [True, True, True, False, True, True, True]
    assert is_labelled(labels, unlabelled=(99, "?")) == [True, True, True, False, False, False, False]
    assert is_labelled(["a", "-", "b"], unlabelled=()) == [True] * 3
    assert is_labelled(["unsup", "-1"], ("a", "unsup"), unlabelled=("unsup",)) == [False, True]
    assert why_unlabelled([99], unlabelled=("99",)) == ["99, as data.unlabelled says"]
    assert why_unlabelled(["-", "a", "b"])[0] == "-, which is no class beside words; `data.unlabelled: []` keeps it"


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
