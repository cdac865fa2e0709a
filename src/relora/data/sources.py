"""Sources as a user names them, resolved to files or datasets, and the one way to read all of them in order.

    FILE                            a kind of file that `readers` knows, also with .gz or .zst
    FOLDER                          the files in it, recursively, sorted by path; not README* and hidden files
    FOLDER from save_to_disk        a `datasets` Dataset, or the split `train` of a DatasetDict
    owner/name, owner/name:config   the split `train` of a dataset on the Hugging Face hub, streamed

`folders` says which files of a folder are read where it has several kinds; what is not read is counted and said. A file
that is named itself may be of any kind.

The order is fixed by the names, so reading can be repeated; memory is bounded as in `readers`.
"""

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Any, BinaryIO, ClassVar, Generic, TypeVar

import pyarrow

from relora.data.folders import LeftOut, dataset_files, describe, files_of
from relora.data.json_files import Row
from relora.data.plain_text import PLAIN_TEXT_KINDS, Separators, read_text
from relora.data.readers import (
    COMPRESSIONS,
    READERS,
    decompressed,
    file_kind,
    hub_revision,
    one_line,
    read_hub_dataset,
    read_saved_dataset,
    why_not_utf8,
    why_unreadable,
)
from relora.errors import UserError
from relora.files.untrusted import no_address
from relora.messages import LONGEST_PATH, short_name

HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?")

REASON = re.compile(r"^.*?: |[;(].*", re.DOTALL)
"""Parts of a message about a bad record that are not its reason: the place, and the details."""

MOST_REASONS = 8
"""Most reasons that are counted each by itself."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class ResolvedSource:
    """A source that exists: one or more files, the files of a saved dataset, or a dataset on the hub."""

    name: str
    """The path or hub id as it was given."""
    files: tuple[Path, ...] = ()
    """Empty for a hub dataset."""
    sizes: tuple[int, ...] = ()
    """Bytes on disk of each file."""
    modified_ns: tuple[int, ...] = ()
    """Modification time of each file, in nanoseconds."""
    is_saved_dataset: bool = False
    revision: str = ""
    """Commit of a hub dataset."""
    left_out: tuple[LeftOut, ...] = ()
    """Files of a folder that are not read."""

    @property
    def capitals(self) -> tuple[str, ...]:
        """Names of the files with capital letters in the suffixes by which they are read."""
        return tuple(file.name for file in self.files if not self.is_saved_dataset and not _is_in_small_letters(file))

    @property
    def bytes(self) -> int | None:
        """Bytes on disk of all files; None for a hub dataset."""
        return sum(self.sizes) if self.files else None

    @property
    def fingerprint(self) -> str:
        """A hash over the files' names, sizes and modification times, and over the commit of a hub dataset.

        It tells without reading the files whether a source has changed.
        """
        digest = hashlib.blake2b(self.revision.encode(), digest_size=16)
        for file, size, time in zip(self.files, self.sizes, self.modified_ns, strict=True):
            digest.update(os.fsencode(f"{file}\x1f{size}\x1f{time}\x1e"))
        return digest.hexdigest()


def resolve(source: str, preferred_kinds: Sequence[str], leave_out: Path | None = None) -> ResolvedSource:
    """Find what a source names.

    Args:
        source: a path, or a hub id with or without `:config`.
        preferred_kinds: kinds of files to which a folder is restricted if it has any of them.
        leave_out: a folder whose files are no part of a source that contains it.

    Raises:
        UserError: there is no such file, folder or dataset, or it cannot be read.
    """
    try:
        path = Path(no_address(source))
    except ValueError as error:
        raise UserError(f"a source: {error}") from None
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: the path contains a NUL
        mode = 0
    except OSError as error:
        raise UserError(f"{short_name(source, LONGEST_PATH)}: cannot be read: {error.strerror}") from None
    if S_ISDIR(mode):
        return _resolve_folder(source, path, preferred_kinds, leave_out)
    if mode:
        if file_kind(path) is None:
            raise UserError(f"{path}: not a kind of file that can be read; {_readable(preferred_kinds)}")
        if not S_ISREG(mode):  # a pipe can be read only once, and reading it may block for ever
            raise UserError(f"{path}: not a regular file; write its content to one")
        return _with_status(source, [path])
    if (match := HUB_ID.fullmatch(source)) and file_kind(path) is None:
        return ResolvedSource(source, revision=hub_revision(match["id"]))
    raise UserError(f"{short_name(source, LONGEST_PATH)}: no such file or folder")


def _resolve_folder(source: str, path: Path, preferred_kinds: Sequence[str], leave_out: Path | None) -> ResolvedSource:
    """Find the files of a folder: all of a saved dataset's, otherwise those whose content is data."""
    is_saved_dataset = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    excluded = None if leave_out is None else leave_out.resolve()
    try:
        if is_saved_dataset:
            files, left_out = dataset_files(path, excluded)
        else:
            files, left_out = files_of(path, preferred_kinds, excluded)
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be read: {error.strerror}") from None
    if not files:
        held = f" (it holds {describe(left_out, preferred_kinds)})" if left_out else ""
        raise UserError(f"{path}: no readable file in this folder{held}; {_readable(preferred_kinds)}")
    return replace(_with_status(source, files, is_saved_dataset), left_out=tuple(left_out))


