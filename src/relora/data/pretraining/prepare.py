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
from relora.data.pretraining.held_out import runs, settle
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
from relora.data.sampling import SplitRule
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
    document_separator: str | None = None,
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
            document; of few documents, parts may be held out (see `held_out`).
        text_field: field of JSON records, column of tables.
        document_separator: text that parts the documents of a plain text file wherever it stands; unless given,
            `<|endoftext|>` and the text of the EOS token do so, in lines of their own (see `data.plain_text`).
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
    _check_options(tokenizer, train_tokenizer, validation, take, workers)
    _check_texts(text_field=text_field, document_separator=document_separator)
    corpus = Corpus(sources, text_field=text_field, take=take, skip_bad=skip_bad, leave_out=out)
    given = None if tokenizer is None else tokenization.load_tokenizer(tokenizer)
    corpus.part_at(document_separator, tokenization.END_OF_TEXT if given is None else str(given.eos_token))
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
            "document_separator": document_separator,
        },
    )
    if is_finished(out, request, corpus):
        return report_on(out, started, corpus, reused=True)
    with locked_folder(out, request, corpus) as journal:
        continued = journal.header is not None
        if not continued:
            remove_splits(out)  # a call that gave up may have been killed before it had removed them
            journal.begin(Header(request, *settle(corpus.documents, validation, seed)))
        used = given or _train_or_reopen(out, corpus, train_tokenizer, journal, seed, progress)
        tokenization.save_tokenizer(used, out / TRAIN / TOKENIZER_NAME)
        _encode_splits(corpus, used, journal, seed, out, workers or os.cpu_count() or 1, progress)
        _write_indexes(out, journal, used, corpus)
        journal.remove()
    return report_on(out, started, corpus, continued=continued)


def _check_options(
    tokenizer: str | None,
    train_tokenizer: int | None,
    validation: float,
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


def _check_texts(**options: str | None) -> None:
    """Raise `UserError` if the value of an option cannot be encoded; what is not UTF-8 on a command line cannot."""
    for option, text in options.items():
        try:
            (text or "").encode()
        except UnicodeEncodeError:
            raise UserError(f"--{option.replace('_', '-')} {text!a}: not UTF-8") from None


def _rule(journal: Journal, seed: int) -> SplitRule:
    """Return the rule by which documents are held out, with the threshold that the journal records."""
    assert journal.header is not None  # the journal has been begun
    return SplitRule(seed, journal.header.threshold)


def _train_or_reopen(
    out: Path,
    corpus: Corpus,
    vocab_size: int | None,
    journal: Journal,
    seed: int,
    progress: Callable[[PrepareProgress], None],
) -> "PreTrainedTokenizerFast":
    """Train a tokenizer on the training documents, or open the one that an interrupted call has trained."""
    folder = out / TRAIN / TOKENIZER_NAME
    if folder.is_dir():
        return tokenization.load_tokenizer(str(folder))
    assert vocab_size is not None  # _check_options has checked it
    progress(PrepareProgress("tokenizer"))
    texts = _training_texts(corpus, journal, _rule(journal, seed))
    pieces = (piece for text in texts for piece in pieces_of(text, TOKENIZER_PIECE_CHARS))
    return tokenization.train_tokenizer(pieces, vocab_size)


def _training_texts(corpus: Corpus, journal: Journal, rule: SplitRule) -> Iterator[str]:
    """Yield from every file the same share of texts that are not held out, `TOKENIZER_CHARS` in all."""
    assert journal.header is not None  # the journal has been begun
    if journal.header.within_documents:
        return (text for text, is_held_out in runs(corpus.samples(TOKENIZER_CHARS), rule) if not is_held_out)
    return (text for text in corpus.samples(TOKENIZER_CHARS) if not rule.is_held_out(text))


def _encode_splits(
    corpus: Corpus,
    tokenizer: "PreTrainedTokenizerFast",
    journal: Journal,
    seed: int,
    out: Path,
    workers: int,
    progress: Callable[[PrepareProgress], None],
) -> None:
    """Write the shards of both splits."""
    rule, state = _rule(journal, seed), journal.state
    encoder = Encoder(tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id, _dtype(tokenizer), rule)
    _one_pass(corpus, encoder, journal, out, workers, progress)
    if not state.documents:
        raise UserError("the sources hold no text")
    if not state.train.documents or (rule.threshold and not state.validation.documents):
        raise UserError(f"{out}: begun by an earlier version; what was unfinished is removed, run the command again")


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
        for chunk, encoded in encode_all(_chunks(corpus, journal, encoder.rule), encoder, workers):
            train.append(encoded.train)
            validation.append(encoded.validation)
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


def _chunks(corpus: Corpus, journal: Journal, rule: SplitRule) -> Iterator[Chunk]:
    """Yield the documents that are not yet encoded, in chunks of about `CHUNK_CHARS` characters for the workers."""
    assert journal.header is not None  # the journal has been begun
    sided: Iterator[tuple[str, bool | None]] = ((text, None) for text in corpus.documents())
    if journal.header.within_documents:
        sided = runs(corpus.documents(), rule)
    texts: list[str] = []
    sides: list[bool] = []
    chars = 0
    for text, side in islice(sided, journal.state.documents, None):
        texts.append(text)
        sides += [] if side is None else [side]
        chars += len(text) + DOCUMENT_CHARS
        if chars >= CHUNK_CHARS:
            yield Chunk(texts, corpus.read_bytes, sides or None)
            texts, sides, chars = [], [], 0
    if texts:
        yield Chunk(texts, corpus.read_bytes, sides or None)


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
        skipped_reasons=dict(corpus.skipped_reasons),
        separators=corpus.parted_at,
        separators_in_text=corpus.separators_in_text,
        within_documents=journal.header.within_documents,
    )
