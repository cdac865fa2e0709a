"""Encode documents as token ids of the two splits, in parallel, with the same result for any number of workers.

A text repeats its words: of the words in a megabyte of English about a sixth are different. For many tokenizers the
ids of a text are the ids of its words, one after another (`_encodes_word_by_word`); then a chunk is cut into words, and
each different word is encoded once. Words are cut, looked up and replaced by their ids as whole arrays, without
Python's lock. For other tokenizers whole texts are encoded. The ids are the same either way.

Workers are threads. numpy, Arrow and the tokenizer release Python's global lock while they work, so processes, to which
the text would have to be sent, would not be faster.

A document is held out when a keyed hash of its text is below a threshold (`sampling.SplitRule`). So the choice depends
neither on the order of the documents nor on the workers, and equal texts are always on the same side.
"""

import json
import os
import re
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, compress, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.compute
import tokenizers

from relora.data.pretraining.shards import TokenDtype, token_dtype
from relora.data.sampling import SplitRule

CHUNK_CHARS = 1024 * 1024
"""Characters of text per task: so many that the overhead of a task does not matter, so few that hundreds of chunks fit
into memory."""

PIECE_CHARS = 256 * 1024
"""A longer document is encoded in pieces of at most this many characters: the tokenizer needs 160 bytes of memory for
each byte of a text."""

CACHED_WORDS = 1 << 18
"""Words whose ids are kept for all chunks, in about 60 MB; any other word is encoded once in each chunk."""

LONGEST_CACHED_WORD = 64
"""Most characters of a word whose ids are kept."""

_WORD_SPLITTERS = {"ByteLevel": "use_regex", "Metaspace": "split"}
"""Pre-tokenizers that split a text into words before the model encodes it -> the setting that can turn this off."""

_LOCAL_NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Precompiled")
"""Normalizers that change a character by its neighbours only, and leave a space between two visible ASCII characters
as it is."""

