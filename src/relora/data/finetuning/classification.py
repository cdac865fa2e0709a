"""Examples for classification and regression: texts or pairs of texts, each with a class or a number.

These are the tasks of GLUE (Wang et al. 2018).

    texts   columns `sentence`; `text`; `sentence1`, `sentence2`; `premise`, `hypothesis`; ... or those that are named
    labels  integers or words: classes, numbered in sorted order; numbers with a fraction: regression

`labelled` finds the columns and leaves out records without a label; `class_encoder` says how texts become ids.

The examples of a batch are a pure function of (seed, number), as in `pretraining.batches`. The price: the ids of all
examples are in memory, 4 bytes per token.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from relora.data.finetuning.class_encoder import ClassEncoder
from relora.data.finetuning.labelled import ClassColumns, read_labels, texts_of
from relora.data.finetuning.labels import Unlabelled, class_names, class_numbers, regression_targets
from relora.data.finetuning.records import Record
from relora.data.sampling import Int64Array, keyed_sample, permute
from relora.errors import UserError
from relora.seeding import keyed_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHUNK_RECORDS = 1024
"""Number of records that are encoded at a time."""

ClassBatch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""(input_ids [n, length], labels [n], lengths [n]): CPU tensors, int64 except the fp32 labels of a regression."""


@dataclass(frozen=True, eq=False)
class ClassExamples:
    """Encoded examples: the ids of example i are `ids[bounds[i] : bounds[i + 1]]`, at least one."""

    ids: npt.NDArray[np.uint32]
    bounds: Int64Array
    labels: npt.NDArray[np.int64] | npt.NDArray[np.float32]
    """Numbers of the classes, or the numbers to be predicted; [examples]."""
    names: tuple[str, ...]
    """Names of the classes, by their number; empty for a regression."""
    columns: ClassColumns
    places: tuple[str, ...]
    """Place of each record, for messages."""
    pad_token_id: int
    cut: int
    """Number of examples that were longer than a sequence."""
    notes: tuple[str, ...] = ()
    """Lines about records that have no label, and columns that are not used."""

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.places)

    @property
    def lacking(self) -> list[str]:
        """Names of the classes that no example has."""
        there = set(self.labels.tolist())
        return [name for number, name in enumerate(self.names) if number not in there]

    @property
    def content(self) -> str:
        """A fingerprint of the examples, as far as a model sees them."""
        digest = hashlib.blake2b(repr((self.names, self.pad_token_id)).encode(), digest_size=16)
        for part in (self.ids, self.bounds, self.labels):
            digest.update(part.tobytes())
        return digest.hexdigest()

    def take(self, numbers: Int64Array) -> ClassBatch:
        """Return the examples with these numbers, padded on the right to the longest of them."""
        starts = self.bounds[numbers]
        lengths = self.bounds[numbers + 1] - starts
        input_ids = np.full((len(numbers), lengths.max()), self.pad_token_id, dtype=np.int64)
        for row, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
            input_ids[row, :length] = self.ids[start : start + length]
        return torch.from_numpy(input_ids), torch.from_numpy(self.labels[numbers]), torch.from_numpy(lengths)


