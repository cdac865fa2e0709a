"""Labels of examples for classification and regression: read from records, and turned into numbers.

    integers, or words (numbers among them count as words)    classes, numbered in sorted order
    whole numbers, some of them written as 1.0                the same: pandas writes integers so where one is missing
    at least one number with a fraction, and no words         numbers to be predicted (regression)
    null, NaN, an empty text; `nan` or `-` beside numbers     no label
    -1, -100 beside other whole numbers, none below 0         no label: the ways of `datasets` (SNLI, GLUE's test sets)
                                                              and of torch's `ignore_index`
    -1, -100, `-` beside other words, all with a letter       no label: `-` is SNLI's, where annotators do not agree

The last two hold where there are at least two classes without them. A user may name other labels that stand for none.

A text that spells a number is a number, whatever the kind of the file: in a CSV file all values are text.
"""

import math
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from relora.data.finetuning.records import Record, check_unicode, column_value
from relora.data.readers import column_names
from relora.data.sampling import Int64Array
from relora.errors import UserError
from relora.messages import short_name, short_repr
from relora.model.head import IGNORED

_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,17})")
"""Texts that are integers; a text such as 007 is a word."""
_FRACTION = re.compile(r"[+-]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][+-]?[0-9]+)?")
"""Texts that are numbers with a decimal point or an exponent."""
MISSING = frozenset(("nan", "null", "none", "na", "n/a"))
"""Words that say, beside numbers, that there is none."""
DASH = "-"
NO_CLASS = ("-1", "-100", DASH)
"""Labels that stand for none: in `datasets`, in torch (`ignore_index`), and in SNLI where annotators do not agree."""
_EXACT = 2.0**53
"""Largest float below which every integer is one."""
_LARGEST = float(np.finfo(np.float32).max)
"""Largest label of a regression."""

Label = int | float | str
"""A class, or a number to be predicted."""


def label_of(record: Record, column: str) -> Label | None:
    """Return the label of a record, as a number where its value is a text that spells one; None if it has none.

    Spaces around a text are left out. True and false are words.

    Raises:
        UserError: the record lacks the column; its value is neither a text nor a finite number; or the text is not
            valid Unicode.
    """
    value = column_value(record, column)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, str) and not value.strip():
        return None
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, str):
        check_unicode(value, record, column)
        return _number_or_word(value.strip())
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise UserError(
        f"{record.where}: column `{short_name(column)}` is {short_repr(value)}, which is neither class nor number"
    )


def _number_or_word(text: str) -> Label:
    """Return the integer or the number with a fraction that a text spells; otherwise the text.

    A number that no float can hold becomes infinite, which `regression_targets` refuses.
    """
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _FRACTION.fullmatch(text) else text


def name_of(label: Label) -> str:
    """Return the name of a class; 1.0 and 1 have the same."""
    return str(int(label) if isinstance(label, float) and label.is_integer() else label)


def _is_whole(label: Label) -> bool:
    """Return whether a label is an integer, or a float that stands for one exactly."""
    return isinstance(label, int) or (isinstance(label, float) and label.is_integer() and abs(label) <= _EXACT)


Unlabelled = Literal["auto"] | Sequence[int | str]
"""Labels that stand for none: those that the module says, or those that a user names."""


def why_unlabelled(
    labels: Sequence[Label | None], names: Sequence[str] | None = None, unlabelled: Unlabelled = "auto"
) -> list[str | None]:
    """Return for each label why it is none; None if it is one.

    Args:
        labels: the labels of a data set.
        names: of held-out data, the names of the training data's classes; empty for a regression.
        unlabelled: labels that stand for none, beside those that are missing.
    """
    if names is None:
        words = {label.lower() for label in labels if isinstance(label, str)}
        are_numbers = words <= {*MISSING, DASH} and any(isinstance(label, int | float) for label in labels)
        numbers_or_words = (one for one in labels if not (one is None or (are_numbers and isinstance(one, str))))
        classes = set(map(name_of, numbers_or_words)) - {*NO_CLASS}
    else:
        are_numbers = all(_INTEGER.fullmatch(name) for name in names)
        classes = set(names)
    marks = _marks(classes) if unlabelled == "auto" else {str(one): "as data.unlabelled says" for one in unlabelled}
    missing = "null, NaN or empty"

    def why(label: Label | None) -> str | None:
        if label is None or (are_numbers and isinstance(label, str) and label.lower() in MISSING):
            return missing
        if are_numbers and label == DASH and unlabelled == "auto":
            return missing
        reason = marks.get(name_of(label))
        return f"{name_of(label)}, {reason}" if reason else None

    return list(map(why, labels))


def _marks(classes: set[str]) -> dict[str, str]:
    """Return which labels stand for none beside these classes, and why: some of `NO_CLASS`, or none."""
    if len(classes) > 1 and all(_INTEGER.fullmatch(name) and name[0] != "-" for name in classes):
        marks, beside = [mark for mark in NO_CLASS if mark != DASH], "labels from 0 on"
    elif len(classes) > 1 and all(any(map(str.isalpha, name)) for name in classes):
        marks, beside = list(NO_CLASS), "words"
    else:
        return {}
    return dict.fromkeys(marks, f"which is no class beside {beside}; `data.unlabelled: []` keeps it")


def class_names(labels: Sequence[Label], places: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the classes in sorted order, integers by value; empty for a regression.

    It is a regression if a label is a number with a fraction.

    Args:
        labels: the labels of the training data.
        places: the place of each label, for messages.

    Raises:
        UserError: there is only one class, or words occur beside numbers with a fraction.
    """
    kinds = {type(label): place for label, place in zip(labels, places, strict=True)}
    if float in kinds and str in kinds:
        raise UserError(f"{kinds[str]}: the label is a word, that of {kinds[float]} a number with a fraction")
    if not all(isinstance(label, str) or _is_whole(label) for label in labels):
        return ()
    names = [name_of(label) for label in sorted(set(labels), key=str if str in kinds else int)]
    if len(names) == 1:
        raise UserError(f"{places[0]}: every label is {short_repr(names[0])}; give examples of another class, too")
    return tuple(names)


def class_numbers(labels: Sequence[Label], names: Sequence[str], places: Sequence[str]) -> Int64Array:
    """Return the number of each label's class, [labels]; `UserError` if a label is not among the classes."""
    numbers = {name: number for number, name in enumerate(names)}
    for label, place in zip(labels, places, strict=True):
        if name_of(label) not in numbers:
            raise UserError(
                f"{place}: the label {short_repr(label)} is none of the training data's: {column_names(names)}"
            )
    return np.array([numbers[name_of(label)] for label in labels], dtype=np.int64)


def regression_targets(labels: Sequence[Label], places: Sequence[str]) -> npt.NDArray[np.float32]:
    """Return the labels of a regression as numbers, [labels]; `UserError` if one is a word or too large for fp32.

    A label equal to `IGNORED`, which no loss counts, is replaced by the next fp32 number towards 0.
    """
    for label, place in zip(labels, places, strict=True):
        if isinstance(label, str) or not abs(label) <= _LARGEST:
            raise UserError(f"{place}: the label {short_repr(label)} is no number, as the training data's are")
    numbers = np.array(labels, dtype=np.float32)
    return np.where(numbers == IGNORED, np.nextafter(numbers, np.float32(0)), numbers)
