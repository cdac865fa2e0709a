"""Where text comes from: files, folders of files, saved datasets and hub datasets, as one stream of documents.

    name.txt  name.md            one document a file (a long one is cut at blank lines, see `readers.read_text`)
    name.jsonl                   one document a line, in a field by name
    name.parquet                 one document a row, in a column by name
    each also with .gz or .zst (parquet compresses by itself)
    FOLDER                       all of the above in it, recursively, sorted by path; not README and hidden files
    FOLDER from save_to_disk     a `datasets` Dataset, or the split `train` of a DatasetDict
    owner/name, owner/name:config   a dataset on the Hugging Face hub, streamed

The order is fixed by the sources' names, so a pass can be repeated; memory is bounded by the largest document.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import BinaryIO

import pyarrow

from relora.data import readers
from relora.data.pretraining.shards import Source
from relora.errors import UserError
from relora.files.untrusted import no_address
from relora.messages import LONGEST_PATH, first_line, short_name

FILE_SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".zst")
HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?")


@dataclass(frozen=True)
class _Origin:
    """A source resolved: its files, or a saved dataset's folder, or a hub dataset's name."""

    source: str
    files: tuple[Path, ...]
    sizes: tuple[int, ...]
    times: tuple[int, ...]
    """When the files were changed, in ns."""
    saved_dataset: bool = False
    revision: str = ""
    """Of a hub dataset."""


class Corpus:
    """The documents of all sources, in order, as often as asked.

    Args:
        sources: paths or hub ids, as in the module's table.
        text_field: field of JSONL records, column of tables.
        take: at most this many documents of each source.
        skip_bad: count records that cannot be used instead of refusing them.
        leave_out: a folder that is not part of a source that holds it: where the result is written.

    `UserError` for a source that is not there, and while iterating for one that cannot be read.
    """

    def __init__(
        self,
        sources: Sequence[str],
        *,
        text_field: str = "text",
        take: int | None = None,
        skip_bad: bool = False,
        leave_out: Path | None = None,
    ) -> None:
        if not sources:
            raise UserError("no source given; give a file, a folder or a dataset")
        self._origins = [_resolve(source, leave_out) for source in sources]
        self._text_field = text_field
        self._take = take
        self._skip_bad = skip_bad
        self.skipped_records = 0
        self._read_before = 0
        self._position: Callable[[], int] = int

    @property
    def total_bytes(self) -> int | None:
        """On disk, all sources; None when one is streamed or `take` may stop early."""
        if self._take is not None or not all(origin.files for origin in self._origins):
            return None
        return sum(sum(origin.sizes) for origin in self._origins)

    @property
    def read_bytes(self) -> int:
        """Of `total_bytes`, how much the current pass has read."""
        return self._read_before + self._position()

    def records(self) -> tuple[Source, ...]:
        """What identifies the sources: when these are equal, so are the documents."""
        return tuple(
            Source(
                source=origin.source.encode(errors="surrogateescape").decode(errors="backslashreplace"),
                files=len(origin.files),
                bytes=sum(origin.sizes) if origin.files else None,
                fingerprint=_fingerprint(origin),
            )
            for origin in self._origins
        )

    def documents(self) -> Iterator[str]:
        """One pass over all documents, none of them empty."""
        self.skipped_records = self._read_before = 0
        self._position = int
        for origin in self._origins:
            yield from islice(self._origin_documents(origin), self._take)

    def samples(self, text_chars: int) -> Iterator[str]:
        """Whole documents of about `text_chars` characters in all: from each file the same share, from its start."""
        parts = sum(max(1, len(origin.files)) for origin in self._origins)
        for origin in self._origins:
            for part in self._parts(origin):
                left = text_chars // parts
                for text in islice(part, self._take):
                    yield text
                    left -= len(text)
                    if left <= 0:
                        break

    def _origin_documents(self, origin: _Origin) -> Iterator[str]:
        for part in self._parts(origin):
            yield from part

    def _parts(self, origin: _Origin) -> Iterator[Iterable[str]]:
        """The documents of a source, file by file."""
        if origin.saved_dataset:
            yield self._saved_dataset(origin)
        elif origin.files:
            for file, size in zip(origin.files, origin.sizes, strict=True):
                yield self._file(file)
                self._position = int
                self._read_before += size
        else:
            match = HUB_ID.fullmatch(origin.source)
            assert match is not None  # _resolve sees to it
            yield readers.read_hub_dataset(match["id"], match["config"], origin.revision, self._text_field, self._bad)

    def _file(self, file: Path) -> Iterator[str]:
        """The documents of one file; what is wrong with it as a whole is one bad record."""
        empty = True
        try:
            with file.open("rb") as raw:
                self._position = raw.tell
                try:
                    for text in self._read(file, raw):
                        if text:
                            empty = False
                            yield text
                finally:  # also where `take` stops in the middle of a file
                    self._position = int
            if empty:
                self._bad(f"{file}: holds no text")
        except UnicodeDecodeError as error:
            self._bad(f"{file}: not UTF-8 text ({error.reason}); convert it, e.g. with iconv")
        except (OSError, pyarrow.ArrowException) as error:
            reason = getattr(error, "strerror", None) or first_line(str(error))
            self._bad(f"{file}: cannot be read: {reason}")

    def _read(self, file: Path, raw: BinaryIO) -> Iterator[str]:
        stream = readers.decompressed(raw, file.name)
        match _format(file):
            case ".jsonl":
                return readers.read_jsonl(stream, str(file), self._text_field, self._bad)
            case ".parquet":
                return readers.read_parquet(stream, str(file), self._text_field, self._bad)
            case _:
                return readers.read_text(stream)

    def _saved_dataset(self, origin: _Origin) -> Iterator[str]:
        size = sum(origin.sizes)

        def at(share: float) -> None:
            self._position = lambda: int(share * size)

        try:
            yield from readers.read_saved_dataset(Path(origin.source), self._text_field, self._bad, at)
        except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
            self._bad(f"{origin.source}: cannot be read: {first_line(str(error))}")
        self._position = int
        self._read_before += size

    def _bad(self, message: str) -> None:
        if not self._skip_bad:
            raise UserError(f"{message} (--skip-bad leaves such records out)")
        self.skipped_records += 1


def _resolve(source: str, leave_out: Path | None) -> _Origin:
    try:
        path = Path(no_address(source))
    except ValueError as error:
        raise UserError(f"a source: {error}") from None
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL
        mode = 0
    except OSError as error:
        raise UserError(f"{short_name(source, LONGEST_PATH)}: cannot be read: {error.strerror}") from None
    if S_ISDIR(mode):
        return _resolve_folder(source, path, leave_out)
    if mode:
        if _format(path) is None:
            raise UserError(f"{path}: not a kind of file that can be read; readable are {_readable()}")
        if not S_ISREG(mode):
            raise UserError(f"{path}: not a regular file; write its content to one")  # a pipe can be read only once
        return _origin(source, [path])
    if (match := HUB_ID.fullmatch(source)) and _format(path) is None:
        return _Origin(source, (), (), (), revision=readers.hub_revision(match["id"]))
    raise UserError(f"{short_name(source, LONGEST_PATH)}: no such file or folder")


def _resolve_folder(source: str, path: Path, leave_out: Path | None) -> _Origin:
    saved_dataset = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    apart = None if leave_out is None else leave_out.resolve()
    try:
        files = [
            file
            for file in sorted(path.rglob("*"))
            if (saved_dataset or _is_text(file.relative_to(path)))
            and file.is_file()
            and (apart is None or apart not in file.absolute().parents)
        ]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not files:
        raise UserError(f"{path}: no readable file in this folder; readable are {_readable()}")
    return _origin(source, files, saved_dataset)


def _origin(source: str, files: Sequence[Path], saved_dataset: bool = False) -> _Origin:
    try:
        found = [file.stat() for file in files]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from None
    sizes, times = [stat.st_size for stat in found], [stat.st_mtime_ns for stat in found]
    return _Origin(source, tuple(files), tuple(sizes), tuple(times), saved_dataset)


def _format(file: Path) -> str | None:
    """The suffix that says how to read a file, or None."""
    name = Path(file.name)
    suffix = Path(name.stem).suffix if name.suffix in COMPRESSIONS else name.suffix
    return suffix if suffix in FILE_SUFFIXES else None


def _is_text(relative: Path) -> bool:
    """Whether a file found in a folder is part of the corpus, rather than hidden or about it."""
    hidden = any(part.startswith(".") for part in relative.parts)
    return not hidden and not relative.name.startswith("README") and _format(relative) is not None


def _readable() -> str:
    return f"{', '.join(FILE_SUFFIXES)}, also with {' or '.join(COMPRESSIONS)}"


def _fingerprint(origin: _Origin) -> str:
    """Over names, sizes and modification times: a changed corpus is noticed without reading it."""
    digest = hashlib.blake2b(origin.revision.encode(), digest_size=16)
    for file, size, time in zip(origin.files, origin.sizes, origin.times, strict=True):
        digest.update(os.fsencode(f"{file}\x1f{size}\x1f{time}\x1e"))
    return digest.hexdigest()
