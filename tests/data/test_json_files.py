"""JSON files that are not one value a line: arrays, an object that holds the records, records over several lines."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from relora.data.finetuning.records import Records
from relora.data.json_files import read_json, read_jsonl
from relora.data.readers import COMPRESSIONS

RECORDS = [{"instruction": f"q{number}", "output": f"a{number}"} for number in range(3)]


def read(text: str) -> tuple[list[tuple[str, Any]], list[str]]:
    """Return the rows of a file, and what was reported about it."""
    told: list[str] = []
    return list(read_json(io.BytesIO(text.encode()), "w.json", told.append)), told


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("more", [{}, {"version": "1.0", "license": None, "authors": ["Ann"]}])
def test_the_list_of_records_in_an_object_is_read(indent: int | None, more: dict[str, Any]) -> None:
    rows, told = read(json.dumps({**more, "data": RECORDS}, indent=indent) + "\n")
    assert rows == [(f"w.json, record {number} under `data`", one) for number, one in enumerate(RECORDS, start=1)]
    assert told == []


def test_a_record_that_holds_lists_of_objects_is_one_record() -> None:
    chat = {"messages": [{"role": "user", "content": "Why?"}], "tools": [{"type": "function"}]}
    assert read(json.dumps(chat)) == ([("w.json, line 1", chat)], [])
    for record in ({"text": "a", "spans": [{"start": 0}]}, {"messages": [{"type": "human", "content": "Why?"}]}):
        for indent, place in ((None, "line 1"), (1, "record 1")):
            assert read(json.dumps(record, indent=indent)) == ([(f"w.json, {place}", record)], [])
    called = {"prompt": "Why?", "tools": [{"type": "function"}]}
    both = f"{json.dumps(called)}\n{json.dumps(called)}\n"
    assert read(both) == ([("w.json, line 1", called), ("w.json, line 2", called)], [])
    assert read('{"x": 1}\n\n{"x": 2}') == ([("w.json, line 1", {"x": 1}), ("w.json, line 3", {"x": 2})], [])


@pytest.mark.parametrize("indent", [None, 1])
def test_an_object_with_several_lists_of_records_is_refused(indent: int | None) -> None:
    rows, told = read(json.dumps({"train": RECORDS, "test": RECORDS}, indent=indent))
    assert rows == []
    assert told == [
        "w.json: one JSON object with several lists of records (`train`, `test`); write one array of records, or one "
        "record a line"
    ]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    ("value", "key"), [({"data": []}, "data"), ({"rows": [], "version": "1", "more": None}, "rows"), ({"x": []}, "x")]
)
def test_an_empty_list_of_records_is_named(indent: int | None, value: dict[str, Any], key: str) -> None:
    assert read(json.dumps(value, indent=indent)) == ([], [f"w.json: the list under `{key}` is empty"])
    tagged = {"text": "a", "tags": []}
    assert read(json.dumps(tagged, indent=indent)) == ([(f"w.json, {'record' if indent else 'line'} 1", tagged)], [])


@pytest.mark.parametrize("start", ["", "\n\n", "\ufeff"])
@pytest.mark.parametrize("number", [1, 3])
def test_records_over_several_lines_are_read_one_after_the_other(start: str, number: int) -> None:
    chat = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}
    text = "\n".join(json.dumps(chat, indent=2) for _ in range(number)) + "\n"
    assert read(start + text) == ([(f"w.json, record {place}", chat) for place in range(1, number + 1)], [])


@pytest.mark.parametrize("separators", [(",", ":"), (",\n", ": ")])
def test_an_array_is_read_however_it_is_written(separators: tuple[str, str]) -> None:
    expected = ([(f"w.json, record {place}", one) for place, one in enumerate(RECORDS, start=1)], [])
    assert read(json.dumps(RECORDS, separators=separators)) == expected
    assert read("[\n" + ",\n".join(map(json.dumps, RECORDS)) + "\n]\n") == expected


@pytest.mark.parametrize("first", ["{", "[", '{"x": 1,', "[" * 50_000, '{"x": ' + "[" * 50_000])
def test_lines_behind_a_damaged_first_one_are_lines(first: str) -> None:
    told: list[str] = []
    text = f'{first}\n{{"x": 2}}\n5\n{{"x":\n'
    rows = list(read_jsonl(io.BytesIO(text.encode()), "a.jsonl", told.append))
    assert rows == [("a.jsonl, line 2", {"x": 2}), ("a.jsonl, line 3", 5)]
    assert [line.split(":")[0] for line in told] == ["a.jsonl, line 1", "a.jsonl, line 4"]


def test_arrays_a_line_are_values_of_lines() -> None:
    assert read("[1]\n[2]\n") == ([("w.json, line 1", [1]), ("w.json, line 2", [2])], [])


def test_a_damaged_first_line_does_not_cost_the_others() -> None:
    rows, told = read('\n{"x": 1,\n{"x": 2}\n{"x": 3}\n')
    assert rows == [("w.json, line 3", {"x": 2}), ("w.json, line 4", {"x": 3})]
    assert len(told) == 1 and told[0].startswith("w.json, line 2: not valid JSON (")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".JSONL", ".jsonl.gz", ".jsonl.zst"])
def test_a_document_is_read_whatever_its_suffix(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"w{suffix}"
    for value in (RECORDS, {"data": RECORDS}):
        data = json.dumps(value, indent=2).encode()
        codec = COMPRESSIONS.get(file.suffix)
        file.write_bytes(pyarrow.compress(data, codec, asbytes=True) if codec else data)
        assert [record.fields for record in Records([str(file)])] == RECORDS


def test_what_is_not_json_is_told_with_its_place() -> None:
    assert read('{"data": [\n{"x": 1},\n]}')[1][0].startswith("w.json: not valid JSON (")
    rows, told = read('{"x": 1\n{"x": 2}\n')
    assert rows == [("w.json, line 2", {"x": 2})]
    assert told[0].startswith("w.json, line 1: not valid JSON (")


def test_a_first_line_that_is_too_long_is_left_out_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relora.data.json_files.LONGEST_LINE", 32)
    rows, told = read(json.dumps({"x": "y" * 100}) + '\n{"x": 2}\n')
    assert rows == [("w.json, line 2", {"x": 2})]
    assert len(told) == 1 and told[0].startswith("w.json, line 1: longer than")
