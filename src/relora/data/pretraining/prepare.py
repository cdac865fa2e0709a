"""`relora prepare`: text -> a folder of tokens for training and one for validation.

    OUT/train/  OUT/validation/     two prepared folders (see `shards`)
    OUT/journal.jsonl               only while the work is unfinished (see `journal`)

Every document ends in EOS and documents follow one another without padding: decoding all of a split gives its
documents, joined by EOS, and no token is dropped. The result is the same for any number of workers, and after any
number of interruptions. Run again with nothing changed, it does nothing; with anything changed, it refuses.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from signal import SIGINT
from typing import TYPE_CHECKING

from relora.data import tokenizer as tokenization
from relora.data.pretraining.corpus import Corpus
from relora.data.pretraining.encode import CHUNK_CHARS, Chunk, Encoder, encode_all, pieces_of
from relora.data.pretraining.journal import JOURNAL_NAME, SPLITS, Header, Journal, Request, SplitState, SplitWriter
from relora.data.pretraining.progress import PrepareProgress
from relora.data.pretraining.shards import (
    FORMAT_VERSION,
    INDEX_NAME,
    TOKENIZER_NAME,
    Index,
    PreparedFolder,
    TokenDtype,
    read_index,
    write_index,
)
from relora.data.sampling import DRAWS, SplitRule
from relora.errors import Interrupted, RunStopped, UserError
from relora.messages import short_repr

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TRAIN, VALIDATION = SPLITS

TOKENIZER_CHARS = 100_000_000
"""A tokenizer is trained on about this much of the training text, from all files alike: more hardly changes it."""

MOST_IDS = 1 << 24
"""Of a tokenizer trained here: far beyond what any model has, well below what would fill the memory at once."""

MOST_NAMES = 4
"""Sources that a message lists."""

MOST_WORKERS = 1024
"""Two chunks of text are in memory for each."""

TRAINING_CHARS = 4096
"""A tokenizer is trained on pieces of this length: its time grows with the square of a word's."""

DOCUMENT_CHARS = 100
"""What a document takes in memory besides its text, counted as characters: a chunk holds so many tiny ones only."""

JOURNAL_SECONDS = 2.0
"""A kill costs at most this much work, and the documents before it are read once more."""


@dataclass(frozen=True)
class PrepareReport:
    """What was done."""

    train: Index
    validation: Index | None
    reused: bool
    """Everything was there already; nothing was written."""
    continued: bool
    """An interrupted run's work was taken up."""
    seconds: float

    def __str__(self) -> str:
        """For the person at the terminal: one line a split, and what was left out."""
        lines = [
            f"{name}: {index.tokens:,} tokens, {index.documents:,} documents, {index.text_bytes / 1e6:.1f} MB of text"
            for name, index in ((TRAIN, self.train), (VALIDATION, self.validation))
            if index is not None
        ]
        if self.train.skipped_records:
            lines.append(f"left out: {self.train.skipped_records:,} bad records")
        lines.append("nothing changed, nothing done" if self.reused else f"done in {self.seconds:.1f} s")
        return "\n".join(lines)


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
    """Write OUT/train and OUT/validation, continue writing them, or find them written.

    Args:
        sources: files, folders, saved datasets, hub ids (see `sources`).
        out: the folder to write.
        tokenizer: a tokenizer's folder or hub id; or
        train_tokenizer: the vocabulary size of one to train on the training documents. One of the two.
        validation: share of the documents held out, 0 <= share < 1. A document is drawn by a hash of its text, so
            the share is met on average; where it would leave a side empty, exactly one document is held out.
        text_field: field of JSONL records, column of tables.
        take: at most this many documents of each source.
        workers: threads that tokenize; all cores unless given. The result does not depend on it.
        seed: of the draw of validation documents.
        skip_bad: leave out records that cannot be used and count them, instead of refusing.
        progress: is told how far the work is, about once per MB of text.

    Raises:
        UserError: a source, an option or `out` cannot be used; what this call created is removed again.
        RunStopped: a disk or a network failed; the same call continues.
        Interrupted: Ctrl-C; the same call continues.
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
    if _is_finished(out, request):
        return _report(out, started, reused=True)
    with _workplace(out, request) as journal:
        continued = journal.header is not None
        if journal.header is None:
            _clear(out)  # of a start that was given up, and killed before it was gone
            journal.begin(Header(request, int(validation * DRAWS)))
        settled = given or _train_or_reopen(out, corpus, train_tokenizer, _rule(journal, seed), progress)
        tokenization.save_tokenizer(settled, out / TRAIN / TOKENIZER_NAME)
        _encode_splits(corpus, settled, journal, seed, out, workers or os.cpu_count() or 1, progress)
        _write_indexes(out, journal, settled, corpus)
        journal.remove()
    return _report(out, started, continued=continued)


def _check_options(
    tokenizer: str | None,
    train_tokenizer: int | None,
    validation: float,
    text_field: str,
    take: int | None,
    workers: int | None,
) -> None:
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


def _is_finished(out: Path, request: Request) -> bool:
    """Whether `out` holds all that was asked for; `UserError` if it holds anything else that is finished."""
    if not out.exists() or (out / JOURNAL_NAME).exists():
        return False
    if not out.is_dir():
        raise UserError(f"{out}: a file is in the way; choose another --out")
    if not (out / TRAIN / INDEX_NAME).exists():
        if any(out.iterdir()):
            raise UserError(f"{out}: holds something else, which is left alone; choose another --out")
        return False
    for split in _splits(out):
        index = PreparedFolder.open(split).index
        _refuse_other(out, Request(index.sources, index.options), request)
    return True


def _splits(out: Path) -> list[Path]:
    return [out / split for split in (TRAIN, VALIDATION) if (out / split / INDEX_NAME).exists()]


def _report(out: Path, started: float, *, reused: bool = False, continued: bool = False) -> PrepareReport:
    train, *validation = [read_index(split) for split in _splits(out)]
    return PrepareReport(
        train=train,
        validation=validation[0] if validation else None,
        reused=reused,
        continued=continued,
        seconds=time.monotonic() - started,
    )


def _refuse_other(out: Path, found: Request, wanted: Request) -> None:
    """`UserError` that names the first thing in which two requests differ."""
    names = [[source.source for source in request.sources] for request in (found, wanted)]
    differences = [
        f"{key} was {short_repr(found.options.get(key))} and is now {short_repr(value)}"
        for key, value in wanted.options.items()
        if found.options.get(key) != value
    ]
    if names[0] != names[1]:
        before, now = (", ".join(some[:MOST_NAMES]) + ", ..." * (len(some) > MOST_NAMES) for some in names)
        differences.append(f"the sources were {before} and are now {now}")
    else:
        changed = [new.source for old, new in zip(found.sources, wanted.sources, strict=True) if old != new]
        differences += [f"{source} has changed since" for source in changed]
    if differences:
        raise UserError(f"{out}: holds tokens prepared otherwise ({differences[0]}); delete it or choose another --out")


@contextmanager
def _workplace(out: Path, request: Request) -> Iterator[Journal]:
    """The folder, made and locked. A mistake of the user's leaves nothing behind; anything else can be continued."""
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        journal = Journal(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}; choose another --out") from None
    with closing(journal):
        if journal.header is not None:
            _refuse_other(out, journal.header.request, request)
        try:
            yield journal
        except UserError:
            journal.forget()
            _clear(out)
            journal.remove()
            for folder in missing:
                folder.rmdir()
            raise
        except KeyboardInterrupt:
            raise Interrupted(f"{out}: interrupted; the same command continues", SIGINT) from None
        except OSError as error:
            raise RunStopped(f"{out}: cannot be written: {error.strerror}; the same command continues") from None


