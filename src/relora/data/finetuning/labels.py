"""Labels of examples for classification and regression: read from records, and turned into numbers.

    integers, or words (numbers among them count as words)    classes, numbered in sorted order
    at least one number with a fraction, and no words         numbers to be predicted (regression)

A number with a fraction is one that is written with a decimal point or an exponent, even if it is 1.0. A text that
spells a number is a number, whatever the kind of the file: in a CSV file all values are text.
"""

import math
import re
from collections.abc import Sequence

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
_LARGEST = float(np.finfo(np.float32).max)
"""Largest label of a regression."""

Label = int | float | str
"""A class, or a number to be predicted."""


def label_of(record: Record, column: str) -> Label:
    """Return the label of a record, as a number where its value is a text that spells one.

    Spaces around a text are left out. True and false are words.

    Raises:
        UserError: the record lacks the column; its value is neither a text nor a finite number; or the text is empty,
            or not valid Unicode.
    """
    value = column_value(record, column)
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value.strip():
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


def _name(label: Label) -> str:
    """Return the name of a class; 1.0 and 1 have the same."""
    return str(int(label) if isinstance(label, float) and label.is_integer() else label)


def class_names(labels: Sequence[Label], places: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the classes in sorted order, integers by value; empty for a regression.

    It is a regression if a label is a number with a fraction, that is a float, even 1.0.

    Args:
        labels: the labels of the training data.
        places: the place of each label, for messages.

    Raises:
        UserError: there is only one class, or words occur beside numbers with a fraction.
    """
    kinds = {type(label): place for label, place in zip(labels, places, strict=True)}
    if float in kinds:
        if str in kinds:
            raise UserError(f"{kinds[str]}: the label is a word, that of {kinds[float]} a number with a fraction")
        return ()
    names = [_name(label) for label in sorted(set(labels), key=str if str in kinds else int)]
    if len(names) == 1:
        raise UserError(f"{places[0]}: every label is {short_repr(names[0])}; give examples of another class, too")
    return tuple(names)


def class_numbers(labels: Sequence[Label], names: Sequence[str], places: Sequence[str]) -> Int64Array:
    """Return the number of each label's class, [labels]; `UserError` if a label is not among the classes."""
    numbers = {name: number for number, name in enumerate(names)}
    for label, place in zip(labels, places, strict=True):
        if _name(label) not in numbers:
            raise UserError(
                f"{place}: the label {short_repr(label)} is none of the training data's: {column_names(names)}"
            )
    return np.array([numbers[_name(label)] for label in labels], dtype=np.int64)


def regression_targets(labels: Sequence[Label], places: Sequence[str]) -> npt.NDArray[np.float32]:
    """Return the labels of a regression as numbers, [labels]; `UserError` if one is a word or too large for fp32.

    A label equal to `IGNORED`, which no loss counts, is replaced by the next fp32 number towards 0.
    """
    for label, place in zip(labels, places, strict=True):
        if isinstance(label, str) or not abs(label) <= _LARGEST:
            raise UserError(f"{place}: the label {short_repr(label)} is no number, as the training data's are")
    numbers = np.array(labels, dtype=np.float32)
    return np.where(numbers == IGNORED, np.nextafter(numbers, np.float32(0)), numbers)
