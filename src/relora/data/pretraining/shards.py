"""Prepared folders: files of token ids (shards) and an index, which is all that training needs to know of its data.

    FOLDER/index.json         counts, dtype, vocabulary, tokenizer fingerprint, shards, sources, options
    FOLDER/shard-00000.bin    token ids, little-endian uint16 or uint32; every document ends in EOS
    FOLDER/tokenizer/         a copy of the tokenizer

The shards together are one long stream of tokens, and the borders between them have no meaning. The index is written
last, so a folder without an index is unfinished. Shards are memory-mapped, so a corpus may be larger than main memory.
"""

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, TypeAdapter, ValidationError

from relora.errors import UserError
from relora.files.atomic import write_json
from relora.files.untrusted import INDEX_BYTES, inside, regular_file
from relora.messages import LONGEST_PATH, first_mistake, short_name, short_repr

FORMAT_VERSION = 1
INDEX_NAME = "index.json"
TOKENIZER_NAME = "tokenizer"
PREPARE_AGAIN = "delete the folder and run `relora prepare` again"

TokenDtype = Literal["uint16", "uint32"]
Options = Mapping[str, str | int | float | bool | None]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]


@dataclass(frozen=True)
class Shard:
    """One file of token ids, as the index describes it."""

    file: str
    tokens: Positive
    crc32: Annotated[int, Field(ge=0, lt=2**32)]


@dataclass(frozen=True)
class Source:
    """One source as the user named it, and a fingerprint that tells whether it has changed."""

    source: str
    files: Count
    bytes: Count | None
    """Bytes on disk; None for a dataset that is streamed from the hub."""
    fingerprint: str
    """Hash over the names, sizes and modification times of the files; over the commit of a streamed dataset."""


@dataclass(frozen=True)
class Index:
    """Content of `index.json`."""

    format_version: int
    tokens: Positive
    documents: Positive
    text_bytes: Positive
    """Bytes of the documents as UTF-8, without the EOS tokens."""
    skipped_records: Count
    """Bad records that `skip_bad` left out of the whole corpus, both splits together."""
    dtype: TokenDtype
    vocab_size: Annotated[int, Field(gt=0, le=2**32)]
    eos_token_id: Count
    tokenizer_fingerprint: str
    shards: tuple[Shard, ...]
    sources: tuple[Source, ...]
    options: Options
    skipped_reasons: Mapping[str, Count] = field(default_factory=dict)
    """Number of the bad records for each reason; empty if an earlier version wrote the index."""
    separators: Count = 0
    """Separators that part the documents of plain text files, in both splits together."""
    separators_in_text: Count = 0
    """Separators inside a text, which are trained as text, in both splits together."""
    within_documents: bool = False
    """Whether parts of documents are held out, because there are too few documents."""