def _clear(out: Path) -> None:
    for split in (TRAIN, VALIDATION):
        shutil.rmtree(out / split, ignore_errors=True)


def _rule(journal: Journal, seed: int) -> SplitRule:
    assert journal.header is not None  # begun
    return SplitRule(seed, journal.header.threshold)


def _train_or_reopen(
    out: Path,
    corpus: Corpus,
    vocab_size: int | None,
    rule: SplitRule,
    progress: Callable[[PrepareProgress], None],
) -> "PreTrainedTokenizerFast":
    """The tokenizer of this corpus: trained on training documents, or the one an interrupted run has trained."""
    folder = out / TRAIN / TOKENIZER_NAME
    if folder.is_dir():
        return tokenization.load_tokenizer(str(folder))
    assert vocab_size is not None  # _check_options sees to it
    progress(PrepareProgress("tokenizer"))
    texts = (text for text in corpus.samples(TOKENIZER_CHARS) if not rule.is_held_out(text))
    pieces = (piece for text in texts for piece in pieces_of(text, TRAINING_CHARS))
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
    """Write the shards of both splits; in a second pass if the draws left a side empty (few documents)."""
    assert journal.header is not None  # begun
    backend, dtype = tokenizer.backend_tokenizer.to_str(), _dtype(tokenizer)
    while True:
        rule = _rule(journal, seed)
        _one_pass(corpus, Encoder(backend, tokenizer.eos_token_id, dtype, rule), journal, out, workers, progress)
        state = journal.state
        if state.lowest_draw is None:
            raise UserError("the sources hold no text")
        one_document = state.lowest_draw + 1  # the threshold that holds out the one document with the lowest draw
        both = state.train.documents and state.validation.documents
        if both or rule.threshold in (0, one_document):
            break
        journal.begin(Header(journal.header.request, one_document))
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
    """Encode all documents that the journal's state does not count yet."""
    state, total = journal.state, corpus.total_bytes
    noted = time.monotonic()
    with (
        closing(SplitWriter(out / TRAIN, state.train, encoder.itemsize)) as train,
        closing(SplitWriter(out / VALIDATION, state.validation, encoder.itemsize)) as validation,
    ):
        for chunk, encoded in encode_all(_chunks(corpus, skip=state.documents), encoder, workers):
            train.append(encoded.train)
            validation.append(encoded.validation)
            lowest = DRAWS if state.lowest_draw is None else state.lowest_draw
            state.lowest_draw = min(encoded.lowest_draw, lowest)
            if time.monotonic() - noted >= JOURNAL_SECONDS:
                train.sync()
                validation.sync()
                journal.note()
                noted = time.monotonic()
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
    """The documents after the first `skip`, bundled for the workers."""
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
    return "uint16" if tokenization.vocabulary_size(tokenizer) <= 1 << 16 else "uint32"


def _write_indexes(out: Path, journal: Journal, tokenizer: "PreTrainedTokenizerFast", corpus: Corpus) -> None:
    """The last thing written: from here on the folders are whole."""
    for split, state in ((TRAIN, journal.state.train), (VALIDATION, journal.state.validation)):
        if state.documents:
            tokenization.copy_tokenizer(out / TRAIN / TOKENIZER_NAME, out / split / TOKENIZER_NAME)
            write_index(out / split, _index(state, journal, tokenizer, corpus))


def _index(state: SplitState, journal: Journal, tokenizer: "PreTrainedTokenizerFast", corpus: Corpus) -> Index:
    assert journal.header is not None  # begun
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
