"""Texts, or pairs of texts, with a class or a number each, as batches: the tasks of GLUE (Wang et al. 2018).

    texts   columns `sentence`; `text`; `sentence1`, `sentence2`; `premise`, `hypothesis`; ... or those that are named
    labels  integers or words: classes, numbered in sorted order; numbers with a fraction: regression

A text becomes the ids that its tokenizer gives it, special tokens included, so that whoever opens the trained model
gives it the same. Of a pair that is too long the longer text is cut, from its end, until both are as long or all fits.
Where the tokenizer's own template does not mark where the first text of a pair ends, a newline does, as if the two were
one text.

A classifier reads what the model makes of the last token, and transformers takes that for the rightmost one that is
not padding. So ids at the end of a text that are the padding's (an EOS, where no token is there to pad) are left off.

Which examples are in a batch is a function of (seed, number), as in `pretraining.batches`. The price: all ids are in
memory, 4 bytes a token.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import tokenizers
import torch

from relora.data.finetuning.records import Record
from relora.data.readers import column_names
from relora.data.sampling import Int64Array, permute
from relora.errors import UserError
from relora.messages import short_name, short_repr
from relora.model.head import IGNORED
from relora.seeding import keyed_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEXT_COLUMNS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
    ("sentence",),
    ("text",),
)
"""The usual names, looked for in this order: pairs first, since they may hold the name of a single one."""

LABEL_COLUMNS = ("label", "labels", "gold_label", "score")

CHUNK_RECORDS = 1024
"""Records that are encoded at a time."""

_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,17})")
_FRACTION = re.compile(r"[+-]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][+-]?[0-9]+)?")
_LARGEST = float(np.finfo(np.float32).max)

Label = int | float | str

ClassBatch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""input_ids [n, length], labels [n], lengths [n]: CPU tensors, the first and the last int64."""


@dataclass(frozen=True)
class ClassColumns:
    """Which columns of a record are its text or texts, and its label."""

    texts: tuple[str, ...]
    label: str


@dataclass(frozen=True, eq=False)
class ClassExamples:
    """Encoded examples: the ids of number i are `ids[bounds[i] : bounds[i + 1]]`, at least one."""

    ids: npt.NDArray[np.uint32]
    bounds: Int64Array
    labels: npt.NDArray[np.int64] | npt.NDArray[np.float32]
    """[examples]: numbers of classes, or what is to be predicted."""
    names: tuple[str, ...]
    """Of the classes, by number; none where numbers are predicted."""
    columns: ClassColumns
    places: tuple[str, ...]
    """Where each record stands, for a person."""
    pad_token_id: int
    cut: int
    """Examples that were longer than a sequence."""

    def __len__(self) -> int:
        return len(self.places)

    @property
    def content(self) -> str:
        """A fingerprint of all that a model sees of the examples."""
        digest = hashlib.blake2b(repr((self.names, self.pad_token_id)).encode(), digest_size=16)
        for part in (self.ids, self.bounds, self.labels):
            digest.update(part.tobytes())
        return digest.hexdigest()

    def take(self, numbers: Int64Array) -> ClassBatch:
        """These examples, padded on the right to the longest of them."""
        starts = self.bounds[numbers]
        lengths = self.bounds[numbers + 1] - starts
        input_ids = np.full((len(numbers), lengths.max()), self.pad_token_id, dtype=np.int64)
        for row, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
            input_ids[row, :length] = self.ids[start : start + length]
        return torch.from_numpy(input_ids), torch.from_numpy(self.labels[numbers]), torch.from_numpy(lengths)


