"""Documents -> token ids of the two splits, many chunks at once, with the same result for any number of workers.

Workers are threads: the tokenizer gives up Python's lock while it works, and what needs the lock (turning its
result into an array) takes about a thirtieth of the time. So no process has to be started, fed or outlived,
up to some thirty cores' worth of workers.

A document belongs to validation when a keyed hash of its text falls below a threshold: the choice depends on
neither order nor workers, and the same text never lands on both sides.
"""

import hashlib
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from relora.data.shards import TokenDtype, token_dtype
from relora.draws import keyed_seed

CHUNK_CHARS = 1024 * 1024
"""Text per task: enough to make a task's costs vanish, little enough to hold hundreds."""

PIECE_CHARS = 256 * 1024
"""A longer document is encoded in pieces of this length: the tokenizer takes 160 bytes for each byte of a text."""

DRAWS = 1 << 64
"""A document's draw is an integer below this."""


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


class SplitRule:
    """Which documents are validation: those whose draw is below `threshold`."""

    def __init__(self, seed: int, threshold: int) -> None:
        self._key = keyed_seed(seed, "validation").to_bytes(8, "big")
        self.threshold = threshold

    def draw(self, text: str) -> int:
        """A uniform integer below DRAWS, a function of the text and the seed alone."""
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=self._key).digest(), "big")

    def is_validation(self, text: str) -> bool:
        """On which side a document is."""
        return self.draw(text) < self.threshold


class Encoder:
    """Encodes chunks; one copy of the tokenizer per thread, so that threads do not wait for one another's cache."""

    def __init__(self, tokenizer_json: str, eos_token_id: int, dtype: TokenDtype, rule: SplitRule) -> None:
        self._tokenizer_json = tokenizer_json
        self._eos = np.array([eos_token_id], dtype=token_dtype(dtype))
        self._rule = rule
        self._local = threading.local()

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
            encodings = self._tokenizer().encode_batch_fast(texts, add_special_tokens=False)
            for number, encoding in zip(numbers, encodings, strict=True):
                ids[number].append(np.array(encoding.ids, dtype=self._eos.dtype))
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

    def _tokenizer(self) -> tokenizers.Tokenizer:
        tokenizer: tokenizers.Tokenizer | None = getattr(self._local, "tokenizer", None)
        if tokenizer is None:
            tokenizer = tokenizers.Tokenizer.from_str(self._tokenizer_json)
            tokenizer.no_truncation()
            tokenizer.no_padding()
            tokenizer.encode_special_tokens = True
            self._local.tokenizer = tokenizer
        return tokenizer


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
