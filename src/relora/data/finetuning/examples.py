"""Batches of examples, as a pure function of (seed, number), like those of `relora.data.pretraining.batches`.

An example is the tokens of a text, and for each token whether it is scored. In a row of a batch

    input_ids = tokens[:-1]        labels[i] = tokens[i + 1] if that token is scored, else -100

Rows are padded on the right to the longest row of their batch. Under causal attention no position depends on later
ones, so padding needs no mask. A row has one example, or several (`relora.data.finetuning.packing`).

Every epoch visits all rows once, in an order of its own. Grouping by length shuffles the rows, cuts them into pools of
`POOL` batches, sorts each pool by length, cuts it into batches, and shuffles the batches. So the rows of a batch have
similar lengths and little padding, and are still drawn almost independently.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from relora.data.finetuning.packing import pack
from relora.data.sampling import Int64Array, keyed_sample, permute
from relora.errors import UserError
from relora.model.head import IGNORED
from relora.seeding import keyed_seed

POOL = 50
"""Number of batches in a pool that is sorted by length."""

MULTIPLE = 8
"""Rows are padded to a multiple of this many positions, for which kernels are faster; never beyond the sequence
length."""


@dataclass(frozen=True, eq=False)
class Example:
    """The tokens of an example, and for each whether it is scored: two arrays [tokens]."""

    input_ids: npt.NDArray[np.int32]
    scored: npt.NDArray[np.bool_]
    where: str = ""
    """Place of the record, for messages."""

    @property
    def positions(self) -> int:
        """Number of positions of a row that the example takes: one less than it has tokens."""
        return len(self.input_ids) - 1

    @property
    def targets(self) -> int:
        """Number of scored tokens. The first token does not count, because no token precedes it."""
        return int(np.count_nonzero(self.scored[1:]))


class ExampleBatches:
    """The training batches of a run, by number.

    Args:
        examples: the examples, none longer than `sequence_length` + 1 tokens.
        sequences: rows per optimizer step.
        sequence_length: most positions of a row.
        pad_id: the id for padding; any id of the vocabulary is possible.
        packing: put several examples into a row; batches then also have position numbers.
        group_by_length: make batches of rows of similar lengths.
        seed: the run's seed, which keys the order.

    Raises:
        UserError: there are not enough examples for one batch, or one is too long.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        sequences: int,
        sequence_length: int,
        pad_id: int,
        packing: bool = False,
        group_by_length: bool = False,
        seed: int = 0,
    ) -> None:
        self.examples = examples
        self.sequences = sequences
        self.sequence_length = sequence_length
        self.packing = packing
        self.multiple = MULTIPLE
        """Rows are padded to a multiple of this many positions; a model may take no others."""
        self._pad_id = pad_id
        self._seed = seed
        lengths = [example.positions for example in examples]
        if max(lengths, default=0) > sequence_length:
            raise UserError(f"examples of up to {max(lengths) + 1} tokens do not fit sequences of {sequence_length}")
        self.rows = pack(lengths, sequence_length, seed) if packing else [[number] for number in range(len(examples))]
        self._lengths = np.array([sum(lengths[number] for number in row) for row in self.rows], dtype=np.int64)
        self._length_grouping = _LengthGrouping(self._lengths, sequences, seed) if group_by_length else None
        if len(self.rows) < sequences:
            packed = f" in {len(self.rows):,} packed rows" if packing else ""
            raise UserError(
                f"{len(examples):,} examples{packed}, one batch needs {sequences}; give more or lower batch.sequences"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches that cover all rows; the last one may continue into the next epoch."""
        return -(-len(self.rows) // self.sequences)

    @property
    def longest(self) -> int:
        """Positions of the longest batch."""
        return _width(int(self._lengths.max()), self.sequence_length, self.multiple)

    @property
    def content(self) -> str:
        """A fingerprint of the examples, as far as a model sees them."""
        return fingerprint(self.examples)

    def batch(self, number: int) -> tuple[torch.Tensor, ...]:
        """Return the batch with this number, counted from 0.

        Returns:
            (input_ids, labels), with packing (input_ids, labels, position_ids); each [sequences, length] int64.
        """
        rows = [[self.examples[index] for index in self.rows[row]] for row in self._rows_of(number)]
        input_ids, labels, positions = _padded(rows, self._pad_id, self.sequence_length, self.multiple)
        return (input_ids, labels, positions) if self.packing else (input_ids, labels)

    def place(self, number: int, sequences: range) -> str:
        """Describe for a message which records are in rows of a batch.

        Args:
            number: of the batch.
            sequences: rows of the batch.
        """
        rows = self._rows_of(number)[sequences.start : sequences.stop]
        records = [self.examples[index].where for row in rows for index in self.rows[row]]
        more = [f"and {len(records) - 4} more"] if len(records) > 4 else []
        return f"batch {number:,}: {', '.join(records[:4] + more)}"

    def _rows_of(self, number: int) -> list[int]:
        """Return the numbers of the rows in a batch."""
        first = number * self.sequences
        epochs, offsets = np.divmod(np.arange(first, first + self.sequences, dtype=np.int64), len(self.rows))
        rows = np.empty_like(offsets)
        for epoch in np.unique(epochs).tolist():  # more than one where an epoch ends within the batch
            in_epoch = epochs == epoch
            if self._length_grouping is None:
                rows[in_epoch] = permute(offsets[in_epoch], len(self.rows), _order_key(self._seed, epoch))
            else:
                rows[in_epoch] = self._length_grouping.order(epoch)[offsets[in_epoch]]
        found: list[int] = rows.tolist()
        return found


class HeldOutExamples:
    """Held-out examples as batches, the same ones in every evaluation: all, or a sample of them.

    Iterating yields `(input_ids, labels)` of `micro_sequences` rows, the longest examples first, so that there is
    little padding; the last batch may have fewer rows.

    Args:
        examples: the held-out examples.
        micro_sequences: examples per batch.
        pad_id: the id for padding.
        tokens: most scored tokens of a sample (`sampling.keyed_sample`), unless a single example has more; by default
            all examples are used.
        seed: the run's seed, which keys the sample.

    Raises:
        UserError: there is no example.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        micro_sequences: int,
        pad_id: int,
        tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        if not examples:
            raise UserError("evaluation needs at least one example, here is none")
        self.whole = sorted(examples, key=lambda example: -example.positions)
        """All held-out examples, the longest first."""
        sizes = np.array([example.targets for example in self.whole], dtype=np.int64)
        self.whole_targets = int(sizes.sum())
        """Number of scored tokens of all held-out examples."""
        drawn = np.arange(len(sizes)) if tokens is None else keyed_sample(sizes, tokens, keyed_seed(seed, "held out"))
        self.examples = [self.whole[number] for number in drawn.tolist()]
        self.targets = int(sizes[drawn].sum())
        """Number of scored tokens, over all batches."""
        self._micro_sequences = micro_sequences
        self._pad_id = pad_id

    @property
    def content(self) -> str:
        """A fingerprint of all held-out examples, as far as a model sees them."""
        return fingerprint(self.whole)

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.examples) // self._micro_sequences)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        longest = self.examples[0].positions
        for start in range(0, len(self.examples), self._micro_sequences):
            rows = [[example] for example in self.examples[start : start + self._micro_sequences]]
            input_ids, labels, _ = _padded(rows, self._pad_id, longest)
            yield input_ids, labels


