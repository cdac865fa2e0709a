"""Documents -> token ids of the two splits, many chunks at once, with the same result for any number of workers.

Text repeats its words: of those in a megabyte of English about a sixth are different. Where a tokenizer's ids of a
text are those of its words, one after another (`_reads_word_by_word`), a chunk is cut into words, and each different
one is encoded once. Where that is not certain, whole texts are encoded; the ids are the same either way.

Workers are threads: numpy, Arrow and the tokenizer give up Python's lock while they work, so no process has to be
started, fed or outlived.

A document belongs to validation when a keyed hash of its text falls below a threshold: the choice depends on
neither order nor workers, and the same text never lands on both sides.
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
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow
import tokenizers

from relora.data.pretraining.shards import TokenDtype, token_dtype
from relora.data.sampling import SplitRule

CHUNK_CHARS = 1024 * 1024
"""Text per task: enough to make a task's costs vanish, little enough to hold hundreds."""

PIECE_CHARS = 256 * 1024
"""A longer document is encoded in pieces of this length: the tokenizer takes 160 bytes for each byte of a text."""


KNOWN_WORDS = 1 << 18
"""So many words' ids are kept, in about 60 MB; later ones are encoded once in each chunk."""

LONGEST_KNOWN = 64
"""Characters of a word that is kept."""

_PARTING = {"ByteLevel": "use_regex", "Metaspace": "split"}
"""What parts texts into words before the model sees them, and the setting that can turn it off."""

_LOCAL_NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Precompiled")
"""They change characters by what stands beside them, and leave a space between two visible ASCII ones alone."""

_SPACE_NORMALIZERS = (
    {"type": "Strip", "strip_left": False, "strip_right": True},
    {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"},
)
"""T5's: they act on the end of a text and on spaces that stand together."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive documents, and how far the corpus was read when they were complete."""

    texts: list[str]
    read_bytes: int


@dataclass(frozen=True)
class SplitTokens:
    """What one chunk adds to one split."""

    tokens: npt.NDArray[Any]
    documents: int
    text_bytes: int


@dataclass(frozen=True)
class Encoded:
    """A chunk's documents, encoded and split."""

    train: SplitTokens
    validation: SplitTokens
    lowest_draw: int


class Encoder:
    """Encodes chunks; one copy of the tokenizer per thread, so that threads do not wait for one another's cache."""

    def __init__(self, tokenizer_json: str, eos_token_id: int, dtype: TokenDtype, rule: SplitRule) -> None:
        self._tokenizer_json = tokenizer_json
        self._eos = np.array([eos_token_id], dtype=token_dtype(dtype))
        self._rule = rule
        self._local = threading.local()
        self._known: dict[str, npt.NDArray[np.uint32]] = {}
        self._word_by_word = _reads_word_by_word(json.loads(tokenizer_json))

    @property
    def itemsize(self) -> int:
        """Bytes per token."""
        return self._eos.itemsize

    def encode(self, chunk: Chunk) -> Encoded:
        """Each document's ids and an EOS, in order."""
        draws = [self._rule.draw(text) for text in chunk.texts]
        # no special tokens: neither added by a template, nor read out of the text, so that EOS means an end
        ids: list[list[npt.NDArray[Any]]] = [[] for _ in chunk.texts]
        for numbers, texts in _batches(chunk.texts):
            for number, piece in zip(numbers, self._encode_texts(texts), strict=True):
                ids[number].append(piece.astype(self._eos.dtype))
        sides: dict[bool, list[npt.NDArray[Any]]] = {False: [self._eos[:0]], True: [self._eos[:0]]}
        text_bytes = {False: 0, True: 0}
        documents = {False: 0, True: 0}
        for text, draw, pieces in zip(chunk.texts, draws, ids, strict=True):
            side = draw < self._rule.threshold
            sides[side] += [*pieces, self._eos]
            documents[side] += 1
            text_bytes[side] += len(text.encode())
        train, validation = (
            SplitTokens(np.concatenate(sides[side]), documents[side], text_bytes[side]) for side in (False, True)
        )
        return Encoded(train, validation, min(draws))

    def _encode_texts(self, texts: list[str]) -> list[npt.NDArray[np.uint32]]:
        """The ids of each text."""
        if not self._word_by_word:
            return [np.array(ids, dtype=np.uint32) for ids in self._ids(texts)]
        words, first_words = _words(texts)
        repeated = words.dictionary_encode()
        ids = pyarrow.array(self._word_ids(repeated.dictionary.to_pylist()), pyarrow.list_(pyarrow.uint32()))
        tokens = ids.take(repeated.indices)
        flat, bounds = tokens.values.to_numpy(), tokens.offsets.to_numpy()[first_words]
        return [flat[start:end] for start, end in pairwise(bounds)]

    def _word_ids(self, words: list[str]) -> list[npt.NDArray[np.uint32]]:
        """The ids of different words, each encoded when it is first met."""
        found = {word: self._known[word] for word in words if word in self._known}
        new = [word for word in words if word not in found]
        for word, ids in zip(new, self._ids(new), strict=True):
            found[word] = np.array(ids, dtype=np.uint32)
            if len(self._known) < KNOWN_WORDS and len(word) <= LONGEST_KNOWN:
                self._known[word] = found[word]
        return [found[word] for word in words]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer().encode_batch_fast(texts, add_special_tokens=False)]

    def _tokenizer(self) -> tokenizers.Tokenizer:
        tokenizer: tokenizers.Tokenizer | None = getattr(self._local, "tokenizer", None)
        if tokenizer is None:
            tokenizer = tokenizers.Tokenizer.from_str(self._tokenizer_json)
            tokenizer.no_truncation()
            tokenizer.no_padding()
            tokenizer.encode_special_tokens = True
            self._local.tokenizer = tokenizer
        return tokenizer


