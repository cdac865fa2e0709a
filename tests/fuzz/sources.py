"""Text in every state: JSON lines, plain text, tables, compressed, cut short, under odd names."""

import gzip
import json
import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from tests.faults.tiny import Ended, contents, relora
from tests.fuzz.bench import Bench, complaint_of

from relora.data.pretraining.shards import PreparedFolder

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.sampled_from(
    [
        "\0",
        "\0" * 99,
        "\ufeff",
        "\u2028",
        "<|endoftext|>",
        " ",
        "\n",
        "\r",
        "\x85",
        "a\r\nb",
        "'s  t ",
        "\U0010ffff",
        "x" * 5000,
    ]
)


class Line(NamedTuple):
    """A line of JSON, and its text: None if it is passed over, ... if it cannot be used."""

    data: bytes
    text: Any


def _good(text: str, ascii_only: bool, others: dict[str, Any]) -> Line:
    return Line(json.dumps({**others, "text": text}, ensure_ascii=ascii_only).encode(), text or None)


OTHER_FIELDS = st.dictionaries(st.text("a\x85\u2028", max_size=3), st.integers(), max_size=2)
LINES = st.one_of(
    st.builds(_good, TEXTS, st.booleans(), OTHER_FIELDS),
    st.sampled_from([Line(b"", None), Line(b" \t", None), Line(b"\r", None), Line(b'{"text": ""}', None)]),
)
BAD_LINES = st.sampled_from(
    [
        *(
            b"{",
            b"[1]",
            b'{"text": 5}',
            b'{"text": null}',
            b'{"txt": "x"}',
            b"\xff",
            b'{"text": "\\ud800"}',
            b"NaN",
            b"5",
        ),
        *(
            b"[" * 50_000,
            b"9" * 5000,
            b'{"text": "x"',
            b'{"text": "caf\xe9"}',
            b'{"text": ["x"]}',
            b"{}",
            b"\0",
            b'"text"',
        ),
        *(
            b'{"text": ' + b"[" * 50_000,
            b'{"' + b"k" * 5000 + b'": 1}',
            b'{"\\u001b[31m": 1}',
            b"\xff\xfe{\0}\0",
            b"x" * 9999,
        ),
    ]
).map(lambda data: Line(data, ...))
COMPRESSIONS = st.sampled_from(["", "", ".gz", ".zst"])


def _compressed(data: bytes, suffix: str) -> bytes:
    match suffix:
        case ".gz":
            return gzip.compress(data[:9], mtime=0) + gzip.compress(data[9:], mtime=0)
        case ".zst":
            return bytes(pyarrow.compress(data, codec="zstd", asbytes=True))
        case _:
            return data


def _prepare(bench: Bench, source: str, *options: object) -> Ended:
    arguments = (
        "prepare",
        "--out",
        "out",
        "--tokenizer",
        bench.tokenizer_folder,
        "--validation",
        "0",
        "--workers",
        "1",
    )
    return relora(*arguments, *options, "--", source)


def _documents(bench: Bench) -> list[str]:
    """What was written, decoded: the documents between the ids that end them."""
    folder = PreparedFolder.open("out/train")
    folder.verify()
    ids = folder.window(0, folder.tokens)
    ends = np.flatnonzero(ids == folder.index.eos_token_id)
    assert len(ends) == folder.index.documents and ends[-1] == len(ids) - 1
    starts = [0, *(end + 1 for end in ends[:-1])]
    pieces = [ids[start:end].tolist() for start, end in zip(starts, ends, strict=True)]
    return [bench.tokenizer.decode(piece, skip_special_tokens=False) for piece in pieces]


def _judge(ended: Ended, wanted: Sequence[str] | None, bench: Bench, *words: str) -> str | None:
    """It gave the `wanted` documents; or, where those are None or none at all, one line and nothing on the disk."""
    if not wanted:
        return (
            ended.complaint(2, *words) or complaint_of(ended) or ("left behind: out" if Path("out").exists() else None)
        )
    if ended.status:
        return f"refused: {ended.err}"
    found = _documents(bench)
    return None if found == list(wanted) else f"{len(found)} documents, {len(wanted)} wanted, or other text"


@st.composite
def json_lines(draw: st.DrawFn) -> tuple[list[Line], bytes, str, bool]:
    """Lines, how they end, the compression, and whether bad ones are left out."""
    lines = draw(st.lists(LINES, max_size=6))
    if draw(st.booleans()):
        lines.insert(draw(st.integers(0, len(lines))), draw(BAD_LINES))
    return lines, draw(st.sampled_from([b"\n", b"\r\n"])), draw(COMPRESSIONS), draw(st.booleans())