class ClassBatches:
    """The batches of a run, by number: every epoch visits all examples once, each in an order of its own.

    `UserError` when there is less than one batch.
    """

    def __init__(self, examples: ClassExamples, *, sequences: int, seed: int) -> None:
        if len(examples) < sequences:
            raise UserError(
                f"data.train: {len(examples)} examples, one batch needs {sequences}; give more or lower batch.sequences"
            )
        self.examples = examples
        self.sequences = sequences
        self._seed = seed

    @property
    def steps_per_epoch(self) -> int:
        """Batches in which every example is met; the last goes on with the next epoch's."""
        return -(-len(self.examples) // self.sequences)

    @property
    def content(self) -> str:
        """A fingerprint of the examples."""
        return self.examples.content

    def batch(self, number: int) -> ClassBatch:
        """The batch of a number, counted from 0."""
        return self.examples.take(self._numbers(number))

    def place(self, number: int, sequences: range) -> str:
        """Which records the sequences of a batch are, for a person."""
        numbers = self._numbers(number)[sequences.start : sequences.stop].tolist()
        named = [self.examples.places[one] for one in numbers[:4]]
        more = [f"and {len(numbers) - 4} more"] if len(numbers) > 4 else []
        return f"batch {number:,}: {', '.join(named + more)}"

    def _numbers(self, number: int) -> Int64Array:
        """The examples of a batch, [sequences]."""
        size, first = len(self.examples), number * self.sequences
        epochs, positions = np.divmod(np.arange(first, first + self.sequences, dtype=np.int64), size)
        numbers = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():  # two, where an epoch ends within the batch
            now = epochs == epoch
            numbers[now] = permute(positions[now], size, keyed_seed(self._seed, "order", "classes", epoch))
        return numbers


class HeldOutClasses:
    """All examples in their order, `sequences` at a time."""

    def __init__(self, examples: ClassExamples, *, sequences: int) -> None:
        self.examples = examples
        self.sequences = sequences

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.examples) // self.sequences)

    def __iter__(self) -> Iterator[ClassBatch]:
        for start in range(0, len(self.examples), self.sequences):
            yield self.examples.take(np.arange(start, min(start + self.sequences, len(self.examples))))


