import io
from pathlib import Path

import huggingface_hub
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from relora.data import readers
from relora.data.readers import (
    PIECE_CHARS,
    WHOLE_FILE_CHARS,
    column_names,
    hub_revision,
    read_hub_dataset,
    read_json,
    read_text,
)
from relora.errors import UserError


def _refuse(message: str) -> None:
    raise AssertionError(message)


def _pieces(data: bytes) -> list[str]:
    return [fields["text"] for _, fields in read_text(io.BytesIO(data), "a.txt", _refuse)]


def test_a_text_file_is_one_record() -> None:
    text = "line\n\nline\n" * 100
    assert list(read_text(io.BytesIO(text.encode()), "a.txt", _refuse)) == [("a.txt", {"text": text})]
    assert list(read_text(io.BytesIO(text.encode()), "a.txt", _refuse, "body")) == [("a.txt", {"body": text})]
    whole = "x" * WHOLE_FILE_CHARS
    assert _pieces(whole.encode()) == [whole]


@settings(max_examples=10)
@given(
    paragraphs=st.lists(st.integers(1, 3 * PIECE_CHARS), min_size=8, max_size=20),
    mark=st.sampled_from(["\n\n", "\n", " ", ""]),
)
def test_a_long_text_file_is_cut_without_a_gap(paragraphs: list[int], mark: str) -> None:
    text = mark.join("ä" * length for length in paragraphs) + "z" * WHOLE_FILE_CHARS
    pieces = _pieces(text.encode())
    assert "".join(pieces) == text
    assert all(PIECE_CHARS <= len(piece) <= 2 * PIECE_CHARS for piece in pieces[:-1])
    assert 0 < len(pieces[-1]) <= 2 * PIECE_CHARS


def test_a_long_text_file_is_cut_at_blank_lines() -> None:
    text = ("A sentence of a book.\n" * 20 + "\n") * 1000
    pieces = _pieces(text.encode())
    assert len(pieces) > 5
    assert all(piece.startswith("A sentence") and piece.endswith("\n\n") for piece in pieces)


def test_a_byte_order_mark_and_foreign_line_ends_are_dropped() -> None:
    assert _pieces(b"\xef\xbb\xbfone\r\ntwo") == ["one\ntwo"]


def test_a_piece_of_a_long_text_file_has_a_number() -> None:
    rows = list(read_text(io.BytesIO(b"word " * WHOLE_FILE_CHARS), "a.txt", _refuse))
    assert [where for where, _ in rows[:2]] == ["a.txt, piece 1", "a.txt, piece 2"]


def test_json_lines_named_json_are_not_read_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LARGEST_ARRAY", 20)
    lines = b'\n\xef\xbb\xbf{"x": 1}\n{"x": 2}\n\n{"x": 3}\n'
    rows = list(read_json(io.BytesIO(lines), "a.json", _refuse))
    assert rows == [("a.json, line 2", {"x": 1}), ("a.json, line 3", {"x": 2}), ("a.json, line 5", {"x": 3})]
    assert list(read_json(io.BytesIO(b'\n \n[1,\n"x"]\n'), "a.json", _refuse)) == [
        ("a.json, record 1", 1),
        ("a.json, record 2", "x"),
    ]


def test_a_line_that_is_too_long_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LONGEST_LINE", 64)
    told: list[str] = []
    data = b"[" * 1000 + b'\n{"x": 2}\n'
    assert list(readers.read_jsonl(io.BytesIO(data), "a.jsonl", told.append)) == [("a.jsonl, line 2", {"x": 2})]
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
    with pytest.raises(UserError, match="no such file or folder, and the hub gave no dataset of that name") as caught:
        hub_revision("relora-tests/no-such-dataset")
    assert "\n" not in str(caught.value)


def test_column_names_are_few_and_printable() -> None:
    assert column_names({"a": 1, "b\n": 2}) == r"`a`, `'b\n'`"
    assert column_names([]) == "none"
    assert column_names(str(number) for number in range(8)).endswith("`6`, `7`")
    assert column_names(str(number) for number in range(99)).endswith("`7`, ...")
