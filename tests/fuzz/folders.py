"""Prepared folders and safetensors files, damaged or made up."""

import json
import os
import shutil
import zlib
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from tests.faults.lies import write_manifest
from tests.fuzz.bench import LONGEST_LINE, Bench
from tests.fuzz.commands import ODD_VALUES

from relora.data.pretraining.batches import HeldOut, TrainBatches
from relora.data.pretraining.shards import PreparedFolder
from relora.data.tokenizer import load_tokenizer
from relora.errors import UserError
from relora.model.load import open_model
from relora.train.checkpoint import Checkpoints

INDEX_KEYS = (
    *("format_version", "tokens", "documents", "text_bytes", "skipped_records", "dtype", "vocab_size", "eos_token_id"),
    *("tokenizer_fingerprint", "shards", "sources", "options", "shards.0.file", "shards.0.tokens", "shards.0.crc32"),
    *("sources.0.source", "sources.0.bytes", "options.seed", "shards.0", "shards.1", "x"),
)
ODD_FILES = (
    "../train/shard-00000.bin",
    "/etc/passwd",
    "",
    ".",
    "..",
    "tokenizer",
    "a\0b",
    "x" * 300,
    "index.json",
    "\n",
)

Damage = tuple[str, Any, Any]
"""What to do, where, with which value."""


def refused(act: Callable[[], object], longest: int = LONGEST_LINE) -> str | None:
    """None if `act` succeeds or raises a `UserError` of one short line; anything else comes out."""
    try:
        act()
    except UserError as error:
        line = str(error).replace(str(Path.cwd()), "")
        if "\n" in line or len(line) > longest:
            return f"not one short line: {line[:400]!r}"
    return None


def prepared_damage() -> SearchStrategy[list[Damage]]:
    """What to do to the index, the shards and the tokenizer of a prepared folder."""
    change = st.one_of(
        st.tuples(st.just("set"), st.sampled_from(INDEX_KEYS), ODD_VALUES | st.sampled_from(ODD_FILES)),
        st.tuples(st.just("set"), st.sampled_from(INDEX_KEYS), st.integers(-3, 700)),
        st.tuples(st.just("delete"), st.sampled_from(INDEX_KEYS), st.none()),
        st.tuples(st.just("index"), st.none(), st.binary(max_size=40) | st.sampled_from(
            [b"", b"null", b"[]", b"{}", b"[" * 10**5, b"9" * 5000, b"\xff\xfe{\0}\0", b'{"format_version": 1}'])),
        st.tuples(st.just("flip"), st.sampled_from(["index.json", "shard-00000.bin"]), st.integers(0, 10**6)),
        st.tuples(st.just("resize"), st.sampled_from(["index.json", "shard-00000.bin"]), st.integers(-50, 50)),
        st.tuples(st.just("ids"), st.sampled_from([511, 512, 65535]), st.integers(0, 2000)),
        st.tuples(st.just("permute"), st.none(), st.integers(1, 2000)),
        st.tuples(
            st.sampled_from(["remove", "folder", "pipe", "empty", "loop"]),
            st.sampled_from(["index.json", "shard-00000.bin", "tokenizer", "tokenizer/tokenizer.json",
                             "tokenizer/tokenizer_config.json"]),
            st.none(),
        ),
    )  # fmt: skip
    return st.lists(change, min_size=1, max_size=2)


def judge_prepared(damages: list[Damage], bench: Bench) -> str | None:
    """Opened, verified, its tokenizer loaded and all its windows read: the ids that were written, or one line."""
    folder = Path("train")
    shutil.copytree(bench.data / "train", folder)
    for damage in damages:
        if (folder / "index.json").is_file() and (folder / "shard-00000.bin").is_file():
            _damage(folder, damage)
    whole = PreparedFolder.open(bench.data / "train")
    wrong = []

    def use() -> None:
        opened = PreparedFolder.open(folder)
        opened.verify()
        batches = TrainBatches([(opened, 1.0)], 16, 4, 0)
        batches.batch(0)
        for batch in HeldOut(opened, 16, 200, 4):
            assert int(batch.input_ids.min()) >= 0 and int(batch.input_ids.max()) < opened.vocab_size
        load_tokenizer(str(opened.tokenizer_path))
        same_bytes = (folder / "shard-00000.bin").read_bytes() == (bench.data / "train/shard-00000.bin").read_bytes()
        if opened.index.dtype == whole.index.dtype and not same_bytes and not any(d[0] == "ids" for d in damages):
            wrong.append("other tokens went unnoticed")

    return refused(use) or next(iter(wrong), None)


def _damage(folder: Path, damage: Damage) -> None:
    action, where, value = damage
    index, shard = folder / "index.json", folder / "shard-00000.bin"
    match action:
        case "set" | "delete":
            try:
                tree = json.loads(index.read_bytes())
                _set(tree, where.split("."), value, delete=action == "delete")
                index.write_text(json.dumps(tree, default=str))
            except (ValueError, KeyError, IndexError, TypeError, RecursionError):  # after an earlier damage
                pass
        case "index":
            index.write_bytes(value)
        case "flip" | "resize":
            data = bytearray((folder / where).read_bytes())
            if action == "flip" and data:
                data[value % len(data)] ^= 1 << value % 8
            else:
                data = data[:value] if value < 0 else data + bytes(value)
            (folder / where).write_bytes(data)
        case "ids":  # wrong ids under a right checksum
            data = bytearray(shard.read_bytes())
            data[2 * value : 2 * value + 2] = int(where).to_bytes(2, "little")
            shard.write_bytes(data)
            _damage(folder, ("set", "shards.0.crc32", zlib.crc32(data)))
        case "permute":
            data = bytearray(shard.read_bytes())
            shard.write_bytes(data[value:] + data[:value])
        case _:
            _replace(folder / where, action)