def settle_padding(tokenizer: "PreTrainedTokenizerFast") -> int:
    """The id that fills batches up: the pad token, or EOS where there is none; saved, the tokenizer pads as we do."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return int(tokenizer.pad_token_id)


def encode_classes(
    records: Iterable[Record],
    tokenizer: "PreTrainedTokenizerFast",
    *,
    sequence_length: int,
    text_columns: Sequence[str] = (),
    label_column: str | None = None,
    like: ClassExamples | None = None,
) -> ClassExamples:
    """Records as examples of at most `sequence_length` ids.

    Args:
        tokenizer: after `settle_padding`.
        text_columns: one or two; found by their usual names unless given. So is `label_column`.
        like: the training examples, whose columns and classes hold for these, too.

    Raises:
        UserError: no records or columns, a text that is none, a label that is none, is not among the training
            examples' or leaves nothing to tell apart; it names the record.
    """
    remaining = iter(records)
    first = next(remaining, None)
    if first is None:
        raise UserError("classification: there is no record to read")
    columns = like.columns if like else _find_columns(first, text_columns, label_column)
    encoder = _Encoder(tokenizer, sequence_length, pair=len(columns.texts) == 2)
    ids: list[npt.NDArray[np.uint32]] = []
    labels: list[Label] = []
    places: list[str] = []
    chunk = [first, *islice(remaining, CHUNK_RECORDS - 1)]
    while chunk:
        ids += encoder.encode([_texts(record, columns) for record in chunk])
        labels += [_label(record, columns) for record in chunk]
        places += [record.where for record in chunk]
        chunk = list(islice(remaining, CHUNK_RECORDS))
    names = _class_names(labels, places) if like is None else like.names
    return ClassExamples(
        ids=np.concatenate(ids),
        bounds=np.cumsum([0, *map(len, ids)], dtype=np.int64),
        labels=_numbered(labels, names, places) if names else _numbers(labels, places),
        names=names,
        columns=columns,
        places=tuple(places),
        pad_token_id=encoder.pad_token_id,
        cut=encoder.cut,
    )


class _Encoder:
    """Ids of texts or pairs, none more than `length`; counts those that were `cut`."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", length: int, *, pair: bool) -> None:
        self._backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        around = [self._backend.num_special_tokens_to_add(is_pair) for is_pair in (False, True)]
        self._joined = pair and around[0] == around[1]
        self._length = length
        self._room = length - around[pair and not self._joined]
        self.pad_token_id = int(tokenizer.pad_token_id)
        self.cut = 0
        if self._room < 1 + pair:
            raise UserError(
                f"data.sequence_length ({length}) leaves no room for a text beside the special tokens; raise it"
            )

    def encode(self, texts: Sequence[tuple[str, ...]]) -> list[npt.NDArray[np.uint32]]:
        """The ids of each text or pair, at least one."""
        inputs: list[Any] = ["\n".join(parts) if self._joined or len(parts) == 1 else parts for parts in texts]
        encodings = self._backend.encode_batch(inputs)
        return [self._ids(encoding, len(parts[0])) for encoding, parts in zip(encodings, texts, strict=True)]

    def _ids(self, encoding: tokenizers.Encoding, first_chars: int) -> npt.NDArray[np.uint32]:
        ids = np.array(encoding.ids, dtype=np.uint32)
        if len(ids) > self._length:
            ids = ids[self._kept(encoding, first_chars)]
            self.cut += 1
        kept = np.flatnonzero(ids != self.pad_token_id)
        if len(kept):
            return ids[: kept[-1] + 1]
        return np.array([self.pad_token_id], dtype=np.uint32)  # an empty text; transformers reads the first one, too

    def _kept(self, encoding: tokenizers.Encoding, first_chars: int) -> npt.NDArray[np.bool_]:
        """Which ids stay: the template's, and of each text so many from its start."""
        kept = np.array(encoding.special_tokens_mask, dtype=np.bool_)
        if self._joined:  # the newline begins the second
            second = np.array([start >= first_chars for start, _ in encoding.offsets])
        else:
            second = np.array([text == 1 for text in encoding.sequence_ids])
        one, other = np.flatnonzero(~kept & ~second), np.flatnonzero(~kept & second)
        of_one, of_other = longest_first(len(one), len(other), self._room)
        kept[one[:of_one]] = kept[other[:of_other]] = True
        return kept


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of two texts, together too long, to keep: taken one by one from the longer, as transformers does.

    A last odd token goes to the longer, or to the second of two equals.
    """
    shorter = min(first, second, room // 2)
    return (shorter, room - shorter) if first <= second else (room - shorter, shorter)


def _find_columns(record: Record, text_columns: Sequence[str], label_column: str | None) -> ClassColumns:
    there = record.fields.keys()
    for name in (*text_columns, *([label_column] if label_column else [])):
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


def _value(record: Record, column: str) -> Any:
    if column not in record.fields:
        raise UserError(f"{record.where}: no column `{short_name(column)}`; there are {column_names(record.fields)}")
    return record.fields[column]


def _texts(record: Record, columns: ClassColumns) -> tuple[str, ...]:
    texts = tuple(_value(record, column) for column in columns.texts)
    for column, text in zip(columns.texts, texts, strict=True):
        if not isinstance(text, str):
            raise UserError(f"{record.where}: column `{short_name(column)}` is not text but {type(text).__name__}")
        _check_unicode(text, record, column)
    return texts


def _check_unicode(text: str, record: Record, column: str) -> None:
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise UserError(f"{record.where}: half of a surrogate pair in column `{short_name(column)}`")


def _label(record: Record, columns: ClassColumns) -> Label:
    """A label as it is meant: of a text (all values of a CSV are) that spells a number, that number."""
    value = _value(record, columns.label)
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value.strip():
        _check_unicode(value, record, columns.label)
        return _spelt(value.strip())
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise UserError(
        f"{record.where}: column `{short_name(columns.label)}` is {short_repr(value)}, "
        "which is neither class nor number"
    )


def _spelt(text: str) -> Label:
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _FRACTION.fullmatch(text) else text


def _name(label: Label) -> str:
    return str(int(label) if isinstance(label, float) and label.is_integer() else label)


def _class_names(labels: Sequence[Label], places: Sequence[str]) -> tuple[str, ...]:
    """The classes in sorted order, integers by value; none where the labels are numbers with a fraction."""
    kinds = {type(label): place for label, place in zip(labels, places, strict=True)}
    if float in kinds:
        if str in kinds:
            raise UserError(f"{kinds[str]}: the label is a word, that of {kinds[float]} a number with a fraction")
        return ()
    names = [_name(label) for label in sorted(set(labels), key=str if str in kinds else int)]
    if len(names) == 1:
        raise UserError(f"{places[0]}: every label is {short_repr(names[0])}; give examples of another class, too")
    return tuple(names)


def _numbered(labels: Sequence[Label], names: Sequence[str], places: Sequence[str]) -> Int64Array:
    """The number of each label's class."""
    numbers = {name: number for number, name in enumerate(names)}
    for label, place in zip(labels, places, strict=True):
        if _name(label) not in numbers:
            raise UserError(
                f"{place}: the label {short_repr(label)} is none of the training data's: {column_names(names)}"
            )
    return np.array([numbers[_name(label)] for label in labels], dtype=np.int64)


def _numbers(labels: Sequence[Label], places: Sequence[str]) -> npt.NDArray[np.float32]:
    """What is to be predicted. The number that marks what no loss counts becomes its neighbour."""
    for label, place in zip(labels, places, strict=True):
        if isinstance(label, str) or not abs(label) <= _LARGEST:
            raise UserError(f"{place}: the label {short_repr(label)} is no number, as the training data's are")
    numbers = np.array(labels, dtype=np.float32)
    return np.where(numbers == IGNORED, np.nextafter(numbers, np.float32(0)), numbers)
