"""JSON files that are neither one value a line nor an array: an object that holds the records, and what is no data."""

import io
import json
from typing import Any

import pytest

from relora.data.readers import read_json

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


@pytest.mark.parametrize(
    "value", [{"instruction": ["q0", "q1"], "output": ["a0", "a1"]}, {"text": {"0": "a", "1": "b"}}]
)
def test_an_object_without_a_list_of_records_is_refused(value: dict[str, Any]) -> None:
    rows, told = read(json.dumps(value, indent=2))
    assert rows == []
    assert told == ["w.json: one JSON object with no list of records; write one array of records, or one record a line"]


def test_what_is_not_json_is_told_with_its_place() -> None:
    assert read('{"data": [\n{"x": 1},\n]}')[1][0].startswith("w.json: not valid JSON (")
    rows, told = read('{"x": 1\n{"x": 2}\n')
    assert rows == [("w.json, line 2", {"x": 2})]
    assert told[0].startswith("w.json, line 1: not valid JSON (")


def test_a_first_line_that_is_too_long_is_left_out_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relora.data.readers.LONGEST_LINE", 32)
    rows, told = read(json.dumps({"x": "y" * 100}) + '\n{"x": 2}\n')
    assert rows == [("w.json, line 2", {"x": 2})]
    assert len(told) == 1 and told[0].startswith("w.json, line 1: longer than")