def _words(texts: list[str]) -> tuple[pyarrow.StringArray, npt.NDArray[np.int64]]:
    """The words of all texts in order, and the number of each text's first one, then of the end.

    A word ends before a single space that stands between two visible ASCII characters, and nowhere else: there no
    tokenizer that `_reads_word_by_word` accepts looks past the space, whatever its normalizer does to other characters.
    """
    encoded = [text.encode() for text in texts]
    joined = np.frombuffer(b"".join(encoded), dtype=np.uint8)
    begins = np.cumsum([0, *map(len, encoded)])
    visible = (joined > ord(" ")) & (joined < 0x7F)
    is_cut = np.zeros(len(joined) + 1, dtype=np.bool_)
    is_cut[1:-2] = (joined[1:-1] == ord(" ")) & visible[:-2] & visible[2:]
    is_cut[begins[1:] - 1] = False  # a text's last character is not beside the next text's first
    is_cut[begins] = True
    cuts = np.flatnonzero(is_cut).astype(np.int32)
    words = pyarrow.StringArray.from_buffers(len(cuts) - 1, pyarrow.py_buffer(cuts), pyarrow.py_buffer(joined))
    return words, np.searchsorted(cuts, begins)


def _reads_word_by_word(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a tokenizer (its JSON) gives a text the ids of its `_words`, one after another.

    So do GPT-2's kind (byte-level, parted by its pattern) and SentencePiece's as T5 has it (parted at every space),
    unless a normalizer, an added token or a chance in the model looks across a space.
    """
    parting = tokenizer["pre_tokenizer"] or {"type": None}
    normalizer = tokenizer["normalizer"] or {"type": "Sequence", "normalizers": []}
    steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    return (
        parting["type"] in _PARTING
        and parting.get(_PARTING[parting["type"]], True)
        and all(step["type"] in _LOCAL_NORMALIZERS or step in _SPACE_NORMALIZERS for step in steps)
        and not tokenizer["model"].get("dropout")
        and not any(map(_crosses_a_space, tokenizer["added_tokens"]))
    )


def _crosses_a_space(added: Mapping[str, Any]) -> bool:
    """Whether an added token can hold or take a space between words; special ones are read as plain text."""
    takes_more = added["lstrip"] or added["rstrip"] or added["single_word"]
    return not added["special"] and bool(takes_more or re.search("[!-~] [!-~]", added["content"]))


def pieces_of(text: str, most_chars: int = PIECE_CHARS) -> Iterator[str]:
    """A document as it is, or a very long one in pieces that end before a space, where tokenizers part words anyway.

    The price: a tokenizer that puts a space before every text puts one before every piece; and a piece without any
    space in its second half is cut in a word.
    """
    start = 0
    while len(text) - start > most_chars:
        space = text.rfind(" ", start + most_chars // 2, start + most_chars)
        end = space if space > 0 else start + most_chars
        yield text[start:end]
        start = end
    yield text[start:]


def _batches(texts: list[str]) -> Iterator[tuple[list[int], list[str]]]:
    """The pieces of all texts, and the number of the text that each is of, about CHUNK_CHARS at a time."""
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
    """The chunks and their encodings in order; at most two chunks per worker are held at any time."""
    with _one_thread_a_batch(), ThreadPoolExecutor(workers) as pool:
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
def _one_thread_a_batch() -> Iterator[None]:
    """Keep the tokenizer from starting threads of its own: `workers` says how many there are."""
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