class PreparedFolder:
    """One finished split, memory-mapped; `open` checks and opens it."""

    def __init__(self, path: Path, index: Index) -> None:
        self.path = path
        self.index = index
        dtype = token_dtype(index.dtype)
        self._shards = [np.memmap(path / shard.file, dtype=dtype, mode="r") for shard in index.shards]
        self._ends = np.cumsum([shard.tokens for shard in index.shards])

    @classmethod
    def open(cls, path: str | Path) -> "PreparedFolder":
        """Open the folder `path` and check its index and the sizes of its shards.

        Raises:
            UserError: a file is missing or has another size, or the index contradicts itself.
        """
        path = Path(path)
        index = read_index(path)
        itemsize = token_dtype(index.dtype).itemsize
        for shard in index.shards:
            try:
                file = inside(path, shard.file)
                size, expected = regular_file(file).stat().st_size, shard.tokens * itemsize
            except OSError as error:
                name = short_name(str(path / shard.file), LONGEST_PATH)
                raise UserError(f"{name}: {error.strerror}; {PREPARE_AGAIN}") from None
            if size != expected:
                raise UserError(f"{file}: {size} bytes, the index says {expected}; {PREPARE_AGAIN}")
        if sum(shard.tokens for shard in index.shards) != index.tokens:
            raise UserError(f"{path / INDEX_NAME}: `shards` and `tokens` disagree; {PREPARE_AGAIN}")
        if index.eos_token_id >= index.vocab_size:
            raise UserError(f"{path / INDEX_NAME}: `eos_token_id` is not below `vocab_size`; {PREPARE_AGAIN}")
        return cls(path, index)

    @property
    def tokens(self) -> int:
        """Number of tokens in the stream."""
        return self.index.tokens

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary: every id is smaller."""
        return self.index.vocab_size

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the tokenizer: where it is equal, equal texts have equal ids."""
        return self.index.tokenizer_fingerprint

    @property
    def content(self) -> str:
        """A fingerprint of the tokens: equal for copies of a folder, whatever their paths are."""
        shards = [(shard.tokens, shard.crc32) for shard in self.index.shards]
        identity = json.dumps([self.index.dtype, self.fingerprint, self.index.eos_token_id, shards])
        return hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token, EOS tokens included: (loss in nats) / ln 2 / this are the bits per byte."""
        return self.index.text_bytes / self.index.tokens

    @property
    def tokenizer_path(self) -> Path:
        """The folder of the tokenizer, which `transformers.AutoTokenizer` can open."""
        return self.path / TOKENIZER_NAME

    def verify(self) -> None:
        """Read all shards and compare them with the checksums and the vocabulary of the index.

        Raises:
            UserError: the first difference, or the tokenizer's folder is missing.
        """
        if not self.tokenizer_path.is_dir():
            raise UserError(f"{self.tokenizer_path}: No such folder; {PREPARE_AGAIN}")
        for shard, tokens in zip(self.index.shards, self._shards, strict=True):
            crc, largest = 0, 0
            for start in range(0, len(tokens), 1 << 22):
                piece = tokens[start : start + (1 << 22)]
                crc, largest = zlib.crc32(piece.data, crc), max(largest, int(piece.max()))
            if crc != shard.crc32:
                raise UserError(f"{self.path / shard.file}: damaged (its checksum is not the index's); {PREPARE_AGAIN}")
            if largest >= self.vocab_size:
                raise UserError(
                    f"{self.path / shard.file}: holds id {largest}, the vocabulary ends at {self.vocab_size - 1}; "
                    f"{PREPARE_AGAIN}"
                )

    def window(self, start: int, length: int) -> npt.NDArray[np.int64]:
        """Return a copy of the ids at `start` to `start + length` of the stream, across shard borders, [length].

        Raises:
            UserError: an id is outside the vocabulary, which happens only in a damaged shard.
            IndexError: the window is not inside the stream.
        """
        if not 0 <= start <= start + length <= self.tokens:
            raise IndexError(f"window {start}+{length} of {self.tokens} tokens")
        ids = np.empty(length, dtype=np.int64)
        filled = 0
        number = int(np.searchsorted(self._ends, start, side="right"))
        while filled < length:
            shard = self._shards[number]
            offset = start + filled - (int(self._ends[number]) - len(shard))
            piece = shard[offset : offset + length - filled]
            ids[filled : filled + len(piece)] = piece
            filled += len(piece)
            number += 1
        if length and int(ids.max()) >= self.vocab_size:
            at = int(np.argmax(ids >= self.vocab_size))
            raise UserError(
                f"{self.path}: token {start + at} has id {ids[at]}, the vocabulary ends at {self.vocab_size - 1}; "
                f"the folder is damaged, {PREPARE_AGAIN}"
            )
        return ids


def token_dtype(name: TokenDtype) -> np.dtype[Any]:
    """Return the dtype of the ids in a shard, little-endian on every machine."""
    return np.dtype(name).newbyteorder("<")


def read_index(folder: Path) -> Index:
    """Read and check `folder/index.json`; raise `UserError` if there is none, or none of this format."""
    file = folder / INDEX_NAME
    try:
        text = regular_file(file, INDEX_BYTES).read_text(encoding="utf-8")
        version = json.loads(text)["format_version"]
    except OSError:
        raise UserError(_why_no_index(folder)) from None
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UserError(f"{file}: not an index written by `relora prepare`") from None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{file}: format version {short_repr(version)}, this release reads {FORMAT_VERSION}; {PREPARE_AGAIN}"
        )
    try:
        return TypeAdapter(Index).validate_json(text)
    except ValidationError as error:
        raise UserError(f"{file}: {first_mistake(error)}; {PREPARE_AGAIN}") from None


def write_index(folder: Path, index: Index) -> None:
    """Write `folder/index.json` durably and in one step: after a crash it exists completely or not at all."""
    write_json(folder / INDEX_NAME, asdict(index), ensure_ascii=False)


def _why_no_index(folder: Path) -> str:
    """Return the message for a folder without a readable index, which distinguishes the most frequent reasons."""
    if not folder.is_dir():
        return f"{folder}: no such folder; write it with `relora prepare`"
    if (folder / "train" / INDEX_NAME).exists():
        return f"{folder}: holds splits; give {folder / 'train'} or {folder / 'validation'}"
    if any(folder.glob("shard-*.bin")):
        return f"{folder}: not finished; run the same `relora prepare` command again to continue it"
    return f"{folder}: no {INDEX_NAME} in it, so `relora prepare` did not write it"
