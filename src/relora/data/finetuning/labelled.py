"""Records with labels: their columns, which of them have a label, and their split into training and held-out data.

A split of classes is by class: each gives its share, so that what is measured has the classes of what is trained, and a
rare one is on both sides where that is possible.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from relora.data.finetuning.labels import Label, Unlabelled, class_names, label_of, name_of, why_unlabelled
from relora.data.finetuning.record_notes import RecordNotes, unused_columns
from relora.data.finetuning.records import Record, check_unicode, column_value, draws_of, split
from relora.data.readers import column_names
from relora.data.sampling import apportion
from relora.errors import UserError
from relora.messages import short_name

TEXT_COLUMNS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
    ("sentence",),
    ("text",),
)
"""Usual names of text columns, in the order in which they are tried. Pairs come first, because one of their columns may
have the name of a single text."""

LABEL_COLUMNS = ("label", "labels", "gold_label", "score")
"""Usual names of the label column, in the order in which they are tried."""


@dataclass(frozen=True)
class ClassColumns:
    """The columns of a record that hold its text or texts, and its label."""

    texts: tuple[str, ...]
    label: str


@dataclass(frozen=True)
class LabelledRecords:
    """The records of a data set that have a label."""

    records: tuple[Record, ...]
    labels: tuple[Label, ...]
    columns: ClassColumns
    left_out: tuple[str, ...]
    """Lines about records that have no label."""
    unused: tuple[str, ...]
    """A line about columns that are not used."""

    @property
    def places(self) -> tuple[str, ...]:
        """Place of each record, for messages."""
        return tuple(record.where for record in self.records)


def read_labels(
    records: Iterable[Record],
    *,
    text_columns: Sequence[str] = (),
    label_column: str | None = None,
    unlabelled: Unlabelled = "auto",
    like: tuple[ClassColumns, tuple[str, ...]] | None = None,
) -> LabelledRecords:
    """Find the columns of a data set, and the records that have a label.

    A record without the column of labels has no label, as one with a null there.

    Args:
        records: the records of one data set.
        text_columns: one or two columns; unless given, they are found by their usual names.
        label_column: likewise.
        unlabelled: labels that stand for none, see `labels.why_unlabelled`.
        like: of held-out data, the columns and the names of the classes of the training data.

    Raises:
        UserError: there are no records, no such columns or no labels, or a label cannot be used.
    """
    records = list(records)
    if not records:
        raise UserError("classification: there is no record to read")
    usual = {label_column} if label_column else set(LABEL_COLUMNS)
    first = next((record for record in records if usual & record.fields.keys()), records[0])
    columns = like[0] if like else _find_columns(first, text_columns, label_column)
    labels = [label_of(record, columns.label) if columns.label in record.fields else None for record in records]
    reasons = why_unlabelled(labels, None if like is None else like[1], unlabelled)
    left_out, unused, kept = RecordNotes(), RecordNotes(), []
    for record, label, reason in zip(records, labels, reasons, strict=True):
        unused.add(record.where, unused_columns(record.fields, {*columns.texts, columns.label}), ())
        if reason is not None:
            left_out.add(record.where, (), [f"records left out, without a label ({reason})"])
        elif label is not None:
            kept.append((record, label))
    if not kept:
        raise UserError(f"{records[0].where}: no record has a label in the column `{short_name(columns.label)}`")
    kept_records, kept_labels = zip(*kept, strict=True)
    return LabelledRecords(kept_records, kept_labels, columns, left_out.lines, unused.lines)


def split_labelled(found: LabelledRecords, share: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Return (training records, held-out records); of classes, each gives its share.

    Of each class those records are held out that have the lowest keyed hashes, so the choice depends neither on the
    order nor on the tokenizer, and equal records are on the same side. How many is the share of the class, rounded by
    largest remainder so that all classes together have theirs, but at least one record. Each class keeps at least one
    record to train on. Numbers to be predicted are split by `records.split`.

    Args:
        found: all records with a label.
        share: of the records that is held out, greater than 0 and less than 1.
        seed: keys the hash.

    Raises:
        UserError: no class has different records, or the labels make no task.
    """
    names = class_names(found.labels, found.places)
    if not names:
        return split(found.records, share, seed)
    classes: dict[str, dict[int, list[int]]] = {name: defaultdict(list) for name in names}
    for number, (label, draw) in enumerate(zip(found.labels, draws_of(found.records, seed), strict=True)):
        classes[name_of(label)][draw].append(number)
    sizes = [sum(map(len, equals.values())) for equals in classes.values()]
    quotas = apportion(sizes, max(1, round(share * len(found.records)))).tolist()
    held_out: set[int] = set()
    possible: list[tuple[int, list[int]]] = []
    for equals, quota in zip(classes.values(), quotas, strict=True):
        taken: list[int] = []
        groups = sorted(equals.items())[:-1]  # the last one stays, to train on
        for _, numbers in groups:
            if len(taken) + len(numbers) / 2 <= quota:
                taken += numbers
        held_out.update(taken)
        possible += groups
    if not possible:
        raise UserError(
            f"{len(found.records)} record(s), too few different ones of a class to hold any out; "
            "give more, or a validation set of its own"
        )
    if not held_out:  # all groups of equal records are larger than the share
        held_out.update(min(possible)[1])
    train = [record for number, record in enumerate(found.records) if number not in held_out]
    return train, [found.records[number] for number in sorted(held_out)]


def _find_columns(record: Record, text_columns: Sequence[str], label_column: str | None) -> ClassColumns:
    """Return the named columns, or find those with usual names; `UserError` if the record lacks one."""
    there = record.fields.keys()
    named = [*text_columns, label_column] if label_column else text_columns
    for name in named:
        if name not in there:
            raise UserError(f"{record.where}: no column `{short_name(name)}`; there are {column_names(there)}")
    texts = tuple(text_columns) or next((names for names in TEXT_COLUMNS if there >= set(names)), ())
    label = label_column or next((name for name in LABEL_COLUMNS if name in there), "")
    for key, found in (("text_columns", texts), ("label_column", label)):
        if not found:
            raise UserError(
                f"{record.where}: no column with a usual name; there are {column_names(there)}; set data.{key}"
            )
    return ClassColumns(texts, label)


def texts_of(record: Record, columns: ClassColumns) -> tuple[str, ...]:
    """Return the text or texts of a record; `UserError` if a value is not a text."""
    texts = tuple(column_value(record, column) for column in columns.texts)
    for column, text in zip(columns.texts, texts, strict=True):
        if not isinstance(text, str):
            raise UserError(f"{record.where}: column `{short_name(column)}` is not text but {type(text).__name__}")
        check_unicode(text, record, column)
    return texts
