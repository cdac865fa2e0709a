"""`relora prepare`: encode text as a folder of tokens for training and one of held-out tokens.

    OUT/train/  OUT/validation/     two prepared folders (see `shards`)
    OUT/journal.jsonl               exists only while the work is unfinished (see `journal`)

Every document ends in EOS, and documents follow one another without padding: decoding a whole split gives its
documents, joined by EOS, and no token is dropped. The result is the same for any number of workers and after any number
of interruptions. A second call with the same sources and options does nothing; with different ones it refuses.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from relora.data import tokenizer as tokenization
from relora.data.pretraining.corpus import Corpus
from relora.data.pretraining.encode import CHUNK_CHARS, Chunk, Encoder, encode_all, pieces_of
from relora.data.pretraining.journal import (
    TRAIN,
    VALIDATION,
    Header,
    Journal,
    Request,
    SplitState,
    SplitWriter,
)
from relora.data.pretraining.output import PrepareReport, is_finished, locked_folder, remove_splits, report_on
from relora.data.pretraining.progress import PrepareProgress
from relora.data.pretraining.shards import (
    FORMAT_VERSION,
    TOKENIZER_NAME,
    Index,
    TokenDtype,
    write_index,
)
from relora.data.sampling import DRAWS, SplitRule
from relora.errors import UserError
from relora.messages import short_repr

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER_CHARS = 100_000_000
"""Characters of training text on which a tokenizer is trained, the same share from every file; more text hardly changes
the tokenizer."""

MOST_IDS = 1 << 24
"""Largest vocabulary of a tokenizer trained here: more ids than any model has, few enough to fit into memory."""

MOST_WORKERS = 1024
"""Most threads; two chunks of text are in memory for each."""

TOKENIZER_PIECE_CHARS = 4096
"""Most characters of the pieces on which a tokenizer is trained: the time grows with the square of a word's length."""

DOCUMENT_CHARS = 100
"""Memory that a document takes besides its text, counted in characters; it limits how many tiny documents are in one
chunk."""

JOURNAL_SECONDS = 2.0
"""Time between two lines of the journal: a kill costs at most this much work, and reading earlier documents again."""


def prepare(
    sources: Sequence[str],
    out: Path,
    *,
    tokenizer: str | None = None,
    train_tokenizer: int | None = None,
    validation: float = 0.01,
    text_field: str = "text",
    take: int | None = None,
    workers: int | None = None,
    seed: int = 0,
    skip_bad: bool = False,
    progress: Callable[[PrepareProgress], None] = lambda _: None,
) -> PrepareReport:
    """Write OUT/train and OUT/validation, continue writing them, or find that they are complete.

    Args:
        sources: files, folders, saved datasets or hub ids (see `data.sources`).
        out: the folder to write.
        tokenizer: folder or hub id of a tokenizer. Either this or `train_tokenizer` is given.
        train_tokenizer: vocabulary size of a tokenizer that is trained on the training documents.
        validation: share of the documents that is held out, 0 <= share < 1. A hash of its text decides about each
            document, so the share is met on average; where it would leave a split empty, exactly one document is held
            out.
        text_field: field of JSON records, column of tables.
        take: at most this many documents of each source.
        workers: threads that tokenize, one per core unless given. The result does not depend on it.
        seed: keys the choice of held-out documents.
        skip_bad: leave out records that cannot be used and count them, instead of refusing them.
        progress: called with the progress about once per MB of text.

    Raises:
        UserError: a source, an option or `out` cannot be used. Everything that this call created has been removed.
        RunStopped: a disk or a network failed; the same call continues.
        Interrupted: Ctrl-C was pressed; the same call continues.
    """
    started = time.monotonic()
    _check_options(tokenizer, train_tokenizer, validation, text_field, take, workers)
    corpus = Corpus(sources, text_field=text_field, take=take, skip_bad=skip_bad, leave_out=out)
    given = None if tokenizer is None else tokenization.load_tokenizer(tokenizer)
    request = Request(
        corpus.identity(),
        {
            "tokenizer": None if given is None else tokenization.fingerprint(given),
            "train_tokenizer": train_tokenizer,
            "validation": validation,
            "text_field": text_field,
            "take": take,
            "seed": seed,
            "skip_bad": skip_bad,
        },
    )
    if is_finished(out, request):
        return report_on(out, started, reused=True)
    with locked_folder(out, request) as journal:
        continued = journal.header is not None
        if journal.header is None:
            remove_splits(out)  # a call that gave up may have been killed before it had removed them
            journal.begin(Header(request, int(validation * DRAWS)))
        used = given or _train_or_reopen(out, corpus, train_tokenizer, _rule(journal, seed), progress)
        tokenization.save_tokenizer(used, out / TRAIN / TOKENIZER_NAME)
        _encode_splits(corpus, used, journal, seed, out, workers or os.cpu_count() or 1, progress)
        _write_indexes(out, journal, used, corpus)
        journal.remove()
    return report_on(out, started, continued=continued)


