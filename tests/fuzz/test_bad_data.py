"""Data that cannot be trained on: refused before the first step, or at the exact record, in one line with status 2.

Prepared folders go through `relora pretrain` as a person starts it, sources through `relora prepare`; nothing is
written but what was there.
"""

import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from tests.faults.tiny import DATA, Ended, contents, relora
from tests.golden.make import settings

Change = Callable[[Path], object]
"""Does something to `prepared/train`."""


def _index(**keys: Any) -> Change:
    def change(folder: Path) -> None:
        tree = json.loads((folder / "index.json").read_bytes())
        (folder / "index.json").write_text(json.dumps(tree | keys))

    return change


def _shard(**keys: Any) -> Change:
    def change(folder: Path) -> None:
        tree = json.loads((folder / "index.json").read_bytes())
        tree["shards"][0] |= keys
        (folder / "index.json").write_text(json.dumps(tree))

    return change


def _bytes(change: Callable[[bytes], bytes], name: str = "shard-00000.bin") -> Change:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def _id(number: int) -> Change:
    """An id that the vocabulary has not, under a checksum that is right."""

    def change(folder: Path) -> None:
        _bytes(lambda data: data[:-2] + number.to_bytes(2, "little"))(folder)
        _shard(crc32=zlib.crc32((folder / "shard-00000.bin").read_bytes()))(folder)

    return change


def _removed(name: str) -> Change:
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def _short(tokens: int) -> Change:
    """Cut to so many tokens, with an index that says so."""

    def change(folder: Path) -> None:
        _bytes(lambda data: data[: 2 * tokens])(folder)
        _shard(tokens=tokens, crc32=zlib.crc32((folder / "shard-00000.bin").read_bytes()))(folder)
        _index(tokens=tokens)(folder)

    return change


