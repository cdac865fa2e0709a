"""How a preparation survives a kill at any moment: shards that only grow, and a journal of how far they are good.

    OUT/journal.jsonl    first line: what was asked for; then one line per few seconds of work: how many documents are
                         encoded, and how long each split's shards are up to there

The shards are synced before the line that speaks of them. To continue is to cut the shards back to the last whole
line and go on with the next document: the bytes come out as if nothing had happened.
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

SPLITS = ("train", "validation")
HEADER_START = b'{"request": {"sources": '

SHARD_TOKENS = 1 << 27
"""A shard is closed once it holds this many tokens."""


@dataclass(frozen=True)
class Request:
    """What was asked for; equal requests have equal results."""

    sources: tuple[Source, ...]
    options: Options


@dataclass
class SplitState:
    """How far one split is written."""

    shards: list[Shard] = field(default_factory=list)
    documents: Count = 0
    text_bytes: Count = 0

    @property
    def tokens(self) -> int:
        """Over all shards."""
        return sum(shard.tokens for shard in self.shards)


@dataclass
class PassState:
    """How far the pass over the corpus is: what one line of the journal holds."""

    train: SplitState = field(default_factory=SplitState)
    validation: SplitState = field(default_factory=SplitState)
    lowest_draw: Count | None = None
    """Of all documents so far (see `encode.SplitRule`)."""

    @property
    def documents(self) -> int:
        """Encoded so far, in both splits."""
        return self.train.documents + self.validation.documents


@dataclass(frozen=True)
class Header:
    """What the journal's first line holds."""

    request: Request
    """The sources and options: a journal of another request cannot be continued."""
    threshold: Count
    """See `encode.SplitRule`."""


class Journal:
    """The journal of a folder, locked: a second process is refused.

    `header` is None when there is nothing to continue; `begin` then writes it.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        # unbuffered: what cannot be written now (a full disk) is not tried again by close()
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
        """Start over: whatever was noted is forgotten."""
        self._file.truncate(0)
        self.header, self.state = header, PassState()
        self._append(asdict(header))
        sync(self._out)

    def note(self) -> None:
        """Note `state`; the shards it speaks of must be synced."""
        self._append(asdict(self.state))

    def close(self) -> None:
        """Unlock; the file stays, to be continued."""
        self._file.close()

    def forget(self) -> None:
        """What was noted no longer counts; who finds the journal empty starts over."""
        self._file.truncate(0)

    def remove(self) -> None:
        """The work is done, or given up."""
        (self._out / JOURNAL_NAME).unlink()
        self.close()

    def _append(self, line: object) -> None:
        data = json.dumps(line).encode() + b"\n"
        if self._file.write(data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(self._file.fileno())

    def _read(self) -> tuple[Header | None, PassState]:
        """The first and the last whole line; a kill may have cut the last one short, so it is removed."""
        self._file.seek(0)
        lines = self._file.read().split(b"\n")
        whole, torn = lines[:-1], lines[-1]
        try:
            if not whole:
                self._check_unstarted(torn)
            header = TypeAdapter(Header).validate_json(whole[0]) if whole else None
            state = TypeAdapter(PassState).validate_json(whole[-1]) if len(whole) > 1 else PassState()
            for shard in (*state.train.shards, *state.validation.shards):
                inside(self._out, shard.file)
        except (ValidationError, UserError):
            self._file.close()
            raise UserError(
                f"{self._out / JOURNAL_NAME}: damaged; delete {self._out} and prepare again, "
                "or choose another --out if `relora prepare` did not write it"
            ) from None
        if torn:
            self._file.truncate(sum(len(line) + 1 for line in whole))
        return header, state

    def _check_unstarted(self, torn: bytes) -> None:
        """`UserError` if a journal without a whole line is not the rest of a kill but somebody else's file."""
        strangers = {path.name for path in self._out.iterdir()} - {JOURNAL_NAME, *SPLITS}
        start = HEADER_START[: len(torn)]
        if strangers or torn[: len(start)] != start:
            raise UserError("not a journal")


class SplitWriter:
    """Appends tokens to one split's shards, from where `state` says; keeps `state` up to date."""

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
        """One chunk's share of this split."""
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
        """Everything appended survives a power cut."""
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
