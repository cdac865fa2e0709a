"""The same content in every kind of source, through both uses: documents for pretraining, records for fine-tuning."""

import csv
import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict
from tests.data.tongues import gpt2_like

from relora.data.finetuning.instruct import InstructionForm, encode
from relora.data.finetuning.records import Records
from relora.data.pretraining.corpus import Corpus
from relora.data.pretraining.shards import Source
from relora.data.readers import READERS
from relora.data.sources import ResolvedSource, SourceReader, resolve
from relora.errors import UserError

TEXTS = ['He said "no", twice.', "äöü € 第三", "it's the last"]
RECORDS = [{"id": str(number), "text": text} for number, text in enumerate(TEXTS)]


def _csv(delimiter: str, **options: object) -> bytes:
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=delimiter, lineterminator="\n", **options)
    writer.writerow(RECORDS[0])
    writer.writerows(record.values() for record in RECORDS)
    return stream.getvalue().encode()


def _parquet() -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), sink, row_group_size=2)
    return bytes(sink.getvalue())


def _arrow(new: Callable[[Any, pyarrow.Schema], Any]) -> bytes:
    sink, table = pyarrow.BufferOutputStream(), pyarrow.Table.from_pylist(RECORDS)
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return bytes(sink.getvalue())


LINES = "\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS).encode()
CONTENTS: dict[str, bytes] = {
    "a.jsonl": LINES,
    "lines.json": LINES,
    "array.json": json.dumps(RECORDS, indent=1).encode(),
    "a.csv": _csv(","),
    "a.tsv": _csv("\t", quoting=csv.QUOTE_NONE, quotechar=None),
    "a.parquet": _parquet(),
    "stream.arrow": _arrow(pyarrow.ipc.new_stream),
    "file.arrow": _arrow(pyarrow.ipc.new_file),
}
"""Files that hold `RECORDS`."""
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": lambda data: gzip.compress(data[:50]) + gzip.compress(data[50:]),  # two members, as `cat a.gz b.gz` makes
    ".zst": lambda data: bytes(pyarrow.compress(data, codec="zstd", asbytes=True)),
}


def _documents(*sources: Path | str) -> list[str]:
    return list(Corpus([str(source) for source in sources]).documents())


def _fields(*sources: Path | str) -> list[dict[str, object]]:
    return [dict(record.fields) for record in Records([str(source) for source in sources])]


def test_every_kind_of_file_has_a_case() -> None:
    assert {Path(name).suffix for name in CONTENTS} | {".txt", ".md"} == READERS.keys()


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("name", CONTENTS)
def test_a_file_of_records_is_read_by_both(tmp_path: Path, name: str, compression: str) -> None:
    file = tmp_path / f"{name}{compression}"
    file.write_bytes(COMPRESS[compression](CONTENTS[name]))
    if compression and name.endswith((".parquet", ".arrow")):  # they are not read from beginning to end
        for read in (_documents, _fields):
            with pytest.raises(UserError, match=r"a compressed (parquet|Arrow) file; decompress it first"):
                read(file)
        return
    for source in (file, tmp_path):  # named itself, and found in its folder
        assert _documents(source) == TEXTS
        assert _fields(source) == RECORDS
    assert list(Corpus([str(file)], text_field="id").documents()) == ["0", "1", "2"]


@pytest.mark.parametrize("name", ["stream.arrow", "file.arrow"])
def test_a_damaged_arrow_file_is_one_line_or_other_values(tmp_path: Path, name: str) -> None:
    """Its messages say where values are, so damage must not lead out of the file."""
    file, whole = tmp_path / name, CONTENTS[name]
    for at in range(0, len(whole), 3):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
        try:
            assert len(_fields(file)) <= len(TEXTS)
        except UserError as error:
            assert "\n" not in str(error)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"{name}: cannot be read: "):
        _fields(file)


