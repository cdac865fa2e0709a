"""What the data tests share: a prepared folder made of given tokens, and a small tokenizer."""

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from relora.data.pretraining.shards import (
    FORMAT_VERSION,
    Index,
    PreparedFolder,
    Shard,
    TokenDtype,
    token_dtype,
    write_index,
)
from relora.data.tokenizer import save_tokenizer, train_tokenizer

WriteFolder = Callable[..., PreparedFolder]


def _write_folder(
    folder: Path,
    tokens: Sequence[int],
    *,
    vocab_size: int = 1 << 20,
    fingerprint: str = "f",
    dtype: TokenDtype = "uint32",
    shard_tokens: int = 50,
) -> PreparedFolder:
    folder.mkdir(parents=True, exist_ok=True)
    ids = np.array(tokens, dtype=token_dtype(dtype))
    shards = []
    for number, start in enumerate(range(0, len(ids), shard_tokens)):
        data = ids[start : start + shard_tokens].tobytes()
        shards.append(Shard(f"shard-{number:05d}.bin", len(ids[start : start + shard_tokens]), zlib.crc32(data)))
        (folder / shards[-1].file).write_bytes(data)
    index = Index(
        format_version=FORMAT_VERSION,
        tokens=len(ids),
        documents=1,
        text_bytes=4 * len(ids),
        skipped_records=0,
        dtype=dtype,
        vocab_size=vocab_size,
        eos_token_id=0,
        tokenizer_fingerprint=fingerprint,
        shards=tuple(shards),
        sources=(),
        options={},
    )
    write_index(folder, index)
    return PreparedFolder.open(folder)


@pytest.fixture(scope="session")
def write_folder() -> WriteFolder:
    """`write_folder(path, tokens, ...)`: those tokens as a prepared folder, in several shards."""
    return _write_folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer of 300 ids."""
    folder = tmp_path_factory.mktemp("tokenizers") / "small"
    save_tokenizer(train_tokenizer(["the cat sat on the mat, and the dog sat on the log\n"] * 4, 300), folder)
    return folder
