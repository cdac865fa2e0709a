import csv
import gzip
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.tongues import write_lines

from relora.data import json_files, readers
from relora.data.finetuning.records import Record, Records, split
from relora.errors import UserError

ROWS = [
    {"instruction": "Say hello.", "output": 'Hello, "you"!\nAnd more.'},
    {"instruction": "", "output": "ä 日本 🙂"},
    {"instruction": "A, B", "output": "C;D"},
]


def fields(source: Path | str, **options: Any) -> list[dict[str, Any]]:
    return [dict(record.fields) for record in Records([str(source)], **options)]


def write_csv(file: Path, rows: list[dict[str, str]]) -> Path:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return file


def test_every_kind_of_file_gives_the_same_records(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", ROWS)
    write_lines(tmp_path / "lines.json", ROWS)
    (tmp_path / "array.json").write_text(json.dumps(ROWS, indent=2))
    write_csv(tmp_path / "a.csv", ROWS)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for name in ("a.jsonl", "array.json", "a.csv"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(data))
        with pyarrow.CompressedOutputStream(tmp_path / f"{name}.zst", "zstd") as stream:
            stream.write(data)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 11
    for file in files:
        assert fields(file) == ROWS, file
    assert fields(tmp_path) == ROWS * 11  # the folder, in order


def test_a_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    for name, text in (("a.csv", "text\nx\n"), ("a.json", '[{"text": "x"}]'), ("a.jsonl", '{"text": "x"}')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert fields(tmp_path / name) == [{"text": "x"}]


def test_a_record_knows_its_place(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n\n{"x": 2}\n')
    (tmp_path / "b.json").write_text('[{"x": 3}]')
    (tmp_path / "c.csv").write_text('x,y\n"1\n2",3\n4,5\n')
    (tmp_path / "d.parquet").write_bytes(b"")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"x": 1}]), tmp_path / "d.parquet")
    places = [record.where.removeprefix(f"{tmp_path}/") for record in Records([str(tmp_path)])]
    assert places == [
        *("a.jsonl, line 1", "a.jsonl, line 3", "b.json, record 1", "c.csv, line 3", "c.csv, line 4"),
        "d.parquet, row 1",
    ]


def test_conversations_keep_their_shape_in_parquet(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert fields(tmp_path / "a.parquet") == rows


@pytest.mark.parametrize("in_splits", [False, True])
def test_a_saved_dataset(tmp_path: Path, in_splits: bool) -> None:
    dataset = Dataset.from_list(ROWS)
    (DatasetDict({"train": dataset}) if in_splits else dataset).save_to_disk(str(tmp_path / "saved"))
    assert fields(tmp_path / "saved") == ROWS
    if in_splits:
        DatasetDict({"test": dataset}).save_to_disk(str(tmp_path / "other"))
        with pytest.raises(UserError, match="no split `train`; give the folder of one of `test`"):
            fields(tmp_path / "other")


def test_a_name_that_the_hub_does_not_know_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="no such file or folder; the hub was not asked"):
        Records(["relora-tests/no-such-dataset"])


