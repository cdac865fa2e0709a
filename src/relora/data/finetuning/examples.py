"""Which examples are in a batch: a pure function of (seed, number), as in `relora.data.pretraining.batches`.

An example is a text's tokens and which of them are scored. In a row of a batch

    input_ids = tokens[:-1]        labels[i] = tokens[i + 1] where that is scored, else -100

and rows are padded on the right, to the longest one of their batch; under causal attention no position sees what comes
after it, so padding needs no mask. A row is one example, or several (`relora.data.finetuning.packing`).

Each epoch visits all rows once, in an order of its own. Grouped by length, the order is shuffled, cut into pools of
`POOL` batches, each pool sorted by length and cut into batches, and the batches are shuffled: rows of one batch are of
about one length, little is padding, and which rows meet is still mostly chance.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from relora.data.finetuning.packing import pack
from relora.data.sampling import Int64Array, permute
from relora.errors import UserError
from relora.model.head import IGNORED
from relora.seeding import keyed_seed

POOL = 50
"""Batches that are sorted by length together."""

MULTIPLE = 8
"""Rows are padded to a multiple of so many positions, which kernels like; never beyond the sequence length."""


@dataclass(frozen=True, eq=False)
class Example:
    """The tokens of an example, and which of them are scored: two arrays [tokens]."""

    input_ids: npt.NDArray[np.int32]
    scored: npt.NDArray[np.bool_]
    where: str = ""
    """The record, for a person."""

    @property
    def positions(self) -> int:
        """Of a row, that it takes."""
        return len(self.input_ids) - 1

    @property
    def targets(self) -> int:
        """Labels that count. The first token is none, for nothing stands before it."""
        return int(np.count_nonzero(self.scored[1:]))


class ExampleBatches:
    """The batches of a run, by number.

    Args:
        examples: none longer than `sequence_length` + 1 tokens.
        sequences: rows per optimizer step.
        sequence_length: most positions of a row.
        pad_id: what fills rows up; any id will do.
        packing: several examples in a row; batches then have position numbers, too.
        group_by_length: batches of rows of about one length.
        seed: the run's.

    `UserError` when there is less than one batch.
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
        self._pad_id = pad_id
        self._seed = seed
        lengths = [example.positions for example in examples]
        if max(lengths, default=0) > sequence_length:
            raise UserError(f"examples of up to {max(lengths) + 1} tokens do not fit sequences of {sequence_length}")
        self.rows = pack(lengths, sequence_length, seed) if packing else [[number] for number in range(len(examples))]
        self._lengths = np.array([sum(lengths[number] for number in row) for row in self.rows], dtype=np.int64)
        self._grouped = _Grouped(self._lengths, sequences, seed) if group_by_length else None
        if len(self.rows) < sequences:
            packed = f" in {len(self.rows):,} packed rows" if packing else ""
            raise UserError(
                f"{len(examples):,} examples{packed}, one batch needs {sequences}; give more or lower batch.sequences"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Batches in which every row is met; the last goes on with the next epoch's."""
        return -(-len(self.rows) // self.sequences)

    @property
    def content(self) -> str:
        """A fingerprint of all that a model sees of the examples."""
        return fingerprint(self.examples)

    def batch(self, number: int) -> tuple[torch.Tensor, ...]:
        """The batch of a number, counted from 0: (input_ids, labels), packed also position_ids; [sequences, length]."""
        rows = [[self.examples[one] for one in self.rows[row]] for row in self._rows_of(number)]
        input_ids, labels, positions = _filled(rows, self._pad_id, self.sequence_length)
        return (input_ids, labels, positions) if self.packing else (input_ids, labels)

    def place(self, number: int, sequences: range) -> str:
        """Which records are in sequences of a batch, for a person."""
        rows = self._rows_of(number)[sequences.start : sequences.stop]
        records = [self.examples[one].where for row in rows for one in self.rows[row]]
        more = [f"and {len(records) - 4} more"] if len(records) > 4 else []
        return f"batch {number:,}: {', '.join(records[:4] + more)}"

    def _rows_of(self, number: int) -> list[int]:
        """The rows of a batch."""
        first = number * self.sequences
        epochs, offsets = np.divmod(np.arange(first, first + self.sequences, dtype=np.int64), len(self.rows))
        rows = np.empty_like(offsets)
        for epoch in np.unique(epochs).tolist():  # two, where an epoch ends within the batch
            now = epochs == epoch
            if self._grouped is None:
                rows[now] = permute(offsets[now], len(self.rows), _order_key(self._seed, epoch))
            else:
                rows[now] = self._grouped.order(epoch)[offsets[now]]
        found: list[int] = rows.tolist()
        return found


class HeldOutExamples:
    """The first examples that hold `tokens` scored tokens between them, the same ones every time, the longest first.

    Iterating yields `(input_ids, labels)` of `micro_sequences` rows (the last batch may hold fewer).
    """

    def __init__(self, examples: Sequence[Example], *, micro_sequences: int, pad_id: int, tokens: int) -> None:
        if not examples:
            raise UserError("evaluation needs at least one example, here is none")
        ends = np.cumsum([example.targets for example in examples])
        first = examples[: int(np.searchsorted(ends, tokens)) + 1]
        self.examples = sorted(first, key=lambda example: -example.positions)  # so that little is padding
        self.targets = int(ends[len(first) - 1])
        """Labels that count, over all batches."""
        self._micro_sequences = micro_sequences
        self._pad_id = pad_id

    @property
    def content(self) -> str:
        """A fingerprint of all that a model sees of the examples."""
        return fingerprint(self.examples)

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.examples) // self._micro_sequences)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        longest = self.examples[0].positions
        for start in range(0, len(self.examples), self._micro_sequences):
            rows = [[example] for example in self.examples[start : start + self._micro_sequences]]
            input_ids, labels, _ = _filled(rows, self._pad_id, longest)
            yield input_ids, labels


def fingerprint(examples: Sequence[Example]) -> str:
    """A hash of the examples' tokens, of what is scored, and of their order."""
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        digest.update(len(example.input_ids).to_bytes(8, "little"))
        digest.update(example.input_ids.astype("<i4").tobytes())
        digest.update(example.scored.tobytes())
    return digest.hexdigest()


def _filled(
    rows: Sequence[Sequence[Example]], pad_id: int, most: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(input_ids, labels, position_ids), each [rows, positions], int64.

    What fills a row up is numbered as one more example, so that no example is longer for it.
    """
    longest = max(sum(example.positions for example in row) for row in rows)
    width = max(longest, min(-(-longest // MULTIPLE) * MULTIPLE, most))
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


class _Grouped:
    """The orders of epochs, grouped by length."""

    def __init__(self, lengths: Int64Array, sequences: int, seed: int) -> None:
        self._lengths = lengths
        self._sequences = sequences
        self._seed = seed
        self._orders: dict[int, Int64Array] = {}

    def order(self, epoch: int) -> Int64Array:
        """All rows, as an epoch visits them, [rows]; the last two epochs' are kept, for they cost a sort."""
        if epoch not in self._orders:
            self._orders = {known: order for known, order in self._orders.items() if abs(known - epoch) == 1}
            self._orders[epoch] = self._drawn(epoch)
        return self._orders[epoch]

    def _drawn(self, epoch: int) -> Int64Array:
        size, pool = len(self._lengths), POOL * self._sequences
        shuffled = permute(np.arange(size), size, _order_key(self._seed, epoch))
        # the batches in which an epoch begins and ends hold rows of two epochs, so those are left as they were drawn
        begun = -(epoch * size) % self._sequences
        head, whole, tail = np.split(shuffled, [begun, size - (size - begun) % self._sequences])
        pools = np.split(whole, range(pool, len(whole), pool))
        by_length = [part[np.argsort(self._lengths[part], kind="stable")] for part in pools]
        batches = np.concatenate(by_length).reshape(-1, self._sequences)
        turns = permute(np.arange(len(batches)), len(batches), keyed_seed(self._seed, "batches", epoch))
        return np.concatenate([head, batches[turns].ravel(), tail])


def _order_key(seed: int, epoch: int) -> int:
    return keyed_seed(seed, "order", "examples", epoch)