def judge_records(case: tuple[list[Line], bytes, str, bool], bench: Bench) -> str | None:
    """The texts of the good lines come back; the first bad one is named, or left out if that was asked for."""
    lines, end, suffix, skip_bad = case
    name = f"a.jsonl{suffix}"
    Path(name).write_bytes(_compressed(end.join(line.data for line in lines), suffix))
    texts = [line.text for line in lines if isinstance(line.text, str)]
    bad = [number for number, line in enumerate(lines, start=1) if line.text is ...]
    ended = _prepare(bench, name, *["--skip-bad"] * skip_bad)
    if bad and not skip_bad:
        return _judge(ended, None, bench, name, f"line {bad[0]}")
    return _judge(ended, texts, bench)


SEPARATOR_LINE = re.compile(r"^[ \t]{0,16}<\|endoftext\|>[ \t]{0,16}(?:\n|\Z)", re.MULTILINE)


def text_files() -> SearchStrategy[tuple[list[str], int, str, bool]]:
    """Parts of a text, how often they are repeated, the compression, and whether it opens with a byte order mark."""
    parts = st.lists(TEXTS | st.sampled_from(["<|endoftext|>", " <|endoftext|>\t"]), max_size=5)
    return st.tuples(parts, st.sampled_from([1, 1, 1, 2000]), COMPRESSIONS, st.booleans())


def judge_text(case: tuple[list[str], int, str, bool], bench: Bench) -> str | None:
    """A text file comes back whole, but for lines that part documents; with NUL characters it is refused."""
    parts, times, suffix, mark = case
    text = "\n\n".join(parts) * times
    Path(f"a.md{suffix}").write_bytes(_compressed(text.encode("utf-8-sig" if mark else "utf-8"), suffix))
    ended = _prepare(bench, f"a.md{suffix}")
    wanted = (text if mark else text.removeprefix("\ufeff")).replace("\r\n", "\n").replace("\r", "\n")
    documents = SEPARATOR_LINE.split(wanted)
    if len(documents) > 1:
        documents = [document for document in documents if document.strip()]
    wanted = "".join(documents)
    if not wanted or "\0" in wanted:
        return _judge(ended, None, bench, f"a.md{suffix}")
    if ended.status:
        return f"refused: {ended.err}"
    found = _documents(bench)
    if "".join(found) != wanted:
        return "other text"
    return None if len(found) >= len(documents) else f"{len(found)} documents of {len(documents)}"


COLUMN_TYPES = {
    "string": pyarrow.string(),
    "large": pyarrow.large_string(),
    "view": pyarrow.string_view(),
    "dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
}
ODD_COLUMNS = {
    "integers": pyarrow.array([1, 2]),
    "bytes": pyarrow.array([b"\xff", b"text"]),
    "not UTF-8": pyarrow.array([b"text", b"\xff"]).view(pyarrow.string()),
    "lists": pyarrow.array([["a"], []]),
    "structs": pyarrow.array([{"text": "a"}]),
    "nulls": pyarrow.nulls(2),
    "times": pyarrow.array([2**55], pyarrow.timestamp("ms")),
    "empty": pyarrow.array([], pyarrow.string()),
}


def tables() -> SearchStrategy[tuple[str, list[str | None]]]:
    """The type of the text column, and its rows; or the name of an odd column."""
    rows = st.lists(TEXTS | st.none(), max_size=6) | st.lists(TEXTS, min_size=1, max_size=6)
    return st.tuples(st.sampled_from([*COLUMN_TYPES, *COLUMN_TYPES, *ODD_COLUMNS]), rows)


def judge_rows(case: tuple[str, list[str | None]], bench: Bench) -> str | None:
    """The rows of a text column come back; another column, or the first row without text, is named."""
    kind, rows = case
    if kind in ODD_COLUMNS:
        pyarrow.parquet.write_table(pyarrow.table({"text": ODD_COLUMNS[kind]}), "a.parquet")
        return _judge(_prepare(bench, "a.parquet"), None, bench, "a.parquet")
    column = pyarrow.array(rows, pyarrow.string()).cast(COLUMN_TYPES[kind])
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(rows)), "text": column}), "a.parquet", row_group_size=2)
    ended = _prepare(bench, "a.parquet")
    if None in rows:
        return _judge(ended, None, bench, "a.parquet", f"row {rows.index(None) + 1}")
    return _judge(ended, [text for text in rows if text], bench)


