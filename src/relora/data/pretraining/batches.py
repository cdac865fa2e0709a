"""Batches of token sequences, as a pure function of (seed, step): resuming needs no loader state and no replay.

The token stream t of a folder is cut into windows of S + 1 tokens with stride S; window i gives

    inputs = t[iS : iS + S]        labels = t[iS + 1 : iS + S + 1]

so over an epoch every token but the very first is a target exactly once; a tail of fewer than S tokens is left
out. Each epoch visits all windows in an order of its own, a keyed permutation (`sampling.permute`).

Several sources are mixed in blocks of `sampling.BLOCK` sequences, which have a fixed number of sequences of each
source (largest remainder of the weights). So the position within each source is a closed formula of the sequence
number. The price: a weight is realised to 1 in `BLOCK`.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from relora.data.pretraining.shards import PreparedFolder
from relora.data.sampling import Int64Array, block_shares, block_slots, permute, spread
from relora.errors import UserError
from relora.model.head import IGNORED
from relora.seeding import keyed_seed


class Batch(NamedTuple):
    """Inputs and labels, CPU tensors, both [sequences, S] int64; labels[:, j] is the token after input_ids[:, j]."""

    input_ids: torch.Tensor
    labels: torch.Tensor


class TrainBatches:
    """The training batches of a run, by number.

    Args:
        sources: prepared folders, each with its weight: the share of its sequences relative to the other weights.
        sequence_length: S, tokens per sequence.
        batch_sequences: sequences per optimizer step.
        seed: the run's seed, which keys the order.

    Raises:
        UserError: the folders were prepared with different tokenizers, a weight rounds to no sequence at all, or
            there are not enough tokens for one batch.
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
        self._shares = block_shares([(str(folder.path), weight) for folder, weight in sources])
        self._slot_source, self._slot_rank = block_slots(self._shares)

    @property
    def tokens_per_step(self) -> int:
        """Target tokens per optimizer step."""
        return self.batch_sequences * self.sequence_length

    @property
    def epoch_sequences(self) -> int:
        """Windows of all sources together: sequences of one epoch, if the weights are proportional to the sizes."""
        return sum(self._windows)

    def batch(self, number: int) -> Batch:
        """Return the batch with this number, counted from 0; [batch_sequences, S]."""
        rows = np.empty((self.batch_sequences, self.sequence_length + 1), dtype=np.int64)
        for row, (source, start) in enumerate(self._windows_of(number)):
            rows[row] = self.folders[source].window(start, self.sequence_length + 1)
        tokens = torch.from_numpy(rows)
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def place(self, number: int, sequences: range) -> str:
        """Describe for a message where sequences of a batch come from: their folders and first tokens.

        Args:
            number: of the batch.
            sequences: rows of the batch.
        """
        windows = self._windows_of(number)[sequences.start : sequences.stop]
        named = [f"{self.folders[source].path} from token {start:,}" for source, start in windows[:4]]
        more = [f"and {len(windows) - 4} more"] if len(windows) > 4 else []
        return f"batch {number:,}: {', '.join(named + more)}"

    def _windows_of(self, number: int) -> list[tuple[int, int]]:
        """Return, for each sequence of a batch, the number of its source and the position of its first token there."""
        first = number * self.batch_sequences
        numbers = np.arange(first, first + self.batch_sequences, dtype=np.int64)
        blocks, slots = np.divmod(numbers, len(self._slot_source))
        source_of = self._slot_source[slots]
        starts = np.empty_like(numbers)
        for source in np.unique(source_of).tolist():
            rows = np.flatnonzero(source_of == source)
            positions = blocks[rows] * self._shares[source] + self._slot_rank[slots[rows]]
            starts[rows] = self._windows_at(source, positions) * self.sequence_length
        return list(zip(source_of.tolist(), starts.tolist(), strict=True))

    def _windows_at(self, source: int, positions: Int64Array) -> Int64Array:
        """Map positions in the endless sequence of a source's epochs to windows of the source, [n] -> [n]."""
        size = self._windows[source]
        epochs, offsets = np.divmod(positions, size)
        windows = np.empty_like(offsets)
        for epoch in np.unique(epochs).tolist():  # more than one where an epoch ends within the batch
            in_epoch = epochs == epoch
            key = keyed_seed(self._seed, "order", source, epoch)
            windows[in_epoch] = permute(offsets[in_epoch], size, key)
        return windows

    def _check_enough(self) -> None:
        """Raise `UserError` if a source has no whole window, or all sources together have less than one batch."""
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
    """Windows of a held-out folder as batches, in the order of the text, the same ones in every evaluation.

    Without a seed they cover the first `tokens` tokens of the folder: every token but the first is a target exactly
    once. With a seed they are a sample of the whole folder: so many of its windows that they have at most `tokens`
    targets together, at equal distances (`sampling.spread`); all windows, if those have no more. Which ones depends on
    the seed and on the number of windows and tokens, not on the size of the batches.

    Iterating yields batches of `micro_sequences` windows; the last batch may have fewer. A short window is padded, with
    the label `IGNORED`, which no loss counts.

    Args:
        folder: the prepared folder.
        sequence_length: S, tokens per window.
        tokens: how many tokens to use; all of a folder that has fewer.
        micro_sequences: windows per batch.
        seed: the run's seed, for a sample; None for the first tokens.

    Raises:
        UserError: there are fewer than 2 tokens.
    """

    def __init__(
        self,
        folder: PreparedFolder,
        sequence_length: int,
        tokens: int,
        micro_sequences: int,
        *,
        seed: int | None = None,
    ) -> None:
        self.folder = folder
        self.sequence_length = sequence_length
        self.micro_sequences = micro_sequences
        used = min(tokens, folder.tokens)
        if used < 2:
            raise UserError(f"{folder.path}: evaluation needs at least 2 tokens, here are {used}; prepare more text")
        self.whole_targets = folder.tokens - 1
        """Number of target tokens in the folder."""
        self._end = folder.tokens if seed is not None else used
        self._most = sequence_length
        self._windows: Sequence[int] = range(-(-(self._end - 1) // sequence_length))
        if seed is not None and self.whole_targets > tokens:
            self._most = min(sequence_length, tokens)
            count, key = max(1, tokens // sequence_length), keyed_seed(seed, "held out")
            self._windows = spread(count, len(self._windows), key).tolist()
        last = self._targets_of(self._windows[-1])  # the only one that may be short
        self.targets = (len(self._windows) - 1) * self._most + last
        """Number of target tokens, over all batches."""

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self._windows) // self.micro_sequences)

    def __iter__(self) -> Iterator[Batch]:
        length = self.sequence_length
        for first in range(0, len(self._windows), self.micro_sequences):
            windows = self._windows[first : first + self.micro_sequences]
            inputs = np.full((len(windows), length), self.folder.index.eos_token_id, dtype=np.int64)
            labels = np.full((len(windows), length), IGNORED, dtype=np.int64)
            for row, window in enumerate(windows):
                targets = self._targets_of(window)
                stream = self.folder.window(window * length, targets + 1)
                inputs[row, :targets], labels[row, :targets] = stream[:-1], stream[1:]
            yield Batch(torch.from_numpy(inputs), torch.from_numpy(labels))

    def _targets_of(self, window: int) -> int:
        """Return the number of target tokens of a window, given by its number in the folder."""
        return min(self._most, self._end - 1 - window * self.sequence_length)


def check_same_tokenizer(folders: Sequence[PreparedFolder]) -> None:
    """Raise `UserError` unless all folders, for training or held out, were prepared with the same tokenizer."""
    first = folders[0]
    for other in folders[1:]:
        if other.fingerprint != first.fingerprint:
            raise UserError(
                f"{other.path}: prepared with another tokenizer than {first.path}; "
                "prepare both with the same --tokenizer"
            )
