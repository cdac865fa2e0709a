"""`relora prepare`: text -> a folder of tokens for training and one for validation.

    OUT/train/  OUT/validation/     two prepared folders (see `shards`)
    OUT/journal.jsonl               only while the work is unfinished (see `journal`)

Every document ends in EOS and documents follow one another without padding: decoding all of a split gives its
documents, joined by EOS, and no token is dropped. The result is the same for any number of workers, and after any
number of interruptions. Run again with nothing changed, it does nothing; with anything changed, it refuses.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from signal import SIGINT
from typing import TYPE_CHECKING, Any

import numpy as np

from relora.data import encode
from relora.data.encode import DRAWS, Chunk, Encoder, SplitRule, encode_all
from relora.data.journal import JOURNAL_NAME, Header, Journal, PassState, SplitState, SplitWriter
from relora.data.progress import PrepareProgress
from relora.data.shards import (
    FORMAT_VERSION,
    INDEX_NAME,
    TOKENIZER_NAME,
    Index,
    PreparedFolder,
    TokenDtype,
    read_index,
    sync_folder,
    write_index,
)
from relora.data.sources import Corpus
from relora.data.tokenizer import check_vocab_size, fingerprint, load_tokenizer, train_tokenizer, vocabulary_size
from relora.errors import Interrupted, RunStopped, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TRAIN, VALIDATION = "train", "validation"

TOKENIZER_CHARS = 100_000_000
"""A tokenizer is trained on about this much of the training text, from all files alike: more hardly changes it."""

JOURNAL_SECONDS = 2.0
"""A kill costs at most this much work, and the documents before it are read once more."""

Options = Mapping[str, str | int | float | bool | None]


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


def prepare(
    sources: Sequence[str],
    out: Path,
    *,
    tokenizer: str | None = None,
    new_vocab_size: int | None = None,
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