_SPACE_NORMALIZERS = (
    {"type": "Strip", "strip_left": False, "strip_right": True},
    {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"},
)
"""T5's normalizers: they change the end of a text and runs of several spaces only."""


@dataclass(frozen=True)
class Chunk:
    """One or more consecutive documents, and how far the corpus had been read when the last of them was complete."""

    texts: list[str]
    read_bytes: int
    """Bytes of the corpus that had been read by then."""
    held_out: list[bool] | None = None
    """Whether each text is held out, where the hash of the whole text does not decide."""


@dataclass(frozen=True)
class SplitTokens:
    """The tokens that one chunk adds to one split."""

    tokens: npt.NDArray[Any]
    """Ids of all documents, each followed by EOS; [tokens]."""
    documents: int
    text_bytes: int
    """Bytes of the documents as UTF-8."""


@dataclass(frozen=True)
class Encoded:
    """The documents of a chunk, encoded and divided between the splits."""

    train: SplitTokens
    validation: SplitTokens


class Encoder:
    """Encode chunks of documents, in any number of threads.

    Every thread has a copy of the tokenizer, so that threads do not wait for the lock of its cache.

    Args:
        tokenizer_json: the fast tokenizer, serialized.
        eos_token_id: the id that ends every document.
        dtype: of the ids.
        rule: decides which documents are held out.
    """

    def __init__(self, tokenizer_json: str, eos_token_id: int, dtype: TokenDtype, rule: SplitRule) -> None:
        self._tokenizer_json = tokenizer_json
        self._eos = np.array([eos_token_id], dtype=token_dtype(dtype))
        self.rule = rule
        self._thread = threading.local()
        self._known = KnownWords.of([], [])
        self._growing = threading.Lock()
        self._word_by_word = _encodes_word_by_word(json.loads(tokenizer_json))

    @property
    def itemsize(self) -> int:
        """Bytes per token."""
        return self._eos.itemsize

    def encode(self, chunk: Chunk) -> Encoded:
        """Encode the documents of a chunk in their order, each followed by EOS.

        No special token is added by a template or recognized in a text, so an EOS always ends a document.
        """
        ids: list[list[npt.NDArray[Any]]] = [[] for _ in chunk.texts]
        for numbers, texts in _batches(chunk.texts):
            for number, piece in zip(numbers, self._encode_texts(texts), strict=True):
                ids[number].append(piece.astype(self._eos.dtype))
        is_held_out = chunk.held_out or [self.rule.is_held_out(text) for text in chunk.texts]
        return Encoded(
            train=self._split_tokens(chunk, ids, [not held_out for held_out in is_held_out]),
            validation=self._split_tokens(chunk, ids, is_held_out),
        )

    def _split_tokens(self, chunk: Chunk, ids: list[list[npt.NDArray[Any]]], chosen: list[bool]) -> SplitTokens:
        """Join the ids of the chosen documents, each followed by EOS.

        Args:
            chunk: the documents.
            ids: for each document, the ids of its pieces.
            chosen: for each document, whether it belongs to the split.
        """
        pieces = [self._eos[:0]]  # an empty array, so that there is something to join when no document is chosen
        for document_pieces in compress(ids, chosen):
            pieces += [*document_pieces, self._eos]
        text_bytes = sum(len(text.encode()) for text in compress(chunk.texts, chosen))
        return SplitTokens(np.concatenate(pieces), sum(chosen), text_bytes)

    def _encode_texts(self, texts: list[str]) -> list[npt.NDArray[np.uint32]]:
        """Return the ids of each text."""
        if not self._word_by_word:
            return [np.array(ids, dtype=np.uint32) for ids in self._ids(texts)]
        words, first_words = _words(texts)
        known = self._known
        numbers = known.numbers_of(words)
        if (numbers < 0).any():
            new = words.filter(_mask(numbers < 0)).unique()
            texts_of_new = new.to_pylist()
            more = KnownWords.of(texts_of_new, self._ids(texts_of_new))
            known = known.extended(more)
            numbers = known.numbers_of(words)
            self._keep(more)
        ids, bounds = known.ids_of(numbers)
        return [ids[start:end] for start, end in pairwise(bounds[first_words])]

    def _keep(self, more: "KnownWords") -> None:
        """Keep the ids of new words for later chunks, unless they are long ones or there are too many."""
        with self._growing:
            numbers = self._known.numbers_of(more.words)  # another thread may have met the same words
            room = CACHED_WORDS - len(self._known.words)
            chosen = (numbers < 0) & (_integers(pyarrow.compute.utf8_length(more.words)) <= LONGEST_CACHED_WORD)
            chosen &= np.cumsum(chosen) <= room
            self._known = self._known.extended(more.chosen(chosen))

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """Return the tokenizer's ids of each text."""
        return [encoding.ids for encoding in self._tokenizer().encode_batch_fast(texts, add_special_tokens=False)]

    def _tokenizer(self) -> tokenizers.Tokenizer:
        """Return the tokenizer of the current thread."""
        tokenizer: tokenizers.Tokenizer | None = getattr(self._thread, "tokenizer", None)
        if tokenizer is None:
            tokenizer = tokenizers.Tokenizer.from_str(self._tokenizer_json)
            tokenizer.no_truncation()
            tokenizer.no_padding()
            tokenizer.encode_special_tokens = True
            self._thread.tokenizer = tokenizer
        return tokenizer


@dataclass(frozen=True)
class KnownWords:
    """Different words and their ids."""

    words: pyarrow.StringArray
    ids: npt.NDArray[np.uint32]
    """Ids of all words, one after another."""
    bounds: npt.NDArray[np.int64]
    """Index of the first id of each word, followed by the number of ids; [words + 1]."""

    @classmethod
    def of(cls, words: list[str], ids: list[list[int]]) -> "KnownWords":
        """Put together words and the ids of each."""
        flat = np.fromiter(chain.from_iterable(ids), dtype=np.uint32)
        encoded = [word.encode() for word in words]
        ends = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
        return cls(_strings(b"".join(encoded), ends), flat, np.cumsum([0, *map(len, ids)], dtype=np.int64))

    def numbers_of(self, words: pyarrow.StringArray) -> npt.NDArray[np.int32]:
        """Return the number that each of `words` has among these; -1 for a word that is none of them."""
        return _integers(pyarrow.compute.index_in(words, value_set=self.words), null=-1)

    def extended(self, more: "KnownWords") -> "KnownWords":
        """Return these words and after them `more`."""
        words = pyarrow.concat_arrays([self.words, more.words])
        bounds = np.concatenate([self.bounds, self.bounds[-1] + more.bounds[1:]])
        return KnownWords(words, np.concatenate([self.ids, more.ids]), bounds)

    def chosen(self, which: npt.NDArray[np.bool_]) -> "KnownWords":
        """Return the words that are chosen, [words]."""
        ids, bounds = self.ids_of(np.flatnonzero(which))
        return KnownWords(self.words.filter(_mask(which)), ids, bounds)

    def ids_of(self, numbers: npt.NDArray[Any]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """Return the ids of the words with these numbers, one after another, and the `bounds` of each word in them."""
        begins = self.bounds[numbers]
        lengths = self.bounds[numbers + 1] - begins
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        return self.ids[np.repeat(begins - bounds[:-1], lengths) + np.arange(bounds[-1])], bounds


def _words(texts: list[str]) -> tuple[pyarrow.StringArray, npt.NDArray[np.int64]]:
    """Cut texts into words.

    A word begins with a single space between two visible ASCII characters, and nowhere else but at the start of a text.
    For a tokenizer that `_encodes_word_by_word` accepts, no token and no normalization reaches across such a space,
    whatever its normalizer does to other characters.

    Returns:
        The words of all texts, in order, and the number of the first word of each text, followed by the number of
        words; [texts + 1].
    """
    encoded = [text.encode() for text in texts]
    joined = np.frombuffer(b"".join(encoded), dtype=np.uint8)
    begins = np.cumsum([0, *map(len, encoded)])
    visible = (joined > ord(" ")) & (joined < 0x7F)
    is_cut = np.zeros(len(joined) + 1, dtype=np.bool_)
    is_cut[1:-2] = (joined[1:-1] == ord(" ")) & visible[:-2] & visible[2:]
    is_cut[begins[1:] - 1] = False  # a space at the end of a text is followed by another text's character
    is_cut[begins] = True
    cuts = np.flatnonzero(is_cut).astype(np.int32)
    return _strings(joined, cuts), np.searchsorted(cuts, begins)


# Arrow's arrays to numpy's and back by their buffers: `pyarrow.array` and `to_numpy` would load pandas.


def _strings(text: bytes | npt.NDArray[np.uint8], bounds: npt.NDArray[np.int32]) -> pyarrow.StringArray:
    """Return the strings between the bounds of a text in UTF-8."""
    return pyarrow.StringArray.from_buffers(len(bounds) - 1, pyarrow.py_buffer(bounds), pyarrow.py_buffer(text))


def _mask(which: npt.NDArray[np.bool_]) -> pyarrow.BooleanArray:
    """Return truth values as Arrow's array."""
    bits = pyarrow.py_buffer(np.packbits(which, bitorder="little"))
    return pyarrow.Array.from_buffers(pyarrow.bool_(), len(which), [None, bits])


def _integers(array: pyarrow.Int32Array, null: int = 0) -> npt.NDArray[np.int32]:
    """Return the numbers of an array, with `null` in place of its nulls."""
    is_valid, numbers = array.buffers()
    found = np.frombuffer(numbers, np.int32, len(array), 4 * array.offset)
    if not array.null_count:
        return found
    bits = np.unpackbits(np.frombuffer(is_valid, np.uint8), bitorder="little")
    return np.where(bits[array.offset : array.offset + len(array)], found, np.int32(null))


def _encodes_word_by_word(tokenizer: Mapping[str, Any]) -> bool:
    """Return whether the ids of a text are those of its `_words`, one after another, for a tokenizer given as JSON.

    This holds for byte-level tokenizers such as GPT-2's, which split at its pattern, and for SentencePiece tokenizers
    such as T5's, which split at every space; not if a normalizer or an added token depends on both sides of a space, or
    the model is random (dropout).
    """
    splitter = tokenizer["pre_tokenizer"] or {"type": None}
    normalizer = tokenizer["normalizer"] or {"type": "Sequence", "normalizers": []}
    steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    return (
        splitter["type"] in _WORD_SPLITTERS
        and splitter.get(_WORD_SPLITTERS[splitter["type"]], True)
        and all(step["type"] in _LOCAL_NORMALIZERS or step in _SPACE_NORMALIZERS for step in steps)
        and not tokenizer["model"].get("dropout")
        and not any(map(_crosses_a_space, tokenizer["added_tokens"]))
    )


def _crosses_a_space(added: Mapping[str, Any]) -> bool:
    """Return whether an added token makes the ids on one side of a space between words depend on the other side.

    It does so if it contains such a space, absorbs spaces beside it, or matches between word boundaries only. Special
    tokens cannot, because they are encoded as plain text here.

    Args:
        added: an entry of `added_tokens` in the tokenizer's JSON.
    """
    absorbs_neighbours = added["lstrip"] or added["rstrip"] or added["single_word"]
    return not added["special"] and bool(absorbs_neighbours or re.search("[!-~] [!-~]", added["content"]))


def pieces_of(text: str, most_chars: int = PIECE_CHARS) -> Iterator[str]:
    """Yield a document, or a very long one in pieces that end before a space, where tokenizers split words anyway.

    The price: a tokenizer that puts a space before every text puts one before every piece; and a piece that has no
    space in its second half is cut inside a word.
    """
    start = 0
    while len(text) - start > most_chars:
        space = text.rfind(" ", start + most_chars // 2, start + most_chars)
        end = space if space > 0 else start + most_chars
        yield text[start:end]
        start = end
    yield text[start:]


def _batches(texts: list[str]) -> Iterator[tuple[list[int], list[str]]]:
    """Yield the pieces of all texts, about `CHUNK_CHARS` characters at a time.

    Each batch is (for each piece, the number of its text; the pieces).
    """
    numbers: list[int] = []
    pieces: list[str] = []
    chars = 0
    for number, text in enumerate(texts):
        for piece in pieces_of(text):
            numbers.append(number)
            pieces.append(piece)
            chars += len(piece)
            if chars >= CHUNK_CHARS:
                yield numbers, pieces
                numbers, pieces, chars = [], [], 0
    yield numbers, pieces


def encode_all(chunks: Iterable[Chunk], encoder: Encoder, workers: int) -> Iterator[tuple[Chunk, Encoded]]:
    """Yield the chunks and their encodings in order, encoded by `workers` threads.

    At most two chunks per worker are in memory at any time. An error in a worker is raised at that chunk's turn.
    """
    with _without_tokenizer_threads(), ThreadPoolExecutor(workers) as pool:
        pending: deque[tuple[Chunk, Future[Encoded]]] = deque()
        try:
            for chunk in chunks:
                pending.append((chunk, pool.submit(encoder.encode, chunk)))
                if len(pending) == 2 * workers:
                    done, future = pending.popleft()
                    yield done, future.result()
            while pending:
                done, future = pending.popleft()
                yield done, future.result()
        finally:
            for _, future in pending:
                future.cancel()


@contextmanager
def _without_tokenizer_threads() -> Iterator[None]:
    """Keep the tokenizers library from starting threads of its own, so that `workers` is the number of threads."""
    variable = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(variable)
    os.environ[variable] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before