@pytest.mark.parametrize("name", ["A.JSONL", "a.Json", "A.CSV", "A.TSV", "A.PARQUET", "a.jsonl.GZ", "A.JSON.ZST"])
def test_suffixes_count_in_capitals_too(tmp_path: Path, name: str) -> None:
    kind, *compression = Path(name.lower()).suffixes
    content = CONTENTS["array.json" if kind == ".json" else f"a{kind}"]
    (tmp_path / name).write_bytes(COMPRESS["".join(compression)](content))
    for source in (tmp_path / name, tmp_path):
        assert _documents(source) == TEXTS
        assert _fields(source) == RECORDS
    assert Corpus([str(tmp_path)]).sources[0].capitals == (name,)


def test_a_text_in_capitals_is_a_document_of_its_folder(tmp_path: Path) -> None:
    for name in ("BOOK.TXT", "a.txt", "b.Md", "C.TXT.Gz"):
        (tmp_path / name).write_bytes(gzip.compress(name.encode()) if name.endswith("Gz") else name.encode())
    assert _documents(tmp_path) == ["BOOK.TXT", "C.TXT.Gz", "a.txt", "b.Md"]


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", [".txt", ".md"])
def test_a_plain_text_is_read_by_both(tmp_path: Path, kind: str, compression: str) -> None:
    text = "\n".join(TEXTS)
    file = tmp_path / f"a{kind}{compression}"
    file.write_bytes(COMPRESS[compression](text.encode()))
    for source in (file, tmp_path):
        assert _documents(source) == [text]
        assert _fields(source) == [{"text": text}]
    assert [record.where for record in Records([str(file)])] == [str(file)]
    assert list(Corpus([str(file)], text_field="body").documents()) == [text]


def test_separators_part_documents_for_both(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(TEXTS))
    expected = [f"{TEXTS[0]}\n", f"{TEXTS[1]}\n", TEXTS[2]]
    assert _documents(tmp_path / "a.txt") == expected
    records = Records([str(tmp_path / "a.txt")])
    assert [record.fields for record in records] == [{"text": text} for text in expected]
    assert records.notes() == ["documents parted at 2 separators (`<|endoftext|>`)"]
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": (tmp_path / "a.txt").read_text()}))
    assert _documents(tmp_path / "b.jsonl") == [(tmp_path / "a.txt").read_text()]  # a record is one document


TYPES = {
    "string": pyarrow.string(),
    "large": pyarrow.large_string(),
    "view": pyarrow.string_view(),
    "dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    "large dictionary": pyarrow.dictionary(pyarrow.int8(), pyarrow.large_string()),
}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "zstd"])
def test_every_kind_of_text_column_of_a_parquet_file(tmp_path: Path, kind: str, codec: str) -> None:
    column = pyarrow.array(TEXTS * 300).cast(pyarrow.large_string())
    column = column.dictionary_encode().cast(TYPES[kind]) if "dictionary" in kind else column.cast(TYPES[kind])
    table = pyarrow.table({"id": range(900), "text": column})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=250, compression=codec)
    assert _documents(tmp_path / "a.parquet") == TEXTS * 300


@pytest.mark.parametrize(
    ("column", "named"),
    [
        ([{"text": "a"}], "struct<text: string>"),
        ([["a", "b"]], "list<element: string>"),
        ([b"a"], "binary"),
        ([1], "int64"),
    ],
)
def test_a_parquet_column_that_is_not_text_is_refused_by_its_type(
    tmp_path: Path, column: list[object], named: str
) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=rf"a\.parquet: column `text` is not text but {named}"):
        _documents(tmp_path / "a.parquet")


@pytest.mark.parametrize("kind", [".gz", ".zst"])
def test_a_compressed_file_of_many_members_is_read_to_its_end(tmp_path: Path, kind: str) -> None:
    compress = {".gz": gzip.compress, ".zst": COMPRESS[".zst"]}[kind]
    lines = [json.dumps({"text": f"document {number}"}).encode() + b"\n" for number in range(500)]
    (tmp_path / f"a.jsonl{kind}").write_bytes(b"".join(map(compress, [*lines[:250], b"", *lines[250:]])))
    assert _documents(tmp_path / f"a.jsonl{kind}") == [f"document {number}" for number in range(500)]


