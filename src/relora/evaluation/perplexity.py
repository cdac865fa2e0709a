"""Loss, perplexity and bits per byte of a finished model, on prepared folders and on raw text.

A prepared folder is scored as training scores its held-out data: plain windows of the token stream, EOS included.
Raw text is scored as published figures are, through a sliding window: every token once, with at least
`sequence_length - stride` tokens before it wherever its document has them, the first with the start token alone.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from relora.data.pretraining.batches import HeldOut
from relora.data.pretraining.shards import PreparedFolder
from relora.data.pretraining.sources import Corpus
from relora.data.tokenizer import fingerprint
from relora.errors import UserError
from relora.inference.loading import LoadedModel, load_model_or_run
from relora.measure import Evaluation, evaluate, perplexity
from relora.model.head import IGNORED
from relora.model.load import max_positions
from relora.report.progress import with_progress

Ids = npt.NDArray[np.int64]
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Score:
    """What a model makes of one source; see `Evaluation`."""

    loss: float
    perplexity: float
    bits_per_byte: float | None
    tokens: int
    data: str
    bytes: int
    """Of the scored text as UTF-8; of a part of a prepared folder by its mean bytes per token."""
    word_perplexity: float | None
    """exp of nats per word between white space, the convention of WikiText; None for a prepared folder."""
    sequence_length: int
    stride: int


@dataclass(frozen=True)
class _Text:
    """Raw text to score."""

    documents: list[Ids]
    """Each begins with the start token, which is context only."""
    bytes: int
    words: int


def evaluate_model(
    model_or_run: str | Path,
    data: Sequence[str],
    *,
    adapter: str | None = None,
    sequence_length: int | None = None,
    stride: int | None = None,
    tokens: int | None = None,
    device: str = "auto",
    dtype: str = "fp32",
    batch: int = 8,
    trust_remote_code: bool = False,
) -> list[Score]:
    """Score a model on every source of `data`: prepared folders, or whatever `relora prepare` reads.

    Args:
        model_or_run: a run folder, a model folder or a hub id.
        adapter: a folder or run whose adapter is used, beside the model that it belongs to.
        sequence_length: tokens in a window; by default those of the run, else the model's positions (at most 1,024).
        stride: tokens from one window to the next; by default half a window on raw text, a whole one on prepared data.
        tokens: score at most this many of each source, from its start.
        batch: windows per forward pass.
        trust_remote_code: run code that comes with the model.

    Raises:
        UserError: no such model, adapter or source, or one that does not fit the other.
    """
    check_counts(sequence_length=sequence_length, stride=stride, tokens=tokens, batch=batch)
    finished = open_scored(model_or_run, adapter, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    length = scored_length(finished, sequence_length)
    if stride is not None and stride > length:
        raise UserError(f"stride ({stride}) must not exceed sequence_length ({length}), or tokens would be left out")
    if not data:
        raise UserError("no data given; give a prepared folder or a text file")
    scores = []
    for source in data:
        if (Path(source) / "index.json").is_file():
            scores.append(_score_prepared(finished, source, length, stride or length, tokens, batch))
        else:
            scores.append(_score_text(finished, source, length, stride or max(1, length // 2), tokens, batch))
    return scores


def open_scored(
    model_or_run: str | Path, adapter: str | None, *, device: str, dtype: str, trust_remote_code: bool
) -> LoadedModel:
    """The model to score: as it stands, or with `adapter` in use beside it; `UserError` as for `load_model_or_run`."""
    adapters = [] if adapter is None else [adapter]
    finished = load_model_or_run(
        model_or_run, adapters=adapters, device=device, dtype=dtype, trust_remote_code=trust_remote_code
    )
    if adapter is not None:
        finished.adapters.use(finished.adapters.names[-1])
    return finished


def scored_length(finished: LoadedModel, sequence_length: int | None) -> int:
    """Tokens that the model sees at once: `sequence_length`, by default its own; `UserError` beyond its positions."""
    length = sequence_length or finished.sequence_length
    positions = max_positions(finished.model)
    if positions is not None and length > positions:
        raise UserError(f"sequence_length ({length:,}) is more than the model's {positions:,} positions; shorten it")
    return length


def check_counts(**counts: int | None) -> None:
    """`UserError` for a number that must be 1 or more, and is not."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be 1 or more")


