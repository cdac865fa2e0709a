import io
from pathlib import Path

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset

from relora.data import json_files
from relora.data.finetuning.records import Records
from relora.data.json_files import read_json
from relora.data.readers import column_names, hub_revision, read_hub_dataset
from relora.errors import UserError


def _refuse(message: str) -> None:
    raise AssertionError(message)


def test_json_lines_named_json_are_not_read_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "LARGEST_WHOLE", 20)
    lines = b'\n\xef\xbb\xbf{"x": 1}\n{"x": 2}\n\n{"x": 3}\n'
    rows = list(read_json(io.BytesIO(lines), "a.json", _refuse))
    assert rows == [("a.json, line 2", {"x": 1}), ("a.json, line 3", {"x": 2}), ("a.json, line 5", {"x": 3})]
    assert list(read_json(io.BytesIO(b'\n \n[1,\n"x"]\n'), "a.json", _refuse)) == [
        ("a.json, record 1", 1),
        ("a.json, record 2", "x"),
    ]


def test_a_line_that_is_too_long_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "LONGEST_LINE", 64)
    told: list[str] = []
    data = b"[" * 1000 + b'\n{"x": 2}\n'
    assert list(read_json(io.BytesIO(data), "a.jsonl", told.append)) == [("a.jsonl, line 2", {"x": 2})]
    assert len(told) == 1 and told[0].startswith("a.jsonl, line 1: longer than")


def test_a_streamed_dataset_gives_its_rows(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["one", ""], "other": [1, 2]}).to_parquet(tmp_path / "train.parquet")
    assert list(read_hub_dataset(str(tmp_path), None, None)) == [
        (f"{tmp_path}, row 1", {"text": "one", "other": 1}),
        (f"{tmp_path}, row 2", {"text": "", "other": 2}),
    ]


def test_a_dataset_that_cannot_be_streamed_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be streamed: ") as caught:
        list(read_hub_dataset(str(tmp_path), None, None))
    assert "\n" not in str(caught.value)


def test_a_name_that_the_hub_does_not_know_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="no such file or folder; the hub was not asked") as caught:
        hub_revision("relora-tests/no-such-dataset")
    assert "\n" not in str(caught.value)


def test_column_names_are_few_and_printable() -> None:
    assert column_names({"a": 1, "b\n": 2}) == r"`a`, `'b\n'`"
    assert column_names([]) == "none"
    assert column_names(str(number) for number in range(8)).endswith("`6`, `7`")
    assert column_names(str(number) for number in range(99)).endswith("`7`, ...")


@pytest.mark.parametrize("saved", [False, True])
def test_fields_that_only_other_records_have_are_no_nulls(tmp_path: Path, saved: bool) -> None:
    """Arrow gives all objects of a column the same fields; calls would be trained with arguments of other records."""

    def record(arguments: dict[str, object], content: str | None) -> dict[str, object]:
        calls = [{"function": {"name": "f", "arguments": arguments}}]
        properties = {key: {"type": "x"} for key in arguments}
        return {
            "messages": [{"role": "assistant", "content": content, "tool_calls": calls}],
            "tools": [{"function": {"name": "f", "parameters": {"properties": properties}}, **properties}],
            "label": None,
        }

    records = [record({"city": "Rome"}, None), record({"unit": "C", "list": [1, None]}, "So.")]
    path = tmp_path / ("saved" if saved else "a.parquet")
    if saved:
        Dataset.from_list(records).save_to_disk(path)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    assert [one.fields for one in Records([str(path)])] == records