class ClassBatches:
    """The training batches of a run, by number: every epoch visits all examples once, in an order of its own.

    Args:
        examples: the training examples.
        sequences: examples per optimizer step.
        seed: the run's seed, which keys the order.

    Raises:
        UserError: there are fewer examples than one batch needs.
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
        """Number of batches that cover all examples; the last one may continue into the next epoch."""
        return -(-len(self.examples) // self.sequences)

    @property
    def content(self) -> str:
        """A fingerprint of the examples, as far as a model sees them."""
        return self.examples.content

    def batch(self, number: int) -> ClassBatch:
        """Return the batch with this number, counted from 0."""
        return self.examples.take(self._numbers(number))

    def place(self, number: int, sequences: range) -> str:
        """Describe for a message which records are in a batch.

        Args:
            number: of the batch.
            sequences: examples of the batch.
        """
        numbers = self._numbers(number)[sequences.start : sequences.stop].tolist()
        named = [self.examples.places[index] for index in numbers[:4]]
        more = [f"and {len(numbers) - 4} more"] if len(numbers) > 4 else []
        return f"batch {number:,}: {', '.join(named + more)}"

    def _numbers(self, number: int) -> Int64Array:
        """Return the numbers of the examples in a batch, [sequences]."""
        size, first = len(self.examples), number * self.sequences
        epochs, positions = np.divmod(np.arange(first, first + self.sequences, dtype=np.int64), size)
        numbers = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():  # more than one where an epoch ends within the batch
            in_epoch = epochs == epoch
            key = keyed_seed(self._seed, "order", "classes", epoch)
            numbers[in_epoch] = permute(positions[in_epoch], size, key)
        return numbers


class HeldOutClasses:
    """Held-out examples as batches, the same ones in every evaluation, in their order: all, or a sample of them.

    Args:
        examples: the held-out examples.
        sequences: examples per batch.
        tokens: most ids of a sample (`sampling.keyed_sample`), unless a single example has more; by default all
            examples are used.
        seed: the run's seed, which keys the sample.
    """

    def __init__(self, examples: ClassExamples, *, sequences: int, tokens: int | None = None, seed: int = 0) -> None:
        self.examples = examples
        self.sequences = sequences
        lengths = np.diff(examples.bounds)
        self._drawn = np.arange(len(lengths))
        if tokens is not None:
            by_label = np.argsort(examples.labels, kind="stable")  # so that the sample has the shares of the whole
            self._drawn = np.sort(by_label[keyed_sample(lengths[by_label], tokens, keyed_seed(seed, "held out"))])

    @property
    def targets(self) -> int:
        """Number of examples, over all batches."""
        return len(self._drawn)

    @property
    def whole_targets(self) -> int:
        """Number of all held-out examples."""
        return len(self.examples)

    @property
    def content(self) -> str:
        """Fingerprint of all held-out examples."""
        return self.examples.content

    def __len__(self) -> int:
        """Number of batches."""
        return -(-self.targets // self.sequences)

    def __iter__(self) -> Iterator[ClassBatch]:
        for start in range(0, self.targets, self.sequences):
            yield self.examples.take(self._drawn[start : start + self.sequences])


def settle_padding(tokenizer: "PreTrainedTokenizerFast") -> int:
    """Return the padding id: that of the tokenizer's pad token, or EOS if it has none.

    The tokenizer itself is changed, so that once saved it pads with the same token, on the same side.
    """
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
    unlabelled: Unlabelled = "auto",
    like: ClassExamples | None = None,
) -> ClassExamples:
    """Encode records as examples of at most `sequence_length` ids.

    Args:
        records: the records of one data set.
        tokenizer: the tokenizer, after `settle_padding`.
        sequence_length: most ids of an example.
        text_columns: one or two columns; unless given, they are found by their usual names.
        label_column: likewise.
        unlabelled: labels that stand for none, see `labels.why_unlabelled`.
        like: the training examples, if these are held-out ones: their columns and classes are used.

    Raises:
        UserError: there are no records or no such columns, a text or label cannot be used, a label does not occur in
            the training examples, or all labels are equal. The message names the record.
    """
    found = read_labels(
        records,
        text_columns=text_columns,
        label_column=label_column,
        unlabelled=unlabelled,
        like=None if like is None else (like.columns, like.names),
    )
    columns, labels, places = found.columns, found.labels, found.places
    encoder = ClassEncoder(tokenizer, sequence_length, pair=len(columns.texts) == 2)
    ids: list[npt.NDArray[np.uint32]] = []
    for start in range(0, len(labels), CHUNK_RECORDS):
        ids += encoder.encode([texts_of(record, columns) for record in found.records[start : start + CHUNK_RECORDS]])
    names = class_names(labels, places) if like is None else like.names
    notes = [*found.unused, *found.left_out]
    if names and float in map(type, labels):
        notes.append("label column of whole numbers, some written as 1.0, taken as classes")
    return ClassExamples(
        ids=np.concatenate(ids),
        bounds=np.cumsum([0, *map(len, ids)], dtype=np.int64),
        labels=class_numbers(labels, names, places) if names else regression_targets(labels, places),
        names=names,
        columns=columns,
        places=places,
        pad_token_id=encoder.pad_token_id,
        cut=encoder.cut,
        notes=tuple(notes),
    )
