"""Records without a label are left out before the split, and each class gives its share of the held-out records."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relora.data.finetuning.labelled import read_labels, split_labelled
from relora.data.finetuning.records import Record
from relora.errors import UserError


def records_of(labels: list[Any], texts: list[str] | None = None) -> list[Record]:
    texts = texts or [f"text {number}" for number in range(len(labels))]
    pairs = enumerate(zip(texts, labels, strict=True), start=1)
    return [Record(f"c.jsonl, line {number}", {"text": text, "label": label}) for number, (text, label) in pairs]


def counts(records: list[Record]) -> Counter[Any]:
    return Counter(record.fields["label"] for record in records)


@pytest.mark.parametrize("mark", [-1, "-1", -100, None, "", "nan", float("nan")])
def test_records_without_a_label_are_in_no_part_of_a_split(mark: Any) -> None:
    labels = [mark if number % 5 else number // 5 % 2 for number in range(120)]  # most have none
    found = read_labels(records_of(labels))
    assert (
        len(found.records) == 24 and len(found.left_out) == 1 and ": 96, first in c.jsonl, line 2" in found.left_out[0]
    )
    train, held_out = split_labelled(found, 0.1, seed=0)
    assert counts(train) == {0: 11, 1: 11} and counts(held_out) == {0: 1, 1: 1}


def test_a_record_without_the_column_has_no_label() -> None:
    rows = [{"text": f"text {number}", **({"score": number % 2} if number % 3 else {})} for number in range(30)]
    records = [Record(f"line {number}", row) for number, row in enumerate(rows, start=1)]
    for options in ({}, {"label_column": "score"}):
        found = read_labels(records, **options)
        assert (found.columns.label, len(found.records)) == ("score", 20)
        assert found.left_out == ("records left out, without a label (null, NaN or empty): 10, first in line 1",)
    with pytest.raises(UserError, match="line 1: no column `label`; there are `text`"):
        read_labels(records, label_column="label")


def test_each_class_gives_its_share() -> None:
    found = read_labels(records_of(["often"] * 900 + ["rare"] * 40 + ["single"]))
    train, held_out = split_labelled(found, 0.05, seed=3)
    assert counts(held_out) == {"often": 45, "rare": 2}
    assert counts(train) == {"often": 855, "rare": 38, "single": 1}
    other = [record.where for record in split_labelled(found, 0.05, seed=4)[1]]
    assert [record.where for record in held_out] != other


@settings(max_examples=100)
@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6)), min_size=2, max_size=60),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 3),
    data=st.data(),
)
def test_a_split_keeps_classes_and_equal_records_together(
    rows: list[tuple[int, int]], share: float, seed: int, data: st.DataObject
) -> None:
    """Its choice depends on contents alone; every class is trained on; all records are in one part."""
    classes = {label for label, _ in rows}
    records = records_of([f"class {label}" for label, _ in rows], [str(text) for _, text in rows])
    if len(classes) < 2 or len(set(rows)) == len(classes):
        with pytest.raises(UserError, match=r"every label is|too few different ones of a class"):
            split_labelled(read_labels(records), share, seed)
        return
    train, held_out = split_labelled(read_labels(records), share, seed)
    assert sorted(record.where for record in train + held_out) == sorted(record.where for record in records)
    assert held_out and counts(train).keys() == {f"class {label}" for label in classes}
    contents = [{(record.fields["label"], record.fields["text"]) for record in part} for part in (train, held_out)]
    assert not contents[0] & contents[1]
    again = split_labelled(read_labels(data.draw(st.permutations(records))), share, seed)
    assert {record.where for record in again[1]} == {record.where for record in held_out}


def test_numbers_to_be_predicted_are_split_by_content_alone() -> None:
    found = read_labels(records_of([number / 4 for number in range(200)]))
    train, held_out = split_labelled(found, 0.2, seed=0)
    assert 20 <= len(held_out) <= 60 and len(train) + len(held_out) == 200
