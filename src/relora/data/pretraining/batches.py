"""Which tokens are in a batch: a pure function of (seed, step), so resuming needs no loader state and no replay.

The token stream t of a folder is cut into windows of S + 1 tokens with stride S; window i gives

    inputs = t[iS : iS + S]        labels = t[iS + 1 : iS + S + 1]

so over an epoch every token but the very first is a target exactly once; a tail of fewer than S tokens is left
out. Each epoch visits all windows in a fresh order: a keyed Feistel permutation with cycle-walking (Black and
Rogaway, "Ciphers with arbitrary finite domains", 2002), which needs no memory where a shuffled list would need
8 bytes a window.

Several sources are mixed in blocks of `BLOCK` sequences that hold a fixed number of each (largest remainder of
the weights), so the position within each source is a closed formula of the sequence number. The price: a weight
is realised to 1 in `BLOCK`.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from relora.data.pretraining.shards import PreparedFolder
from relora.data.sampling import Int64Array, _block_shares, _spread, permute
from relora.errors import UserError
from relora.model.head import IGNORED
from relora.seeding import keyed_seed


class Batch(NamedTuple):
    """CPU tensors, both [sequences, S] int64; labels[:, j] is the token after input_ids[:, j]."""

    input_ids: torch.Tensor
    labels: torch.Tensor


class TrainBatches:
    """The batches of a run, by step.

    Args:
        sources: folders with their weights: shares of the sequences, relative to one another.
        sequence_length: S, tokens per sequence.
        batch_sequences: sequences per optimizer step.
        seed: the run's.

    `UserError` when the folders disagree about the tokenizer, a weight rounds to nothing, or there is less than
    one batch.
    """

    def __init__(
        self,
        sources: Sequence[tuple[PreparedFolder, float]],
        sequence_length: int,
        batch_sequences: int,
        seed: int,
    ) -> None:
        self.folders = [folder for folder, _ in sources]
        check_same_tokenizer(self.folders)
        self.sequence_length = sequence_length
        self.batch_sequences = batch_sequences
        self._seed = seed
        self._windows = [(folder.tokens - 1) // sequence_length for folder in self.folders]
        self._check_enough()
        self._shares = _block_shares(sources)
        # slot of a block -> its source, and how many slots of that source come before it
        self._slot_source, self._slot_rank = _spread(self._shares)

    @property
    def tokens_per_step(self) -> int:
        """Targets per optimizer step."""
        return self.batch_sequences * self.sequence_length

    @property
    def epoch_sequences(self) -> int:
        """Windows of all sources together: one pass over the data, if the weights follow the sizes."""
        return sum(self._windows)

    def batch(self, number: int) -> Batch:
        """The batch of a number, counted from 0; [batch_sequences, S]."""
        rows = np.empty((self.batch_sequences, self.sequence_length + 1), dtype=np.int64)
        for row, (source, start) in enumerate(self._windows_of(number)):
            rows[row] = self.folders[source].window(start, self.sequence_length + 1)
        tokens = torch.from_numpy(rows)
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def place(self, number: int, sequences: range) -> str:
        """Where sequences of a batch come from, for a person: folders, and the tokens at which they begin."""
        windows = self._windows_of(number)[sequences.start : sequences.stop]
        named = [f"{self.folders[source].path} from token {start:,}" for source, start in windows[:4]]
        more = [f"and {len(windows) - 4} more"] if len(windows) > 4 else []
        return f"batch {number:,}: {', '.join(named + more)}"

    def _windows_of(self, number: int) -> list[tuple[int, int]]:
        """The source of each sequence of a batch, and the token at which it begins there."""
        first = number * self.batch_sequences
        numbers = np.arange(first, first + self.batch_sequences, dtype=np.int64)
        blocks, slots = np.divmod(numbers, len(self._slot_source))
        source_of = self._slot_source[slots]
        starts = np.empty_like(numbers)
        for source in np.unique(source_of).tolist():
            mine = np.flatnonzero(source_of == source)
            positions = blocks[mine] * self._shares[source] + self._slot_rank[slots[mine]]
            starts[mine] = self._order(source, positions) * self.sequence_length
        return list(zip(source_of.tolist(), starts.tolist(), strict=True))

    def _order(self, source: int, positions: Int64Array) -> Int64Array:
        """Positions in the endless sequence of a source's epochs -> windows, [n] -> [n]."""
        size = self._windows[source]
        epochs, offsets = np.divmod(positions, size)
        windows = np.empty_like(offsets)
        for epoch in np.unique(epochs).tolist():  # more than one where an epoch ends within the batch
            now = epochs == epoch
            windows[now] = permute(offsets[now], size, keyed_seed(self._seed, "order", source, epoch))
        return windows

    def _check_enough(self) -> None:
        length, sequences = self.sequence_length, self.batch_sequences
        for folder, windows in zip(self.folders, self._windows, strict=True):
            if windows == 0:
                raise UserError(
                    f"{folder.path}: {folder.tokens} tokens, one sequence needs {length + 1}; "
                    "prepare more text or lower data.sequence_length"
                )
        if sum(self._windows) < sequences:
            names = ", ".join(str(folder.path) for folder in self.folders)
            raise UserError(
                f"{names}: {sum(folder.tokens for folder in self.folders)} tokens, one batch of {sequences} "
                f"sequences needs {sequences * length + 1}; prepare more text or lower batch.sequences"
            )


class HeldOut:
    """The first `tokens` tokens of a held-out folder, in order, the same ones every time.

    Iterating yields batches of `micro_sequences` windows (the last batch may hold fewer). Every one of the N
    tokens but the first is a target exactly once: a last short window is filled up with labels that no loss
    counts.
    """

    def __init__(self, folder: PreparedFolder, sequence_length: int, tokens: int, micro_sequences: int) -> None:
        self.folder = folder
        self.tokens = min(tokens, folder.tokens)
        self.sequence_length = sequence_length
        self.micro_sequences = micro_sequences
        if self.tokens < 2:
            raise UserError(
                f"{folder.path}: evaluation needs at least 2 tokens, here are {self.tokens}; prepare more text"
            )

    @property
    def targets(self) -> int:
        """Labels that count, over all batches."""
        return self.tokens - 1

    def __len__(self) -> int:
        """Number of batches."""
        windows = -(-self.targets // self.sequence_length)
        return -(-windows // self.micro_sequences)

    def __iter__(self) -> Iterator[Batch]:
        length = self.sequence_length
        batch_targets = length * self.micro_sequences
        for start in range(0, self.targets, batch_targets):
            stream = self.folder.window(start, min(batch_targets + 1, self.tokens - start))
            targets = len(stream) - 1
            size = -(-targets // length) * length
            inputs = np.full(size, self.folder.index.eos_token_id, dtype=np.int64)
            labels = np.full(size, IGNORED, dtype=np.int64)
            inputs[:targets], labels[:targets] = stream[:-1], stream[1:]
            yield Batch(torch.from_numpy(inputs).view(-1, length), torch.from_numpy(labels).view(-1, length))


def check_same_tokenizer(folders: Sequence[PreparedFolder]) -> None:
    """`UserError` unless one tokenizer wrote all folders: several train sources, or train and validation."""
    first = folders[0]
    for other in folders[1:]:
        if other.fingerprint != first.fingerprint:
            raise UserError(
                f"{other.path}: prepared with another tokenizer than {first.path}; "
                "prepare both with the same --tokenizer"
            )