def damaged_sources() -> SearchStrategy[tuple[str, str, int, bytes, bool]]:
    """A file name, what to do to its content, where, with which bytes, and whether bad records are left out."""
    names = st.sampled_from(["a.parquet", "a.parquet", "a.jsonl", "a.jsonl.gz", "a.txt.gz", "a.txt.zst", "a.txt"])
    actions = st.sampled_from(["cut", "flip", "insert", "replace", "all"])
    return st.tuples(names, actions, st.integers(0, 10**6), st.binary(min_size=1, max_size=20), st.booleans())


def judge_damaged(case: tuple[str, str, int, bytes, bool], bench: Bench) -> str | None:
    """Success or one line that names the file; where it succeeds, the counts agree."""
    name, action, at, piece, skip_bad = case
    texts = [f"document {number} of the corpus, with words" * 9 for number in range(40)]
    data = bytearray(_valid_file(name, texts))
    at %= len(data)
    match action:
        case "cut":
            del data[at:]
        case "flip":
            data[at] ^= 1 << at % 8
        case "insert":
            data[at:at] = piece
        case "replace":
            data[at : at + len(piece)] = piece
        case "all":
            data[:] = piece
    Path(name).write_bytes(data)
    ended = _prepare(bench, name, *["--skip-bad"] * skip_bad)
    if ended.status == 0:
        _documents(bench)
        return None
    return complaint_of(ended) or ("left behind: out" if Path("out").exists() else None)


def _valid_file(name: str, texts: list[str]) -> bytes:
    if name.endswith(".parquet"):
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), sink, row_group_size=10)
        return bytes(sink.getvalue())
    lines = [json.dumps({"text": text}) for text in texts] if ".jsonl" in name else texts
    return _compressed("\n".join(lines).encode(), Path(name).suffix)


NAMES = (
    *(
        "a.txt",
        "é.txt",
        "a b.txt",
        "new\nline.txt",
        "caf\udce9.txt",
        "-dash.txt",
        "x" * 250 + ".txt",
        "[a].txt",
        "*.txt",
    ),
    *(
        ".hidden.txt",
        "README.md",
        "a.TXT",
        "a:b.txt",
        "~.txt",
        "a'b\".txt",
        "a.txt.gz.gz",
        "noname",
        "a.jsonl",
        "\x7f.txt",
    ),
    *("x" * 300, "x" * 5000, "a\0b.txt", ".", "..", "a/b.txt", "a.bin", "a.pkl", "a.parquet"),
)
STATES = (
    "file",
    "file",
    "empty",
    "folder",
    "folder with it",
    "pipe",
    "loop",
    "broken link",
    "link",
    "device",
    "socket",
    "none",
)


def places() -> SearchStrategy[tuple[str, str, bool]]:
    """A name, what is there, and whether the folder that holds it is given instead."""
    return st.tuples(st.sampled_from(NAMES), st.sampled_from(STATES), st.booleans())


def judge_place(case: tuple[str, str, bool], bench: Bench) -> str | None:
    """Success or one line, nothing left behind, whatever is in the place of a source; a file comes back whole."""
    name, state, whole_folder = case
    Path("texts").mkdir()
    try:
        _put(Path("texts", name), state)
    except (OSError, ValueError):  # the file system has no such name
        state = "none"
    before = contents(Path("texts"))
    ended = _prepare(bench, "texts" if whole_folder else f"texts/{name}")
    if contents(Path("texts")) != before:
        return "a source was changed"
    if ended.status == 0:
        return None if set(_documents(bench)) == {"some text"} else "other text"
    return complaint_of(ended) if len(name) < 200 else ended.complaint(2)


def _put(path: Path, state: str) -> None:
    match state:
        case "file":
            path.write_bytes(b'{"text": "some text"}' if path.suffix == ".jsonl" else b"some text")
        case "empty":
            path.touch()
        case "folder":
            path.mkdir()
        case "folder with it":
            path.mkdir()
            (path / "b.txt").write_bytes(b"some text")
        case "pipe":
            os.mkfifo(path)
        case "loop":
            path.with_name("loop").symlink_to("loop")
            path.symlink_to("loop")
        case "broken link":
            path.symlink_to("nowhere.txt")
        case "link":
            path.with_name("b.txt").write_bytes(b"some text")
            path.symlink_to("b.txt")
        case "device":
            path.symlink_to("/dev/zero")
        case "socket":
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(path))