def sliding_windows(ids: Ids, length: int, stride: int) -> Iterator[tuple[Ids, Ids]]:
    """Windows of `length` tokens, `stride` apart, over one document, as inputs and labels (the last may be shorter).

    Every token but the first is a label exactly once; where windows overlap, the earlier one has it.
    """
    for start in range(0, max(len(ids) - 1 - length, 0) + stride, stride):
        labels = ids[start + 1 : start + length + 1].copy()
        if start:
            labels[: length - stride] = IGNORED
        yield ids[start : start + len(labels)], labels


def _score_prepared(
    finished: LoadedModel, source: str, length: int, stride: int, tokens: int | None, batch: int
) -> Score:
    folder = PreparedFolder.open(source)
    if folder.fingerprint != fingerprint(finished.tokenizer):
        raise UserError(f"{source}: prepared with another tokenizer than the model's; give its text instead")
    count = folder.tokens if tokens is None else min(tokens + 1, folder.tokens)
    batches: Iterable[tuple[Tensor, Tensor]]
    if stride == length:
        batches, total = (held_out := HeldOut(folder, length, count, batch)), len(held_out)
    else:
        batches, total = _batches([folder.window(0, count)], length, stride, batch)
    result = evaluate(finished.model, with_progress(batches, total, source), bytes_per_token=folder.bytes_per_token)
    return Score(
        result.loss,
        result.perplexity,
        result.bits_per_byte,
        result.tokens,
        data=source,
        bytes=round(result.tokens * folder.bytes_per_token),
        word_perplexity=None,
        sequence_length=length,
        stride=stride,
    )


def _score_text(finished: LoadedModel, source: str, length: int, stride: int, tokens: int | None, batch: int) -> Score:
    text = _read(finished, source, tokens)
    batches, total = _batches(text.documents, length, stride, batch)
    result = evaluate(finished.model, with_progress(batches, total, source))
    loss_sum = result.loss * result.tokens
    whole = Evaluation.of(loss_sum, result.tokens, text.bytes)
    return Score(
        whole.loss,
        whole.perplexity,
        whole.bits_per_byte,
        whole.tokens,
        data=source,
        bytes=text.bytes,
        word_perplexity=perplexity(loss_sum / text.words) if text.words else None,
        sequence_length=length,
        stride=stride,
    )


def _read(finished: LoadedModel, source: str, tokens: int | None) -> _Text:
    """The first `tokens` tokens of a source, document by document."""
    read: Iterable[str] = Corpus([source]).documents()
    if Path(source).is_file() and not {".json", ".jsonl", ".parquet"} & set(Path(source).suffixes):
        read = ["".join(read)]  # a long text file comes in pieces that join up to it
    documents, scored, byte_count, words = [], 0, 0, 0
    for text in read:
        ids = finished.encode(text)
        room = len(ids) - 1 if tokens is None else min(len(ids) - 1, tokens - scored)
        if room < len(ids) - 1:
            offsets = finished.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ids, text = ids[: room + 1], text[: offsets.offset_mapping[room - 1][1]]
        if room:  # white space may give no token
            documents.append(np.array(ids, dtype=np.int64))
        scored += room
        byte_count += len(text.encode())
        words += len(text.split())
        if scored == tokens:
            break
    return _Text(documents, byte_count, words)


def _batches(
    documents: Sequence[Ids], length: int, stride: int, sequences: int
) -> tuple[Iterator[tuple[Tensor, Tensor]], int]:
    """Sliding windows over all documents, `sequences` at a time, and the number of batches."""
    total = sum(1 + -(-max(len(ids) - 1 - length, 0) // stride) for ids in documents)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        windows = (window for ids in documents for window in sliding_windows(ids, length, stride))
        while some := list(islice(windows, sequences)):
            longest = max(len(labels) for _, labels in some)
            # what is behind a window's end is never attended to, so any id will do
            inputs, labels = np.zeros((len(some), longest), np.int64), np.full((len(some), longest), IGNORED)
            for row, (window_inputs, window_labels) in enumerate(some):
                inputs[row, : len(window_inputs)] = window_inputs
                labels[row, : len(window_labels)] = window_labels
            yield torch.from_numpy(inputs), torch.from_numpy(labels)

    return batches(), -(-total // sequences)