def _with_status(source: str, files: Sequence[Path], is_saved_dataset: bool = False) -> ResolvedSource:
    """Add the sizes and modification times of the files."""
    try:
        found = [file.stat() for file in files]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from None
    sizes = tuple(status.st_size for status in found)
    return ResolvedSource(source, tuple(files), sizes, tuple(status.st_mtime_ns for status in found), is_saved_dataset)


def _is_in_small_letters(file: Path) -> bool:
    """Return whether a file's suffixes are in small letters, the only ones that version 0.1 knew."""
    name = Path(file.name)
    return (Path(name.stem).suffix if name.suffix in COMPRESSIONS else name.suffix) in READERS


def _readable(preferred_kinds: Sequence[str]) -> str:
    """Return the end of a message that lists the kinds of files that can be read, preferred ones first."""
    kinds = [*preferred_kinds, *(kind for kind in READERS if kind not in preferred_kinds)]
    return f"readable are {', '.join(kinds)}, also with {' or '.join(COMPRESSIONS)}"


def left_out_line(reasons: Mapping[str, int]) -> str:
    """Return a line about the bad records that were left out, by reason, the most frequent one first."""
    counts = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return f"left out: {sum(reasons.values()):,} bad records ({', '.join(f'{n:,} {why}' for why, n in counts)})"


