import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relora.data import plain_text
from relora.data.plain_text import PIECE_CHARS, WHOLE_FILE_CHARS, Separators, read_text, separators_of
from relora.data.tokenizer import END_OF_TEXT
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