def _zstd_frame(window_log: int, content: bytes) -> bytes:
    """A zstd frame of one stored block (RFC 8878, 3.1.1) that asks for a window of 2 ** window_log bytes."""
    block = (1 | len(content) << 3).to_bytes(3, "little")
    return b"\x28\xb5\x2f\xfd\x00" + bytes([(window_log - 10) << 3]) + block + content


def test_a_zstd_window_that_the_library_cannot_hold_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(_zstd_frame(27, b'{"text": "x"}\n'))
    assert _documents(tmp_path / "a.jsonl.zst") == ["x"]
    (tmp_path / "a.jsonl.zst").write_bytes(_zstd_frame(31, b'{"text": "x"}\n'))
    with pytest.raises(UserError, match=r"a\.jsonl\.zst: cannot be read: its zstd window is .*`zstd -dc --long=31"):
        _documents(tmp_path / "a.jsonl.zst")


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.tsv", "a.txt.gz"])
@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("utf-16", "UTF-16, not UTF-8 text; convert it with `iconv -f UTF-16 -t UTF-8`"),
        ("latin-1", "not UTF-8 text, perhaps Windows-1252; convert it, e.g. with `iconv"),
        ("utf-16-le", "NUL|not UTF-8"),
    ],
)
def test_other_encodings_are_refused_with_the_remedy(tmp_path: Path, name: str, encoding: str, message: str) -> None:
    data = "text\nein schöner Tag\n".encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(UserError, match=message) as caught:
        _documents(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.tsv"])
def test_a_byte_order_mark_and_windows_line_ends_are_no_text(tmp_path: Path, name: str) -> None:
    content = {".txt": "x\r\ny", ".csv": "text\r\nx\r\ny\r\n", ".tsv": "text\r\nx\r\ny\r\n"}
    lines = '{"text": "x"}\r\n{"text": "y"}\r\n'
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.get(Path(name).suffix, lines).encode())
    assert _documents(tmp_path / name) == (["x\ny"] if name == "a.txt" else ["x", "y"])