def fingerprint(examples: Sequence[Example]) -> str:
    """Return a hash of the examples: their tokens, which of them are scored, and their order."""
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        digest.update(len(example.input_ids).to_bytes(8, "little"))
        digest.update(example.input_ids.astype("<i4").tobytes())
        digest.update(example.scored.tobytes())
    return digest.hexdigest()


def _width(longest: int, most: int, multiple: int) -> int:
    """Return the positions of a batch, given those of its longest row and the most that a row may have."""
    return max(longest, min(-(-longest // multiple) * multiple, most))


def _padded(
    rows: Sequence[Sequence[Example]], pad_id: int, most: int, multiple: int = MULTIPLE
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Put examples into rows of equal length.

    Args:
        rows: the examples of each row.
        pad_id: the id for padding.
        most: most positions of a row.
        multiple: what their number is rounded up to, if that is not more.

    Returns:
        (input_ids, labels, position_ids), each [rows, positions] int64. Position numbers start at 0 with every example,
        and with the padding, which so is not part of the last example.
    """
    width = _width(max(sum(example.positions for example in row) for row in rows), most, multiple)
    input_ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    labels = np.full((len(rows), width), IGNORED, dtype=np.int64)
    positions = np.empty((len(rows), width), dtype=np.int64)
    for number, row in enumerate(rows):
        end = 0
        for example in row:
            start, end = end, end + example.positions
            input_ids[number, start:end] = example.input_ids[:-1]
            labels[number, start:end] = np.where(example.scored[1:], example.input_ids[1:], IGNORED)
            positions[number, start:end] = np.arange(end - start)
        positions[number, end:] = np.arange(width - end)
    return torch.from_numpy(input_ids), torch.from_numpy(labels), torch.from_numpy(positions)


class _LengthGrouping:
    """The order of the rows in each epoch, grouped by length.

    Args:
        lengths: positions of each row, [rows].
        sequences: rows per batch.
        seed: keys the order.
    """

    def __init__(self, lengths: Int64Array, sequences: int, seed: int) -> None:
        self._lengths = lengths
        self._sequences = sequences
        self._seed = seed
        self._orders: dict[int, Int64Array] = {}

    def order(self, epoch: int) -> Int64Array:
        """Return the numbers of all rows in the order of an epoch, [rows].

        Because an order costs a sort, those of two neighbouring epochs are kept.
        """
        if epoch not in self._orders:
            self._orders = {known: order for known, order in self._orders.items() if abs(known - epoch) == 1}
            self._orders[epoch] = self._draw_order(epoch)
        return self._orders[epoch]

    def _draw_order(self, epoch: int) -> Int64Array:
        """Draw the order of an epoch, [rows]."""
        size, pool = len(self._lengths), POOL * self._sequences
        shuffled = permute(np.arange(size), size, _order_key(self._seed, epoch))
        # The first and the last batch of an epoch may contain rows of two epochs. The rows in them are not sorted.
        head_rows = -(epoch * size) % self._sequences
        head, middle, tail = np.split(shuffled, [head_rows, size - (size - head_rows) % self._sequences])
        pools = np.split(middle, range(pool, len(middle), pool))
        by_length = [part[np.argsort(self._lengths[part], kind="stable")] for part in pools]
        batches = np.concatenate(by_length).reshape(-1, self._sequences)
        turns = permute(np.arange(len(batches)), len(batches), keyed_seed(self._seed, "batches", epoch))
        return np.concatenate([head, batches[turns].ravel(), tail])


def _order_key(seed: int, epoch: int) -> int:
    """Return the key of an epoch's permutation of the rows."""
    return keyed_seed(seed, "order", "examples", epoch)