def test_one_bad_row_of_a_parquet_file_is_left_out_alone(tmp_path: Path) -> None:
    column = pyarrow.array([b"a", b"\xff", b"c"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet, row 2: not UTF-8"):
        fields(tmp_path / "a.parquet")
    assert fields(tmp_path / "a.parquet", skip_bad=True) == [{"text": "a"}, {"text": "c"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"x": 1}\n{"x": \n', r"a\.jsonl, line 2: not valid JSON \(Expecting value: line 2"),
        ("a.jsonl", b'{"x": "\xff"}\n', r"a\.jsonl, line 1: not UTF-8"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl, record 1: not a JSON object"),
        ("a.jsonl", b"[" * 100_000 + b"\n", r"a\.jsonl, line 1: JSON with a number too long, or nested too deeply"),
        ("a.jsonl", b"\n", r"a\.jsonl: holds no record"),
        ("a.json", b'[{"x": 1},]', r"a\.json: not valid JSON"),
        ("a.json", b"[]", r"a\.json: holds no record"),
        ("a.json", b'[{"x": 1}, 2]', r"a\.json, record 2: not a JSON object"),
        ("a.csv", b"x,y\n1\n", r"a\.csv, line 2: 1 fields under 2 columns"),
        ("a.csv", b"x,x\n1,2\n", r"a\.csv: column `x` is there twice"),
        ("a.csv", b'x,y\n"1,2\n', r"a\.csv, line 2: not valid CSV \(unexpected end of data\)"),
        ("a.csv", b"x\n\xff\n", r"a\.csv: not UTF-8 text"),
        ("a.csv", b'x\n"' + b"y" * 200_000 + b'"\n', r"a\.csv, line 2: not valid CSV \(field larger than"),
        ("a.parquet", b"PAR1 nothing", r"a\.parquet: cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"x": 1}\n' * 9999)[:-20], r"a\.jsonl\.gz: cannot be read"),
        ("a.jsonl.zst", b"nothing", r"a\.jsonl\.zst: cannot be read"),
    ],
)
def test_what_is_wrong_is_one_line_or_counted(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        fields(file)
    assert "\n" not in str(caught.value)
    lenient = Records([str(file)], skip_bad=True)
    for _ in range(2):  # each pass counts anew
        list(lenient)
        assert lenient.skipped_records >= 1
    assert lenient.skipped_records <= 2


def test_a_bad_record_is_left_out_alone(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n{\n{"x": 2}\n')
    assert fields(tmp_path / "a.jsonl", skip_bad=True) == [{"x": 1}, {"x": 2}]
    with pytest.raises(UserError, match=r"line 2: .*\(data.skip_bad leaves such records out\)$"):
        fields(tmp_path / "a.jsonl", skip_bad=False)
    with pytest.raises(UserError) as caught:  # in a command that has no such option
        fields(tmp_path / "a.jsonl")
    assert "skip_bad" not in str(caught.value)


def test_too_large_in_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "LARGEST_WHOLE", 1 << 20)
    for module in (json_files, readers):
        monkeypatch.setattr(module, "LONGEST_LINE", 1 << 20)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b"[" + b" " * (1 << 20) + b"]"))
    with pytest.raises(UserError, match=r"more than 1 MB in one piece; write it as \.jsonl"):
        fields(tmp_path / "a.json.gz")
    for name in ("a.jsonl.gz", "a.csv.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b"x" * (1 << 21)))
        with pytest.raises(UserError, match=r"line 0|longer than 1 MB") as caught:
            fields(tmp_path / name)
        assert "longer than 1 MB" in str(caught.value)


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.doc").write_text("x")
    for source, message in (
        (str(tmp_path / "none.jsonl"), r"none\.jsonl: no such file or folder"),
        (
            str(tmp_path / "a.doc"),
            r"a\.doc: not a kind of file that can be read; readable are \.json, .*\.txt, \.md, also",
        ),
        (str(tmp_path), "no readable file in this folder"),
        ("https://x.org/a.jsonl", "a web address cannot be used"),
        ("a\0b", "no such file or folder"),
    ):
        with pytest.raises(UserError, match=message):
            Records([source])
    with pytest.raises(UserError, match="no source given"):
        Records([])


def test_hidden_files_and_readmes_are_no_data(tmp_path: Path) -> None:
    for name in (".hidden.jsonl", "README.json", "a.jsonl"):
        write_lines(tmp_path / name, [{"name": name}])
    assert fields(tmp_path) == [{"name": "a.jsonl"}]


@settings(max_examples=50)
@given(
    numbers=st.lists(st.integers(0, 20), min_size=1, max_size=60),
    share=st.floats(0, 0.99),
    seed=st.integers(0, 9),
)
def test_split_keeps_equals_together_and_leaves_no_side_empty(numbers: list[int], share: float, seed: int) -> None:
    rows = [Record(f"line {line}", {"x": number, "y": None}) for line, number in enumerate(numbers)]
    if share and len(set(numbers)) == 1:
        with pytest.raises(UserError, match="too few different ones to hold any out"):
            split(rows, share, seed)
        return
    train, validation = split(rows, share, seed)
    assert sorted((*train, *validation), key=rows.index) == rows
    assert bool(validation) == bool(share)
    assert not {row.fields["x"] for row in train} & {row.fields["x"] for row in validation}
    # neither the order of records nor that of their columns decides
    turned = [Record("elsewhere", dict(reversed(row.fields.items()))) for row in reversed(rows)]
    again, _ = split(turned, share, seed)
    assert [row.fields for row in reversed(again)] == [row.fields for row in train]


def test_split_meets_its_share_and_depends_on_the_seed() -> None:
    rows = [Record("", {"x": number}) for number in range(5000)]
    held_out = [{row.fields["x"] for row in split(rows, 0.1, seed)[1]} for seed in range(2)]
    assert all(430 < len(side) < 570 for side in held_out)
    assert len(held_out[0] & held_out[1]) < 100
    with pytest.raises(UserError, match="share of 1"):
        split(rows, 1.0, 0)


def test_quotation_marks_in_a_tsv_file_are_text(tmp_path: Path) -> None:
    (tmp_path / "dev.tsv").write_text('sentence\tlabel\n"no end\t1\nit\'s "fine"\t0\n')
    rows = [record.fields for record in Records([str(tmp_path / "dev.tsv")])]
    assert rows == [{"sentence": '"no end', "label": "1"}, {"sentence": 'it\'s "fine"', "label": "0"}]
