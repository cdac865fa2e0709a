"""Loss, perplexity and bits per byte of a trained language model, on prepared folders and on raw text.

A prepared folder is scored as a run scores its result on the held-out data: consecutive windows of the token stream,
EOS tokens included.

Raw text is scored with a sliding window, as published figures are: every token is scored once, with at least
`sequence_length - stride` tokens of context if its document has so many before it; the first token of a document has
the start token as its only context. The price of a smaller stride is time: the model is run on
`sequence_length / stride` tokens for each token that is scored.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from relora.data.plain_text import PLAIN_TEXT_KINDS, separators_of
from relora.data.pretraining.batches import HeldOut
from relora.data.pretraining.corpus import Corpus
from relora.data.pretraining.shards import PreparedFolder
from relora.data.readers import file_kind
from relora.data.tokenizer import fingerprint
from relora.device import choose_device
from relora.distributed.group import DEFAULT_TIMEOUT_SECONDS, current_group, together
from relora.errors import UserError
from relora.evaluation.scored_model import BATCH, check_counts, check_loss, open_scored_model, scored_length
from relora.inference.loading import LoadedModel
from relora.measure import Evaluation, evaluate, perplexity
from relora.model.head import IGNORED
from relora.report.progress import with_progress

Ids = npt.NDArray[np.int64]
"""Token ids of one document or one window: [length]."""


@dataclass(frozen=True)
class Score:
    """Loss of a model on one source, and the figures that follow from it (see `relora.measure.Evaluation`)."""

    loss: float
    """Mean over the scored tokens, in nats."""
    perplexity: float
    bits_per_byte: float | None
    tokens: int
    """Number of scored tokens."""
    data: str
    """The source, as it was given."""
    bytes: int
    """Size of the scored text as UTF-8; for a prepared folder, estimated from its mean bytes per token."""
    word_perplexity: float | None
    """exp(nats per word), with words split at white space: the convention of WikiText. None for a prepared folder."""
    sequence_length: int
    """Tokens in a window."""
    stride: int
    """Tokens from the start of one window to the start of the next."""
    notes: tuple[str, ...] = ()
    """Lines about files of the source that are not read, and about separators between documents."""


@dataclass(frozen=True)
class _Text:
    """Tokenized raw text."""

    documents: list[Ids]
    """The ids of each document; the first id is the start token, which is context and is not scored."""
    bytes: int
    """Size of the text as UTF-8."""
    words: int
    """Number of words, split at white space."""
    notes: tuple[str, ...]
    """See `Score`."""


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
    batch: int = BATCH,
    trust_remote_code: bool = False,
) -> list[Score]:
    """Score a model on every source of `data`. Several processes share the windows and come to the same figures.

    Args:
        model_or_run: a run folder, a model folder or a hub id.
        data: prepared folders, or raw text in any form that `relora prepare` reads.
        adapter: a folder or run whose adapter is used with the model.
        sequence_length: tokens in a window; by default those of the run, else the model's positions (at most 1,024).
        stride: tokens from the start of one window to the start of the next; by default half a window on raw text and a
            whole window on prepared folders.
        tokens: score at most this many tokens of each source, from its start.
        batch: windows per forward pass.
        trust_remote_code: run code that comes with the model.

    Returns:
        A score for each source, in the order of `data`.

    Raises:
        UserError: the model, the adapter or a source does not exist, or they do not belong together.
    """
    with together() as group:
        with group.stage("the opening of the model"):
            check_counts(sequence_length=sequence_length, stride=stride, tokens=tokens, batch=batch)
            if group.world > 1:
                device = str(choose_device(device, group.local_rank))
            loaded = open_scored_model(
                model_or_run, adapter, device=device, dtype=dtype, trust_remote_code=trust_remote_code
            )
            length = scored_length(loaded, sequence_length)
            if stride is not None and stride > length:
                raise UserError(
                    f"stride ({stride}) must not exceed sequence_length ({length}), or tokens would be left out"
                )
            if not data:
                raise UserError("no data given; give a prepared folder or a text file")
        group.connect(loaded.model.device, DEFAULT_TIMEOUT_SECONDS)
        scores = []
        for source in data:
            if (Path(source) / "index.json").is_file():
                scores.append(_score_prepared(loaded, source, length, stride or length, tokens, batch))
            else:
                scores.append(_score_text(loaded, source, length, stride or max(1, length // 2), tokens, batch))
        return scores


def sliding_windows(ids: Ids, length: int, stride: int) -> Iterator[tuple[Ids, Ids]]:
    """Yield windows over one document as (inputs, labels) of at most `length` tokens each.

    Windows start `stride` tokens apart. Every token but the first is scored exactly once: where windows overlap, the
    earlier window scores the token and the later one labels it `IGNORED`.
    """
    for start in range(0, max(len(ids) - 1 - length, 0) + stride, stride):
        labels = ids[start + 1 : start + length + 1].copy()
        if start:
            labels[: length - stride] = IGNORED
        yield ids[start : start + len(labels)], labels


def _score_prepared(
    loaded: LoadedModel, source: str, length: int, stride: int, tokens: int | None, batch: int
) -> Score:
    """Score the first `tokens` tokens of a prepared folder as one stream, without regard to its documents."""
    folder = PreparedFolder.open(source)
    if folder.fingerprint != fingerprint(loaded.tokenizer):
        raise UserError(f"{source}: prepared with another tokenizer than the model's; give its text instead")
    count = folder.tokens if tokens is None else min(tokens + 1, folder.tokens)  # the first token is not scored
    batches: Iterable[tuple[Tensor, Tensor]]
    if stride == length:
        held_out = HeldOut(folder, length, count, batch)
        batches, total = held_out, len(held_out)
    else:
        batches, total = _batches([folder.window(0, count)], length, stride, batch)
    shown = with_progress(batches, total, source) if current_group().is_first else batches
    result = evaluate(loaded.model, shown, bytes_per_token=folder.bytes_per_token, group=current_group())
    check_loss(result.loss, loaded.model, source)
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


def _score_text(loaded: LoadedModel, source: str, length: int, stride: int, tokens: int | None, batch: int) -> Score:
    """Score the first `tokens` tokens of raw text, each document by itself."""
    text = _read_text(loaded, source, tokens)
    batches, total = _batches(text.documents, length, stride, batch)
    shown = with_progress(batches, total, source) if current_group().is_first else batches
    result = evaluate(loaded.model, shown, group=current_group())
    check_loss(result.loss, loaded.model, source)
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
        notes=text.notes,
    )


class _EvaluatedText(Corpus):
    """Text that is evaluated as it is; only `relora prepare` has options for how it is read."""

    skip_option = "relora prepare --skip-bad"
    field_option = "relora prepare --text-field"


def _read_text(loaded: LoadedModel, source: str, tokens: int | None) -> _Text:
    """Tokenize the first `tokens` tokens of a source, document by document."""
    corpus = _EvaluatedText([source])
    corpus.separators = separators_of(None, str(loaded.tokenizer.eos_token))
    # a document of a plain text file is scored as one, but in a folder a long one is several
    corpus.cut_long_texts = not (Path(source).is_file() and file_kind(Path(source)) in PLAIN_TEXT_KINDS)
    documents, scored, byte_count, words = [], 0, 0, 0
    for text in corpus.documents():
        ids = loaded.encode(text)
        targets = len(ids) - 1  # all but the start token
        taken = targets if tokens is None else min(targets, tokens - scored)
        if taken < targets:
            offsets = loaded.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            end_of_last_token = offsets.offset_mapping[taken - 1][1]
            ids, text = ids[: taken + 1], text[:end_of_last_token]
        if taken:  # a document of white space may have no tokens
            documents.append(np.array(ids, dtype=np.int64))
        scored += taken
        byte_count += len(text.encode())
        words += len(text.split())
        if scored == tokens:
            break
    return _Text(documents, byte_count, words, tuple(corpus.notes()))


def _batches(
    documents: Sequence[Ids], length: int, stride: int, sequences: int
) -> tuple[Iterator[tuple[Tensor, Tensor]], int]:
    """Put the sliding windows over all documents into batches of `sequences` windows.

    Returns:
        The batches, as (input ids, labels) of shape [windows, longest window], and their number.
    """
    windows_in_all = sum(1 + math.ceil(max(len(ids) - 1 - length, 0) / stride) for ids in documents)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        windows = (window for ids in documents for window in sliding_windows(ids, length, stride))
        while some := list(islice(windows, sequences)):
            longest = max(len(labels) for _, labels in some)
            # the attention is causal, so no scored token sees the padding on the right and any id serves for it
            inputs, labels = np.zeros((len(some), longest), np.int64), np.full((len(some), longest), IGNORED)
            for row, (window_inputs, window_labels) in enumerate(some):
                inputs[row, : len(window_inputs)] = window_inputs
                labels[row, : len(window_labels)] = window_labels
            yield torch.from_numpy(inputs), torch.from_numpy(labels)

    return batches(), math.ceil(windows_in_all / sequences)