def _set(tree: Any, path: list[str], value: Any, *, delete: bool) -> None:
    *parents, last = [int(part) if part.isdecimal() else part for part in path]
    for part in parents:
        tree = tree[part]
    if delete:
        del tree[last]
    elif isinstance(tree, list):
        tree[last:] = [value]
    else:
        tree[last] = value


def _replace(path: Path, by: str) -> None:
    """Something else in the place of a file or a folder."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if not path.parent.is_dir():
        return
    match by:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "empty":
            path.touch()
        case "loop":
            path.symlink_to(path.name)


HEADERS: tuple[bytes, ...] = (
    *(
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff\xff",
        b"[" * 10**5,
        b'{"__metadata__": 3}',
        b'{"a": 1}',
        b'{"a": {"dtype": "F32"}}',
    ),
    b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "F32", "shape": [9223372036854775807, 9], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
    b'{"a": {"dtype": "X", "shape": [1], "data_offsets": [0, 4]}}',
    b'{"../a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
)


def safetensors_damage() -> SearchStrategy[tuple[str, list[Damage]]]:
    """Which file, and what to do to its length field, its header and its data."""
    tensor_change = st.tuples(
        st.sampled_from(["dtype", "shape", "data_offsets", "name"]),
        st.integers(0, 30),
        st.sampled_from(
            ["F64", "BF16", "I8", "BOOL", "X", [], [1], [-1], [2**62, 4], [0, 4], [4, 0], [0, 2**63], None, 1]
        ),
    )
    change = st.one_of(
        st.tuples(
            st.just("length"), st.none(), st.sampled_from([0, 1, 2**20, 2**63, 2**64 - 1]) | st.integers(0, 5000)
        ),
        st.tuples(st.just("header"), st.none(), st.sampled_from(HEADERS) | st.binary(max_size=30)),
        st.tuples(st.just("flip"), st.none(), st.integers(0, 4000)),
        st.tuples(st.just("cut"), st.none(), st.integers(0, 200_000)),
        st.tuples(st.just("extend"), st.none(), st.integers(1, 100)),
        tensor_change,
        tensor_change,
    )
    files = st.sampled_from(["model", "weights", "optimizer"])
    return st.tuples(files, st.lists(change, min_size=1, max_size=2))


def judge_safetensors(case: tuple[str, list[Damage]], bench: Bench) -> str | None:
    """A model, or a checkpoint whose manifest agrees with the file, is opened whole or refused in one line."""
    which, damages = case
    if which == "model":
        shutil.copytree(bench.run.folder / "model", "model")
        file = Path("model/model.safetensors")
        file.write_bytes(_rewritten(file.read_bytes(), damages))
        return refused(partial(open_model, "model"), 2 * LONGEST_LINE)  # the library lists all its types
    step = max(Checkpoints(bench.run.checkpoints).steps())
    shutil.copytree(bench.run.checkpoints / f"step-{step:08}", f"checkpoints/step-{step:08}")
    folder = Path(f"checkpoints/step-{step:08}")
    file = folder / f"{which}.safetensors"
    data = _rewritten(file.read_bytes(), damages)
    file.write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    digest = {"bytes": len(data), "crc32": zlib.crc32(data), "sha256": sha256(data).hexdigest()}
    manifest["files"][file.name] |= digest
    write_manifest(folder, manifest)

    def use() -> None:
        checkpoint = Checkpoints(Path("checkpoints")).open(step)
        checkpoint.weights()
        checkpoint.optimizer()

    return refused(use)


def _rewritten(data: bytes, damages: list[Damage]) -> bytes:
    for action, where, value in damages:
        size = int.from_bytes(data[:8], "little")
        header, tensors = data[8 : 8 + size], data[8 + size :]
        match action:
            case "length":
                data = value.to_bytes(8, "little") + data[8:]
            case "header":
                data = len(value).to_bytes(8, "little") + value + tensors
            case "flip":
                changed = bytearray(data)
                if changed:
                    changed[value % len(changed)] ^= 1 << value % 8
                data = bytes(changed)
            case "cut":
                data = data[: value % (len(data) + 1)]
            case "extend":
                data += bytes(value)
            case _:
                data = _other_tensor(header, action, where, value) + tensors
    return data


def _other_tensor(header: bytes, key: str, number: int, value: Any) -> bytes:
    """A header in which one tensor is described otherwise."""
    try:
        tree = json.loads(header)
        name = sorted(name for name in tree if name != "__metadata__")[number % (len(tree) or 1) - 1]
        if key == "name":
            tree[str(value)] = tree.pop(name)
        else:
            tree[name][key] = value
        header = json.dumps(tree).encode()
    except (ValueError, IndexError, TypeError, AttributeError, RecursionError):  # after an earlier damage
        pass
    return len(header).to_bytes(8, "little") + header
