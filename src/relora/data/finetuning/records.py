"""The records of all sources of fine-tuning data, in a fixed order, and their split into training and held-out data.

A record is one mapping of column to value. `data.sources` says which sources there are and how they are read; a plain
text file gives records with the one column `text`, which is the layout `completion`.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from relora.data.readers import column_names
from relora.data.sampling import DRAWS, SplitRule
from relora.data.sources import SourceReader
from relora.errors import UserError
from relora.messages import short_name

SKIP_OPTION = "data.skip_bad"
"""Key of a run's configuration that leaves records out which cannot be used."""


@dataclass(frozen=True)
class Record:
    """One record, and its place for messages, such as `a.jsonl, line 3`."""

    where: str
    fields: Mapping[str, Any]


class Records(SourceReader[Record]):
    """The records of all sources, in order, as often as asked.

    Args:
        sources: paths or hub ids, see `data.sources`.
        skip_bad: count records that cannot be read (`skipped_records`) instead of refusing them. None refuses them in
            a command that has no such option, so the message does not name it.

    Raises:
        UserError: a source is not there; while reading, that a file or record cannot be read.
    """

    preferred_kinds = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
    item_name = "record"

    def __init__(self, sources: Sequence[str], *, skip_bad: bool | None = None) -> None:
        super().__init__(sources, skip_bad=bool(skip_bad))
        self.skip_option = "" if skip_bad is None else SKIP_OPTION

    def __iter__(self) -> Iterator[Record]:
        self.start_pass()
        for source in self.sources:
            for part in self.parts(source):
                yield from part

    def item_of(self, where: str, fields: Mapping[str, Any]) -> Record:
        """Return the record as it is; which columns it needs depends on its layout."""
        return Record(where, fields)


def split(records: Sequence[Record], share: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Return (training records, held-out records).

    A record is held out when a keyed hash of its content is below `share`, so the choice depends neither on the order
    nor on the tokenizer, and equal records are on the same side. The share is met on average. Where it would leave a
    side empty, only the record with the lowest hash, and those equal to it, are held out.

    Raises:
        UserError: `share` is not in [0, 1), or all records are equal.
    """
    if not 0 <= share < 1:
        raise UserError(f"a validation share of {share}: must be at least 0 and less than 1")
    if share == 0:
        return list(records), []
    draws = draws_of(records, seed)
    threshold = int(share * DRAWS)
    held_out_count = sum(draw < threshold for draw in draws)
    if held_out_count in (0, len(draws)):
        threshold = min(draws, default=0) + 1
    train = [record for record, draw in zip(records, draws, strict=True) if draw >= threshold]
    if not train:
        raise UserError(
            f"{len(records)} record(s), too few different ones to hold any out; "
            "give more, or a validation set of its own"
        )
    return train, [record for record, draw in zip(records, draws, strict=True) if draw < threshold]


def draws_of(records: Iterable[Record], seed: int) -> list[int]:
    """Return a keyed hash of the content of each record, uniformly distributed in range(`sampling.DRAWS`)."""
    rule = SplitRule(seed, 0)
    return [rule.draw(json.dumps(record.fields, sort_keys=True, default=str)) for record in records]


def column_value(record: Record, column: str) -> Any:
    """Return the value in a column; `UserError` if the record lacks it."""
    if column not in record.fields:
        raise UserError(f"{record.where}: no column `{short_name(column)}`; there are {column_names(record.fields)}")
    return record.fields[column]


def check_unicode(text: str, record: Record, column: str) -> None:
    """Raise `UserError` if a text contains half of a surrogate pair: JSON can spell it, no tokenizer can encode it."""
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise UserError(f"{record.where}: half of a surrogate pair in column `{short_name(column)}`")