def test_a_long_plain_text_is_cut_alike_for_both(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A sentence.\n\n" * 50_000)
    documents = _documents(tmp_path / "a.txt")
    assert len(documents) > 5
    assert _fields(tmp_path / "a.txt") == [{"text": document} for document in documents]


def test_a_plain_text_is_a_completion(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat sat on the mat")
    result = encode(Records([str(tmp_path)]), gpt2_like(), InstructionForm(), sequence_length=64)
    assert result.layout.name == "completion"
    assert gpt2_like().decode(result.examples[0].input_ids[:-1]) == "the cat sat on the mat"
    assert result.examples[0].input_ids[-1] == gpt2_like().eos_token_id


@pytest.mark.parametrize("in_splits", [False, True])
def test_a_saved_dataset_is_read_by_both(tmp_path: Path, in_splits: bool) -> None:
    dataset = Dataset.from_list(RECORDS * 200)  # more than one batch
    (DatasetDict(train=dataset) if in_splits else dataset).save_to_disk(str(tmp_path / "saved"))
    assert _documents(tmp_path / "saved") == TEXTS * 200
    assert _fields(tmp_path / "saved") == RECORDS * 200


@pytest.mark.parametrize("reader", [Corpus, Records])
def test_a_folder_gives_the_preferred_kinds_or_else_all(tmp_path: Path, reader: type[SourceReader[object]]) -> None:
    preferred = [f"a{kind}" for kind in reader.preferred_kinds]
    other = [f"a{kind}" for kind in READERS if kind not in reader.preferred_kinds]
    for name in (*other, "README.csv", "README.txt", ".hidden.csv", ".hidden.txt", "image.png", "a.json.bz2"):
        (tmp_path / name).touch()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "a.txt").touch()
    (tmp_path / "folder.csv").mkdir()
    os.mkfifo(tmp_path / "pipe.csv")

    def found() -> list[str]:
        return [file.name for file in resolve(str(tmp_path), reader.preferred_kinds).files]

    assert found() == sorted(other)
    for name in preferred:
        (tmp_path / name).touch()
    assert found() == sorted(preferred)


@pytest.mark.parametrize("reader", [Corpus, Records])
def test_what_is_no_source_is_refused_by_both(tmp_path: Path, reader: Callable[[list[str]], object]) -> None:
    (tmp_path / "image.png").touch()
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "circle.txt").symlink_to("circle.txt")
    for source, message in (
        (tmp_path / "none.csv", r"none\.csv: no such file or folder"),
        (tmp_path / "image.png", "not a kind of file that can be read; readable are .*, also with .gz or .zst"),
        (tmp_path / "pipe.jsonl", r"pipe\.jsonl: not a regular file"),
        (tmp_path / "circle.txt", r"circle\.txt: cannot be read: Too many levels of symbolic links"),
        (tmp_path, r"no readable file in this folder \(it holds 1 \.png, 1 broken link, 1 pipe or device\); readable"),
        ("https://x.org/a.jsonl", "a web address cannot be used"),
        ("a\0b", "no such file or folder"),
        ("x" * 5000, "cannot be read: File name too long"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            reader([str(source)])
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no source given"):
        reader([])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"id,body\n1,x\n", r"a\.csv: no column `text`; there are `id`, `body`"),
        ("a.tsv", b"id\n1\n", r"a\.tsv: no column `text`; there are `id`"),
        ("a.csv", b"text\n1,2\n", r"a\.csv, line 2: 2 fields under 1 columns"),
        ("a.csv", b"text\n", r"a\.csv: holds no text"),
        ("a.json", b'[{"text": "x"}, {"text": 3}]', r"a\.json, record 2: field `text` is not text but int"),
        ("a.json", b'[{"text": ', r"a\.json: not valid JSON"),
        ("a.json", b'["x"]', r"a\.json, record 1: not a JSON object"),
    ],
)
def test_mistakes_in_what_pretraining_newly_reads(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{message}.*--skip-bad") as caught:
        _documents(tmp_path / name)
    assert "\n" not in str(caught.value)
    lenient = Corpus([str(tmp_path / name)], skip_bad=True)
    list(lenient.documents())
    assert lenient.skipped_records >= 1


def test_how_much_was_read_is_known_of_every_kind(tmp_path: Path) -> None:
    for name, content in CONTENTS.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "a.txt").write_text("x")
    corpus = Corpus([str(file) for file in sorted(tmp_path.iterdir())])
    read = [corpus.read_bytes for _ in corpus.documents()]
    assert read == sorted(read)
    assert corpus.read_bytes == corpus.total_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())


FILES = {
    "mixed/a.txt": b"one",
    "mixed/b/2.md": b"three",
    "mixed/b/1.jsonl.gz": b"12345",
    "mixed/c.parquet": b"1234567",
    "mixed/.hidden.txt": b"x",
    "mixed/README.md": b"x",
    "mixed/notes.json": b"[1]",
    "mixed/table.csv": b"x\n1\n",
    "mixed/d.tsv": b"y\n",
    "saved/state.json": b"{}",
    "saved/dataset_info.json": b"{}",
    "saved/data.arrow": b"123",
    "one.txt.zst": b"123456789",
}


def test_fingerprints_are_those_of_earlier_releases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned: with other ones, no folder that was prepared before could be continued or found finished."""
    monkeypatch.chdir(tmp_path)
    for number, (name, content) in enumerate(FILES.items()):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)
        os.utime(name, ns=(10**18 + number, 10**18 + number))
    corpus = Corpus(["mixed", "saved", "one.txt.zst", "./mixed/b"], leave_out=Path("mixed/out"))
    assert corpus.identity() == (
        Source("mixed", 4, 20, "da73649f8f5f62518eb257303bd3b434"),
        Source("saved", 3, 7, "dc5b00545666364d2c862c5cbf82bdf1"),
        Source("one.txt.zst", 1, 9, "893f6fa95c744b36f6a93c42d2f8f8e7"),
        Source("./mixed/b", 2, 10, "84f726f0aaf28d86b876d17c55d7efb8"),
    )
    hub = ResolvedSource("owner/name", revision="0123abcd")
    assert (hub.bytes, hub.fingerprint) == (None, "de99d855b43c24c44de69f01750d4d04")
