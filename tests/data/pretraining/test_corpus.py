import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from relora.data.plain_text import WHOLE_FILE_CHARS
from relora.data.pretraining.corpus import Corpus
from relora.errors import UserError

TEXTS = ["The first.\n\nIt has two paragraphs.", "Zweiter Text: äöü €.", "第三", "last"]


def _jsonl(field: str = "text") -> bytes:
    return "\n".join(json.dumps({"id": 1, field: text}, ensure_ascii=False) for text in TEXTS).encode()


def _documents(*sources: Path, **options: object) -> list[str]:
    return list(Corpus([str(source) for source in sources], **options).documents())


def test_saved_datasets(tmp_path: Path) -> None:
    dataset = Dataset.from_dict({"text": TEXTS, "id": range(4)})
    dataset.save_to_disk(tmp_path / "one")
    DatasetDict(train=dataset, test=dataset.select([0])).save_to_disk(tmp_path / "several")
    DatasetDict(test=dataset).save_to_disk(tmp_path / "other")
    assert _documents(tmp_path / "one") == _documents(tmp_path / "several") == TEXTS
    with pytest.raises(UserError, match="no split `train`; give the folder of one of `test`"):
        _documents(tmp_path / "other")
    with pytest.raises(UserError, match="no column `body`; there are `text`, `id`"):
        _documents(tmp_path / "one", text_field="body")


def test_a_folder_is_read_in_order(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.md", "a.txt", "c.jsonl", ".hidden.txt", ".git/x.txt", "README.md", "image.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name)
    corpus = Corpus([str(tmp_path)])
    assert list(corpus.documents()) == list(corpus.documents()) == ["a.txt", "b/1.md", "b/2.txt", "c.jsonl"]
    assert corpus.identity()[0].files == 4


def test_sources_keep_their_order_and_take_counts_for_each(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(_jsonl())
    (tmp_path / "b.txt").write_text("b")
    assert _documents(tmp_path / "b.txt", tmp_path / "a.jsonl", take=2) == ["b", *TEXTS[:2]]


def test_how_much_was_read_is_known_where_take_stops_in_the_middle_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(_jsonl() * 2)
    corpus = Corpus([str(tmp_path / "a.jsonl")], take=2)
    assert [corpus.read_bytes > 0 for _ in corpus.documents()] == [True, True]
    assert corpus.read_bytes >= 0  # the file is closed by now


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(_jsonl() * 1 + b"\n"))
    (tmp_path / "b.txt").write_text("word " * WHOLE_FILE_CHARS)
    Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    corpus = Corpus([str(tmp_path / name) for name in ("a.jsonl.gz", "b.txt", "saved")])
    read = [corpus.read_bytes for _ in corpus.documents()]
    assert read == sorted(read)
    assert (
        corpus.read_bytes
        == corpus.total_bytes
        == corpus.identity()[0].bytes + (tmp_path / "b.txt").stat().st_size + (corpus.identity()[2].bytes or 0)
    )


def test_a_changed_file_changes_the_record(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one")
    before = Corpus([str(file)]).identity()
    assert Corpus([str(file)]).identity() == before
    file.write_text("two!")
    assert Corpus([str(file)]).identity() != before


def test_samples_take_from_every_file(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": name * 10}) for _ in range(100)))
    sample = list(Corpus([str(tmp_path)]).samples(90))
    assert sorted(sample) == sorted(["a" * 10] * 3 + ["b" * 10] * 3 + ["c" * 10] * 3)


MISTAKES = [
    ("absent.txt", None, r"absent\.txt: no such file or folder"),
    ("a.doc", b"x", r"a\.doc: not a kind of file that can be read; readable are \.txt"),
    ("a.txt", b"", r"a\.txt: holds no text"),
    ("a.jsonl", b"\n\n", r"a\.jsonl: holds no text"),
    ("a.txt", b"caf\xe9 au lait", r"a\.txt: not UTF-8 text"),
    ("a.txt.gz", b"no gzip", r"a\.txt\.gz: cannot be read"),
    # mtime: the two workers of a test run must build the same names
    ("a.txt.gz", gzip.compress(b"text" * 1000, mtime=0)[:-9], r"a\.txt\.gz: cannot be read: Truncated"),
    ("a.txt.zst", pa.compress(b"text" * 1000, codec="zstd", asbytes=True)[:-3], r"cannot be read: Truncated"),
    ("a.parquet", b"no parquet", r"a\.parquet: cannot be read"),
    ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2: not valid JSON"),
    ("a.jsonl", b'{"text": "x"}\n\n{"body": "x", "id": 1}\n', r"line 3: no field `text`; there are `body`, `id`"),
    ("a.jsonl", b'{"text": "caf\xe9"}\n', r"a\.jsonl, line 1: not UTF-8"),
    ("a.jsonl", b'{"text": 5}\n', r"line 1: field `text` is not text but int"),
    ("a.jsonl", b"[1]\n", r"record 1: not a JSON object"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', r"line 1: half of a surrogate pair"),
]


@pytest.mark.parametrize(("name", "content", "message"), MISTAKES)
def test_mistakes_are_one_line(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        _documents(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_missing_or_null_parquet_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", None, "b"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet, row 2: field `text` is not text but NoneType"):
        _documents(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: no column `body`; there are `text`; --text-field names another"):
        _documents(tmp_path / "a.parquet", text_field="body")


def test_bad_records_are_counted_when_asked(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\nbroken\n{"id": 1}\n{"text": "two"}\n')
    (tmp_path / "b.txt").write_bytes(b"\xff\xff")
    (tmp_path / "c.txt").write_text("three")
    corpus = Corpus([str(tmp_path)], skip_bad=True)
    for _ in range(2):  # counted anew in every pass
        assert list(corpus.documents()) == ["one", "two", "three"]
        assert corpus.skipped_records == 3


def test_bad_records_are_counted_by_reason(tmp_path: Path) -> None:
    lines = ['{"text": "one"}', "{", "[", '{"id": 1}', '{"body": "x"}', '{"text": 5}', '{"text": null}', "[1]"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\0")
    (tmp_path / "c.txt").touch()
    corpus = Corpus([str(tmp_path)], skip_bad=True)
    for _ in range(2):  # counted anew in every pass
        assert list(corpus.documents()) == ["one"]
        assert sum(corpus.skipped_reasons.values()) == corpus.skipped_records == 9
    assert corpus.notes() == [
        "left out: 9 bad records (2 no field `text`, 2 not valid JSON, 1 UTF-16, not UTF-8 text, 1 field `text` is not "
        "text but NoneType, 1 field `text` is not text but int, 1 holds no text, 1 not a JSON object)"
    ]