class SourceReader(ABC, Generic[Item]):
    """Read the items of several sources in order, as often as asked, and keep count of the bytes read.

    A subclass says what an item is by `item_of`: documents in `pretraining.corpus`, records in `finetuning.records`.

    Args:
        sources: paths or hub ids, see the module.
        column: the only column that items need; all columns unless given.
        skip_bad: count records that cannot be used (`skipped_records`) instead of refusing them.
        leave_out: a folder whose files are no part of a source that contains it.

    Raises:
        UserError: a source is not there; and while reading, a file or record cannot be used (unless `skip_bad`).
    """

    preferred_kinds: ClassVar[tuple[str, ...]]
    """Kinds of files to which a folder is restricted if it has any of them."""
    item_name: ClassVar[str]
    """The word for an item in the message about a file that holds none."""
    skip_option: str
    """The name under which the user knows `skip_bad`; empty in a command that has no such option."""

    def __init__(
        self,
        sources: Sequence[str],
        *,
        column: str | None = None,
        skip_bad: bool = False,
        leave_out: Path | None = None,
    ) -> None:
        if not sources:
            raise UserError("no source given; give a file, a folder or a dataset")
        self.sources = [resolve(source, self.preferred_kinds, leave_out) for source in sources]
        self.skipped_records = 0
        """Records that could not be used, in the last or current pass."""
        self.skipped_reasons: Counter[str] = Counter()
        """Number of them for each reason."""
        self.separators = Separators()
        """Texts between the documents of a plain text file."""
        self.parted_at = 0
        """Separators between the documents of plain text files, in the last or current pass."""
        self.cut_long_texts = True
        """Whether a long document of a plain text file is several items."""
        self._column = column
        self._skip_bad = skip_bad
        self._finished_bytes = 0
        self._dataset_bytes = 0
        self._open_file: BinaryIO | None = None

    @abstractmethod
    def item_of(self, where: str, fields: Mapping[str, Any]) -> Item | None:
        """Return the item in a record; None if there is none, which is reported to `bad` if it is a mistake."""

    @property
    def read_bytes(self) -> int:
        """Bytes on disk that the current pass has read, of all sources that are not on the hub."""
        if self._open_file is not None:
            return self._finished_bytes + self._open_file.tell()
        return self._finished_bytes + self._dataset_bytes

    def start_pass(self) -> None:
        """Set the counts of bytes read, skipped records and separators back to zero."""
        self.skipped_reasons.clear()
        self.skipped_records = self.parted_at = self._finished_bytes = self._dataset_bytes = 0
        self._open_file = None

    def parts(self, source: ResolvedSource) -> Iterator[Iterable[Item]]:
        """Yield the items of a source, one iterable per file; of a dataset, one for the whole."""
        if source.is_saved_dataset:
            yield self._saved_dataset(source)
        elif source.files:
            for file, size in zip(source.files, source.sizes, strict=True):
                yield self._file(file)
                self._finished_bytes += size
        else:
            match = HUB_ID.fullmatch(source.name)
            assert match is not None  # `resolve` has checked it
            yield self._items(read_hub_dataset(match["id"], match["config"], source.revision))

    def notes(self) -> list[str]:
        """Return lines for the user about the last pass: files and records not read, separators between documents."""
        notes = self.notes_on_folders()
        if self.parted_at:
            notes.append(f"documents parted at {self.parted_at:,} separators ({self.separators})")
        if self.skipped_records:
            notes.append(left_out_line(self.skipped_reasons))
        return notes

    def notes_on_folders(self) -> list[str]:
        """Return a line for each folder that holds what is not read."""
        return [
            f"{source.name}: not read: {describe(source.left_out, self.preferred_kinds)}"
            for source in self.sources
            if source.left_out
        ]

    def bad(self, message: str) -> None:
        """Raise `UserError` about a record or file that cannot be used; with `skip_bad`, count it instead."""
        if not self._skip_bad:
            raise UserError(f"{message} ({self.skip_option} leaves such records out)" if self.skip_option else message)
        self.skipped_records += 1
        reason = REASON.sub("", message).strip()
        known = reason in self.skipped_reasons or len(self.skipped_reasons) < MOST_REASONS
        self.skipped_reasons[reason if known else "other reasons"] += 1

    def _items(self, rows: Iterable[Row]) -> Iterator[Item]:
        """Yield the items of the rows that a reader yields."""
        for where, fields in rows:
            if not isinstance(fields, dict):
                self.bad(f"{where}: not a JSON object")
            elif (item := self.item_of(where, fields)) is not None:
                yield item

    def _rows(self, file: Path, stream: BinaryIO) -> Iterator[Row]:
        """Yield the rows of a file by its reader."""
        kind = str(file_kind(file))
        if kind not in PLAIN_TEXT_KINDS:
            return READERS[kind](stream, str(file), self.bad, self._column)
        return read_text(
            stream,
            str(file),
            self.bad,
            self._column,
            separators=self.separators,
            note_separator=self._note_separator,
            cut=self.cut_long_texts,
        )

    def _note_separator(self) -> None:
        """Count a separator between two documents."""
        self.parted_at += 1

    def _file(self, file: Path) -> Iterator[Item]:
        """Yield the items of a file; an error that concerns the whole file counts as one bad record."""
        is_empty = True
        try:
            with file.open("rb") as raw:
                self._open_file = raw
                try:
                    for item in self._items(self._rows(file, decompressed(raw, file.name))):
                        is_empty = False
                        yield item
                finally:  # also when the consumer stops in the middle of the file
                    self._open_file = None
            if is_empty:
                self.bad(f"{file}: holds no {self.item_name}")
        except UnicodeDecodeError:
            with file.open("rb") as raw:
                self.bad(f"{file}: {why_not_utf8(decompressed(raw, file.name).read(2))}")
        except (OSError, pyarrow.ArrowException) as error:
            self.bad(f"{file}: cannot be read: {why_unreadable(error)}")

    def _saved_dataset(self, source: ResolvedSource) -> Iterator[Item]:
        """Yield the items of a saved dataset; its share of rows read stands for its share of bytes read."""
        size = sum(source.sizes)

        def note_share(share: float) -> None:
            self._dataset_bytes = int(share * size)

        try:
            yield from self._items(read_saved_dataset(Path(source.name), self.bad, self._column, note_share))
        except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
            self.bad(f"{source.name}: cannot be read: {one_line(error)}")
        self._dataset_bytes = 0
        self._finished_bytes += size