def _check_options(
    tokenizer: str | None,
    train_tokenizer: int | None,
    validation: float,
    text_field: str,
    take: int | None,
    workers: int | None,
) -> None:
    """Raise `UserError` if an option of `prepare` has no meaning."""
    if (tokenizer is None) == (train_tokenizer is None):
        raise UserError("give either --tokenizer (a folder or hub id) or --train-tokenizer (a vocabulary size)")
    if train_tokenizer is not None:
        tokenization.check_vocab_size(train_tokenizer)
    if not 0 <= validation < 1:
        raise UserError(f"--validation {validation}: must be a share of at least 0 and less than 1 (100%)")
    for option, number, most in (("take", take, sys.maxsize), ("workers", workers, MOST_WORKERS)):
        if number is not None and not 1 <= number <= most:
            raise UserError(f"--{option} {number}: must be at least 1 and at most {most}")
    if train_tokenizer is not None and train_tokenizer > MOST_IDS:
        raise UserError(f"--train-tokenizer {short_repr(train_tokenizer)}: must be at most {MOST_IDS:,}")
    try:
        text_field.encode()
    except UnicodeEncodeError:
        raise UserError(f"--text-field {text_field!a}: not UTF-8") from None


def _rule(journal: Journal, seed: int) -> SplitRule:
    """Return the rule by which documents are held out, with the threshold that the journal records."""
    assert journal.header is not None  # the journal has been begun
    return SplitRule(seed, journal.header.threshold)


def _train_or_reopen(
    out: Path,
    corpus: Corpus,
    vocab_size: int | None,
    rule: SplitRule,
    progress: Callable[[PrepareProgress], None],
) -> "PreTrainedTokenizerFast":
    """Train a tokenizer on the training documents, or open the one that an interrupted call has trained."""
    folder = out / TRAIN / TOKENIZER_NAME
    if folder.is_dir():
        return tokenization.load_tokenizer(str(folder))
    assert vocab_size is not None  # _check_options has checked it
    progress(PrepareProgress("tokenizer"))
    texts = (text for text in corpus.samples(TOKENIZER_CHARS) if not rule.is_held_out(text))
    pieces = (piece for text in texts for piece in pieces_of(text, TOKENIZER_PIECE_CHARS))
    return tokenization.train_tokenizer(pieces, vocab_size)


def _encode_splits(
    corpus: Corpus,
    tokenizer: "PreTrainedTokenizerFast",
    journal: Journal,
    seed: int,
    out: Path,
    workers: int,
    progress: Callable[[PrepareProgress], None],
) -> None:
    """Write the shards of both splits.

    With few documents the draws may leave one split empty. Then a second pass writes all shards again, with the
    threshold by which exactly one document is held out.
    """
    assert journal.header is not None  # the journal has been begun
    backend, dtype = tokenizer.backend_tokenizer.to_str(), _dtype(tokenizer)
    while True:
        rule = _rule(journal, seed)
        _one_pass(corpus, Encoder(backend, tokenizer.eos_token_id, dtype, rule), journal, out, workers, progress)
        state = journal.state
        if state.lowest_draw is None:
            raise UserError("the sources hold no text")
        one_document_threshold = state.lowest_draw + 1  # only the document with the lowest draw is below it
        no_split_is_empty = state.train.documents and state.validation.documents
        if no_split_is_empty or rule.threshold in (0, one_document_threshold):
            break
        journal.begin(Header(journal.header.request, one_document_threshold))
    if not state.train.documents:
        raise UserError(
            f"{state.documents} document(s), too few to hold any out; "
            "give more text, or --validation 0 and prepare a validation folder from other text"
        )