FOLDERS: dict[str, tuple[Change, str]] = {
    "a shard cut short": (_bytes(lambda data: data[:-2]), "shard-00000.bin"),
    "a shard with an odd number of bytes": (_bytes(lambda data: data[:-1]), "shard-00000.bin"),
    "a shard too long": (_bytes(lambda data: data + b"\1\0"), "shard-00000.bin"),
    "an empty shard": (_bytes(lambda data: b""), "shard-00000.bin"),
    "a shard that is gone": (_removed("shard-00000.bin"), "shard-00000.bin"),
    "one bit of a shard": (_bytes(lambda data: bytes([data[0] ^ 1]) + data[1:]), "shard-00000.bin"),
    "tokens in another order": (_bytes(lambda data: data[500:] + data[:500]), "shard-00000.bin"),
    "an id that the vocabulary has not": (_id(512), "512"),
    "the largest id": (_id(65535), "65535"),
    "floats in place of ids": (_bytes(lambda data: b"\0\0\xc0\x7f" * (len(data) // 4)), "shard-00000.bin"),
    "a wrong checksum": (_shard(crc32=1), "shard-00000.bin"),
    "the other width": (_index(dtype="uint32"), "shard-00000.bin"),
    "no such width": (_index(dtype="float32"), "`dtype`"),
    "another format": (_index(format_version=99), "99"),
    "no tokens": (_index(tokens=0), "`tokens`"),
    "a negative count": (_index(documents=-1), "`documents`"),
    "more tokens than there are": (_index(tokens=10**9), "disagree"),
    "no text": (_index(text_bytes=0), "`text_bytes`"),
    "an EOS beyond the vocabulary": (_index(eos_token_id=512), "`eos_token_id`"),
    "no shards": (_index(shards=[]), "index.json"),
    "a shard elsewhere": (_shard(file="../validation/shard-00000.bin"), "../validation"),
    "a shard that is the index": (_shard(file="index.json"), "index.json"),
    "another tokenizer": (_index(tokenizer_fingerprint="x"), "another tokenizer"),
    "an index that is no JSON": (_bytes(lambda data: data[:-9], "index.json"), "index.json"),
    "an empty index": (_bytes(lambda data: b"", "index.json"), "index.json"),
    "an index of nothing": (_bytes(lambda data: b"{}", "index.json"), "index.json"),
    "no index": (_removed("index.json"), "not finished"),
    "shorter than a window": (_short(16), "data.sequence_length"),
    "shorter than a batch": (_short(40), "batch.sequences"),
}
"""What was done to the training folder, and what the line must say."""


@pytest.mark.parametrize("name", FOLDERS)
def test_a_prepared_folder_that_cannot_be_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(DATA, "prepared")
    tree = settings("run")
    tree["data"] = {"train": "prepared/train", "validation": "prepared/validation", "sequence_length": 16}
    Path("c.yaml").write_text(yaml.safe_dump(tree))
    change, word = FOLDERS[name]
    change(Path("prepared/train"))
    before = contents(tmp_path)
    _refused(relora("pretrain", "c.yaml", "--quiet"), "prepared/train", word)
    assert contents(tmp_path) == before


def test_a_validation_folder_without_its_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(DATA, "prepared")
    shutil.rmtree("prepared/validation/tokenizer")
    tree = settings("run")
    tree["data"] = {"train": "prepared/train", "validation": "prepared/validation", "sequence_length": 16}
    Path("c.yaml").write_text(yaml.safe_dump(tree))
    _refused(relora("pretrain", "c.yaml", "--quiet"), "prepared/validation/tokenizer")


GOOD = b'{"text": "a page of words"}\n' * 4


def _parquet(column: Any) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), sink)
    return bytes(sink.getvalue())


TABLE = _parquet(["some text"] * 9)
SOURCES: dict[str, tuple[str, bytes, str]] = {
    "nothing": ("a.txt", b"", "holds no text"),
    "not UTF-8": ("a.txt", b"caf\xe9 au lait", "not UTF-8"),
    "UTF-16": ("a.txt", "some text".encode("utf-16"), "not UTF-8"),
    "one line not UTF-8": ("a.jsonl", GOOD + b'{"text": "caf\xe9"}\n' + GOOD, "line 5"),
    "half of a surrogate pair": ("a.jsonl", GOOD + b'{"text": "\\ud800"}\n', "line 5"),
    "a torn line": ("a.jsonl", GOOD + b'{"text": "torn', "line 5"),
    "a number for text": ("a.jsonl", GOOD + b'{"text": 3}\n', "line 5"),
    "mixed records": ("a.jsonl", GOOD + b"[1]\n", "line 5"),
    "very deep": ("a.jsonl", GOOD + b"[" * 100_000, "line 5"),
    "a very long number": ("a.jsonl", GOOD + b'{"text": ' + b"9" * 5000 + b"}", "line 5"),
    "lines that end in CR": ("a.jsonl", GOOD.replace(b"\n", b"\r"), "line 1"),
    "wrong magic, gzip": ("a.txt.gz", b"no gzip at all", "cannot be read"),
    "wrong magic, zstd": ("a.txt.zst", b"no zstd at all", "cannot be read"),
    "wrong magic, parquet": ("a.parquet", b"no parquet at all", "cannot be read"),
    "a table cut short": ("a.parquet", TABLE[:-20], "cannot be read"),
    "a column of numbers": ("a.parquet", _parquet([1.0, float("nan")]), "not text but double"),
    "a row without text": ("a.parquet", _parquet(["text", None]), "row 2"),
    "a row that is not UTF-8": ("a.parquet", _parquet(pyarrow.array([b"a", b"\xff"]).view(pyarrow.string())), "row 2"),
}
"""The file's name, its content, and what the line must say."""


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_that_cannot_be_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    file, content, word = SOURCES[name]
    Path(file).write_bytes(content)
    tokenizer = DATA / "train" / "tokenizer"
    _refused(relora("prepare", file, "--out", "out", "--tokenizer", tokenizer, "--validation", "0"), file, word)
    assert contents(tmp_path) == {file: content}


def test_there_are_enough_cases() -> None:
    assert len(FOLDERS) + len(SOURCES) >= 30


def test_a_source_that_changed_since_the_last_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_bytes(GOOD)
    arguments = ("prepare", "a.jsonl", "--out", "out", "--tokenizer", DATA / "train" / "tokenizer", "--validation", "0")
    assert relora(*arguments).status == 0
    Path("a.jsonl").write_bytes(GOOD * 2)
    before = contents(tmp_path)
    _refused(relora(*arguments), "out", "a.jsonl has changed since")
    assert contents(tmp_path) == before


def test_a_folder_may_hold_its_own_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is being written is no part of the source, so an interrupted preparation can be continued."""
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_bytes(GOOD)
    arguments = ("prepare", ".", "--out", "out", "--tokenizer", DATA / "train" / "tokenizer", "--validation", "0")
    Path("out").mkdir()
    Path("out/b.jsonl").write_bytes(GOOD)
    _refused(relora(*arguments), "out", "something else")
    Path("out/b.jsonl").unlink()
    assert relora(*arguments).status == 0
    Path("out/b.jsonl").write_bytes(GOOD)
    assert "nothing changed" in relora(*arguments).out


@pytest.mark.parametrize("content", [b"", b"mine", b"mine\n", b'{"mine": 1}\n{"mine": 2}', b'{"request": 1}\n'])
def test_a_journal_of_somebody_elses_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_bytes(GOOD)
    Path("out").mkdir()
    Path("out/journal.jsonl").write_bytes(content)
    Path("out/notes.md").write_bytes(b"mine")
    before = contents(tmp_path)
    arguments = ("prepare", "a.jsonl", "--out", "out", "--tokenizer", DATA / "train" / "tokenizer", "--validation", "0")
    _refused(relora(*arguments), "out")
    assert contents(tmp_path) == before


def test_a_pipe_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("a.txt")
    _refused(relora("prepare", "a.txt", "--out", "out", "--train-tokenizer", 300), "a.txt", "not a regular file")


def _refused(ended: Ended, *words: str) -> None:
    assert ended.complaint(2, *words) is None, ended.complaint(2, *words)
    assert len(ended.err) <= 300 and not ended.out, ended
