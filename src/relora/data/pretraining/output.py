"""The folder that `relora prepare` writes: whether it is complete, locked while it is written, reported at the end.

A folder belongs to one request (sources and options). It is never written over: a call with another request refuses.
"""

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT

from relora.data.folders import LeftOut
from relora.data.pretraining.corpus import Corpus
from relora.data.pretraining.journal import JOURNAL_NAME, TRAIN, VALIDATION, Journal, Request
from relora.data.pretraining.shards import INDEX_NAME, Index, PreparedFolder, Source, read_index
from relora.data.sources import ResolvedSource, left_out_line
from relora.errors import Interrupted, RunStopped, UserError
from relora.messages import short_repr

MOST_NAMES = 4
"""Most sources that a message lists."""


@dataclass(frozen=True)
class NotRead:
    """Files of a source that are not read."""

    source: str
    left_out: tuple[LeftOut, ...]


@dataclass(frozen=True)
class PrepareReport:
    """Result of a call of `prepare`."""

    train: Index
    validation: Index | None
    """None if no document was to be held out."""
    reused: bool
    """Whether everything existed already, so that nothing was written."""
    continued: bool
    """Whether the work of an interrupted call was continued."""
    seconds: float
    """Duration of this call."""
    not_read: tuple[NotRead, ...]
    """Files of folders among the sources that are not read."""
    notes: tuple[str, ...]
    """Lines about that, and about separators between documents."""

    def __str__(self) -> str:
        """Return the text for the terminal: one line per split, what was left out, and how documents were parted."""
        lines = [
            f"{name}: {index.tokens:,} tokens, {index.documents:,} documents, {index.text_bytes / 1e6:.1f} MB of text"
            for name, index in ((TRAIN, self.train), (VALIDATION, self.validation))
            if index is not None
        ]
        if self.train.skipped_records:
            lines.append(left_out_line(self.train.skipped_reasons or {"of any kind": self.train.skipped_records}))
        lines += self.notes
        lines.append("nothing changed, nothing done" if self.reused else f"done in {self.seconds:.1f} s")
        return "\n".join(lines)


def is_finished(out: Path, request: Request, corpus: Corpus) -> bool:
    """Return whether `out` is the complete result of this request; `UserError` if it contains anything else.

    An unfinished folder, which has a journal, is not complete.
    """
    if not out.exists() or (out / JOURNAL_NAME).exists():
        return False
    if not out.is_dir():
        raise UserError(f"{out}: a file is in the way; choose another --out")
    if not (out / TRAIN / INDEX_NAME).exists():
        if any(out.iterdir()):
            raise UserError(f"{out}: holds something else, which is left alone; choose another --out")
        return False
    for split in _finished_splits(out):
        index = PreparedFolder.open(split).index
        _refuse_other(out, Request(index.sources, index.options), request, corpus)
    return True


def _finished_splits(out: Path) -> list[Path]:
    """Return the folders of the splits that have an index, the one for training first."""
    return [out / split for split in (TRAIN, VALIDATION) if (out / split / INDEX_NAME).exists()]


def report_on(
    out: Path, started: float, corpus: Corpus, *, reused: bool = False, continued: bool = False
) -> PrepareReport:
    """Read the indexes of the finished folder `out` and return the report.

    Args:
        out: the folder.
        started: `time.monotonic()` at the start of the call.
        corpus: the sources.
        reused: whether nothing had to be written.
        continued: whether the work of an interrupted call was continued.
    """
    train, *validation = [read_index(split) for split in _finished_splits(out)]
    return PrepareReport(
        train=train,
        validation=validation[0] if validation else None,
        reused=reused,
        continued=continued,
        seconds=time.monotonic() - started,
        not_read=tuple(NotRead(source.name, source.left_out) for source in corpus.sources if source.left_out),
        notes=tuple(_notes(train, corpus)),
    )


def _notes(index: Index, corpus: Corpus) -> list[str]:
    """Return lines about what is not read, how documents were parted, and what is held out of a single one."""
    notes = corpus.notes_on_folders()
    if index.separators or index.options.get("document_separator") is not None:
        notes.append(f"documents parted at {index.separators:,} separators ({corpus.separators})")
    if index.separators_in_text:
        remedy = "; --document-separator parts plain text files inside a line, too" if corpus.has_plain_text else ""
        notes.append(f"{corpus.noticed}: {index.separators_in_text:,} times inside a text, trained as text{remedy}")
    if index.within_documents:
        notes.append("few documents: parts of them are held out, cut at blank lines")
    return notes


def _refuse_other(out: Path, found: Request, wanted: Request, corpus: Corpus) -> None:
    """Raise a `UserError` that names the first difference between two requests, if they differ.

    Args:
        out: the folder, for the message.
        found: the request by which the folder was written.
        wanted: the request of this call.
        corpus: the sources of this call.
    """
    names_before, names_now = ([source.source for source in request.sources] for request in (found, wanted))
    differences = [
        f"{key} was {short_repr(found.options.get(key))} and is now {short_repr(value)}"
        for key, value in wanted.options.items()
        if found.options.get(key) != value
    ]
    if names_before != names_now:
        differences.append(f"the sources were {_first_names(names_before)} and are now {_first_names(names_now)}")
    else:
        differences += [
            _why_changed(old, new, resolved)
            for old, new, resolved in zip(found.sources, wanted.sources, corpus.sources, strict=True)
            if old != new
        ]
    if not differences and "document_separator" not in found.options and corpus.is_parted():
        differences.append(f"{corpus.separators} was text, and now parts the documents of plain text files")
    if differences:
        raise UserError(f"{out}: holds tokens prepared otherwise ({differences[0]}); delete it or choose another --out")


def _why_changed(old: Source, new: Source, resolved: ResolvedSource) -> str:
    """Return how a source differs from what was prepared."""
    if old.files != new.files:
        names = _first_names(resolved.capitals)
        why = f": {names} with a suffix in capitals is read, too" if names else ""
        return f"{new.source} had {old.files:,} files to read, and now has {new.files:,}{why}"
    return f"{new.source} has changed since"


def _first_names(names: Sequence[str]) -> str:
    """Return the first `MOST_NAMES` names for a message, with dots where there are more."""
    dots = ["..."] if len(names) > MOST_NAMES else []
    return ", ".join([*names[:MOST_NAMES], *dots])


@contextmanager
def locked_folder(out: Path, request: Request, corpus: Corpus) -> Iterator[Journal]:
    """Create `out` unless it exists, lock it and yield its journal.

    After a `UserError` inside the `with` block everything that was created is removed. After any other error the work
    can be continued; Ctrl-C and errors of the disk are raised as `Interrupted` and `RunStopped`.
    """
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        journal = Journal(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}; choose another --out") from None
    with closing(journal):
        if journal.header is not None:
            _refuse_other(out, journal.header.request, request, corpus)
        try:
            yield journal
        except UserError:
            journal.erase()
            remove_splits(out)
            journal.remove()
            for folder in missing:
                folder.rmdir()
            raise
        except KeyboardInterrupt:
            raise Interrupted(f"{out}: interrupted; the same command continues", SIGINT) from None
        except OSError as error:
            raise RunStopped(f"{out}: cannot be written: {error.strerror}; the same command continues") from None


def remove_splits(out: Path) -> None:
    """Delete the folders of both splits, as far as they exist."""
    for split in (TRAIN, VALIDATION):
        shutil.rmtree(out / split, ignore_errors=True)