def _one_pass(
    corpus: Corpus,
    encoder: Encoder,
    journal: Journal,
    out: Path,
    workers: int,
    progress: Callable[[PrepareProgress], None],
) -> None:
    """Encode all documents after those that the journal's state counts, and append them to the shards."""
    state, total = journal.state, corpus.total_bytes
    last_note = time.monotonic()
    with (
        closing(SplitWriter(out / TRAIN, state.train, encoder.itemsize)) as train,
        closing(SplitWriter(out / VALIDATION, state.validation, encoder.itemsize)) as validation,
    ):
        for chunk, encoded in encode_all(_chunks(corpus, skip=state.documents), encoder, workers):
            train.append(encoded.train)
            validation.append(encoded.validation)
            lowest = DRAWS if state.lowest_draw is None else state.lowest_draw
            state.lowest_draw = min(encoded.lowest_draw, lowest)
            if time.monotonic() - last_note >= JOURNAL_SECONDS:
                train.sync()
                validation.sync()
                journal.note()
                last_note = time.monotonic()
            progress(
                PrepareProgress(
                    stage="tokens",
                    text_bytes=state.train.text_bytes + state.validation.text_bytes,
                    tokens=state.train.tokens + state.validation.tokens,
                    read_share=None if total is None else chunk.read_bytes / max(1, total),
                )
            )
    journal.note()


def _chunks(corpus: Corpus, skip: int) -> Iterator[Chunk]:
    """Yield the documents after the first `skip`, in chunks of about `CHUNK_CHARS` characters for the workers."""
    texts: list[str] = []
    chars = 0
    for text in islice(corpus.documents(), skip, None):
        texts.append(text)
        chars += len(text) + DOCUMENT_CHARS
        if chars >= CHUNK_CHARS:
            yield Chunk(texts, corpus.read_bytes)
            texts, chars = [], 0
    if texts:
        yield Chunk(texts, corpus.read_bytes)


def _dtype(tokenizer: "PreTrainedTokenizerFast") -> TokenDtype:
    """Return the smallest dtype that can hold all ids of a tokenizer."""
    return "uint16" if tokenization.vocabulary_size(tokenizer) <= 1 << 16 else "uint32"


def _write_indexes(out: Path, journal: Journal, tokenizer: "PreTrainedTokenizerFast", corpus: Corpus) -> None:
    """Write the index of each split that has documents; as the last files, they make the folders complete."""
    for split, state in ((TRAIN, journal.state.train), (VALIDATION, journal.state.validation)):
        if state.documents:
            tokenization.copy_tokenizer(out / TRAIN / TOKENIZER_NAME, out / split / TOKENIZER_NAME)
            write_index(out / split, _index(state, journal, tokenizer, corpus))


def _index(state: SplitState, journal: Journal, tokenizer: "PreTrainedTokenizerFast", corpus: Corpus) -> Index:
    """Return the index of one split.

    Args:
        state: the split's shards and documents.
        journal: has the options of the preparation.
        tokenizer: the tokenizer of both splits.
        corpus: the sources, after the pass.
    """
    assert journal.header is not None  # the journal has been begun
    return Index(
        format_version=FORMAT_VERSION,
        tokens=state.tokens,
        documents=state.documents,
        text_bytes=state.text_bytes,
        skipped_records=corpus.skipped_records,
        dtype=_dtype(tokenizer),
        vocab_size=tokenization.vocabulary_size(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        tokenizer_fingerprint=tokenization.fingerprint(tokenizer),
        shards=tuple(state.shards),
        sources=corpus.identity(),
        options=journal.header.request.options,
    )
