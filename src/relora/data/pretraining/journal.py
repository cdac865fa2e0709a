"""The journal of a preparation, which lets it continue after a kill at any moment.

    OUT/journal.jsonl    first line: the request; then, every few seconds, a line with the number of encoded documents
                         and the lengths of both splits' shards at that time

Shards only grow, and they are synced to the disk before the line that states their lengths. To continue, the shards are
cut back to the lengths in the last complete line, and encoding goes on with the next document. So the result has the
same bytes as that of an uninterrupted preparation. Shards and journal are not written by `files.atomic`, since what a
kill leaves of them is not removed but continued.
"""

import errno
import fcntl
import json
import os
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

from pydantic import TypeAdapter, ValidationError

from relora.data.pretraining.encode import SplitTokens
from relora.data.pretraining.shards import Count, Options, Shard, Source
from relora.errors import UserError
from relora.files.atomic import sync
from relora.files.untrusted import inside

JOURNAL_NAME = "journal.jsonl"

TRAIN, VALIDATION = SPLITS = ("train", "validation")
"""Names of the folders of the training tokens and of the held-out tokens."""
HEADER_START = b'{"request": {"sources": '
"""Beginning of every journal."""

SHARD_TOKENS = 1 << 27
"""A shard is closed once it holds this many tokens."""


@dataclass(frozen=True)
class Request:
    """The sources and options of a preparation; equal requests have equal results."""

    sources: tuple[Source, ...]
    options: Options


@dataclass
class SplitState:
    """Content of one split so far: its shards and the documents in them."""

    shards: list[Shard] = field(default_factory=list)
    documents: Count = 0
    text_bytes: Count = 0

    @property
    def tokens(self) -> int:
        """Number of tokens in all shards."""
        return sum(shard.tokens for shard in self.shards)


@dataclass
class PassState:
    """State of the pass over the corpus: the content of one line of the journal."""

    train: SplitState = field(default_factory=SplitState)
    validation: SplitState = field(default_factory=SplitState)

    @property
    def documents(self) -> int:
        """Number of documents encoded so far, in both splits."""
        return self.train.documents + self.validation.documents


@dataclass(frozen=True)
class Header:
    """Content of the first line of the journal."""

    request: Request
    """A journal can only be continued by a call with the same request."""
    threshold: Count
    """The threshold below which a document is held out (see `sampling.SplitRule`)."""
    within_documents: bool = False
    """Whether it decides about parts of documents (see `held_out`)."""


class Journal:
    """The journal of a folder, opened and locked.

    `header` is None if there is nothing to continue; `begin` then writes it. `state` is that of the last complete line.

    Raises:
        UserError: another process holds the lock, or the file is damaged or not a journal.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        # Unbuffered, so that `close` does not try again to write what could not be written (to a full disk).
        self._file = (out / JOURNAL_NAME).open("a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise UserError(
                f"{out}: another `relora prepare` is writing here; wait for it or choose another --out"
            ) from None
        self.header, self.state = self._read()

    def begin(self, header: Header) -> None:
        """Write the header and the state of an empty folder; all earlier lines are removed."""
        self._file.truncate(0)
        self.header, self.state = header, PassState()
        self._append(asdict(header))
        sync(self._out)

    def note(self) -> None:
        """Append `state`; the shards must have been synced to the disk before."""
        self._append(asdict(self.state))

    def close(self) -> None:
        """Close and unlock the journal; the file stays, so that a later call can continue."""
        self._file.close()

    def erase(self) -> None:
        """Remove all lines, so that a later call starts from the beginning; the file stays, and stays locked."""
        self._file.truncate(0)

    def remove(self) -> None:
        """Delete and unlock the journal, when the preparation is complete or has been given up."""
        (self._out / JOURNAL_NAME).unlink()
        self.close()

    def _append(self, line: object) -> None:
        """Append one line and sync it; raise `OSError` if the disk has no space for all of it."""
        data = json.dumps(line).encode() + b"\n"
        if self._file.write(data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(self._file.fileno())

    def _read(self) -> tuple[Header | None, PassState]:
        """Read the first and the last complete line.

        A kill while a line was written leaves an incomplete last line, which is removed.
        """
        self._file.seek(0)
        lines = self._file.read().split(b"\n")
        complete, incomplete = lines[:-1], lines[-1]
        header, state = None, PassState()
        try:
            if complete:
                header = TypeAdapter(Header).validate_json(complete[0])
            else:
                self._check_unstarted(incomplete)
            if len(complete) > 1:
                state = TypeAdapter(PassState).validate_json(complete[-1])
            for shard in (*state.train.shards, *state.validation.shards):
                inside(self._out, shard.file)
        except (ValidationError, UserError):
            self._file.close()
            raise UserError(
                f"{self._out / JOURNAL_NAME}: damaged; delete {self._out} and prepare again, "
                "or choose another --out if `relora prepare` did not write it"
            ) from None
        if incomplete:
            self._file.truncate(sum(len(line) + 1 for line in complete))
        return header, state

    def _check_unstarted(self, incomplete: bytes) -> None:
        """Raise `UserError` if a file without a complete line was not left by a killed preparation."""
        other_files = {path.name for path in self._out.iterdir()} - {JOURNAL_NAME, *SPLITS}
        start = HEADER_START[: len(incomplete)]
        if other_files or incomplete[: len(start)] != start:
            raise UserError("not a journal")


class SplitWriter:
    """Append tokens to the shards of one split, and keep `state` up to date.

    At first the shards are cut back to the lengths in `state`, and shards that it does not list are deleted.

    Args:
        folder: the folder of the split.
        state: its content so far, from the journal.
        itemsize: bytes per token.

    Raises:
        UserError: a shard is shorter than `state` says.
    """

    def __init__(self, folder: Path, state: SplitState, itemsize: int) -> None:
        self._folder = folder
        self._state = state
        self._file: BinaryIO | None = None
        sizes = {shard.file: shard.tokens * itemsize for shard in state.shards}
        found = {file.name: file.stat().st_size for file in folder.glob("shard-*.bin")}
        for name in found.keys() - sizes.keys():
            (folder / name).unlink()
        for name, size in sizes.items():
            if found.get(name, 0) < size:
                raise UserError(
                    f"{folder / name}: cut short since; what was unfinished is removed, run the command again"
                )
            os.truncate(folder / name, size)
        if state.shards:
            self._file = (folder / state.shards[-1].file).open("ab")

    def append(self, split: SplitTokens) -> None:
        """Append the tokens that a chunk adds to this split, in a new shard if the last one is full."""
        self._state.documents += split.documents
        self._state.text_bytes += split.text_bytes
        if not len(split.tokens):
            return
        shards = self._state.shards
        if self._file is None or shards[-1].tokens >= SHARD_TOKENS:
            self.close()
            self._folder.mkdir(exist_ok=True)
            shards.append(Shard(file=f"shard-{len(shards):05d}.bin", tokens=0, crc32=0))
            self._file = (self._folder / shards[-1].file).open("wb")
            sync(self._folder)
        data = split.tokens.tobytes()
        self._file.write(data)
        last = shards[-1]
        shards[-1] = Shard(last.file, last.tokens + len(split.tokens), zlib.crc32(data, last.crc32))

    def sync(self) -> None:
        """Write everything appended to the disk, so that it survives a power cut."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close."""
        if self._file is not None:
            file, self._file = self._file, None
            with file:
                file.flush()
                os.fsync(file.fileno())
