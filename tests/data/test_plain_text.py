import io
import re

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


def _rows(data: bytes, **options: object) -> list[tuple[str, str]]:
    rows = read_text(io.BytesIO(data), "a.txt", _refuse, **options)
    return [(where, fields["text"]) for where, fields in rows]


def test_a_separator_in_a_line_of_its_own_parts_documents() -> None:
    told: list[None] = []
    text = (
        "one.\n<|endoftext|>\n two\n\n  <|endoftext|>\t\r\n\n<|endoftext|>\nthe `<|endoftext|>` of GPT-2\n<|endoftext|>"
    )
    rows = _rows(text.encode(), note_separator=lambda: told.append(None))
    assert rows == [
        ("a.txt, document 1", "one.\n"),
        ("a.txt, document 2", " two\n\n"),
        ("a.txt, document 4", "the `<|endoftext|>` of GPT-2\n"),
    ]
    assert len(told) == 4


def test_a_separator_that_the_user_names_parts_documents_anywhere() -> None:
    separators = separators_of("---", "</s>")
    assert _rows(b"a---b\n---\nc\n</s>\nd---", separators=separators) == [
        ("a.txt, document 1", "a"),
        ("a.txt, document 2", "b\n"),
        ("a.txt, document 3", "c\n</s>\nd"),
    ]
    blank_lines = separators_of("\n\n\r\n", "</s>")
    assert [text for _, text in _rows(b"a\n\nb\n\n\nc", separators=blank_lines)] == ["a\n\nb", "c"]


@pytest.mark.parametrize("given", ["", "x" * 1001])
def test_a_separator_of_no_or_many_characters_is_refused(given: str) -> None:
    with pytest.raises(UserError, match=r"--document-separator: .* give at least 1 and at most 1,000"):
        separators_of(given, "</s>")


def test_the_eos_token_parts_documents_unless_it_is_a_word() -> None:
    assert separators_of(None, "</s>") == Separators((END_OF_TEXT, "</s>"))
    for eos in (END_OF_TEXT, "end", ".", "<e s>"):
        assert separators_of(None, eos) == Separators((END_OF_TEXT,))
    assert [text for _, text in _rows(b"a\n</s>\nb", separators=separators_of(None, "</s>"))] == ["a\n", "b"]


SEPARATOR_LINE = re.compile(r"^[ \t]{0,16}(?:<\|endoftext\|>|</s>)[ \t]{0,16}(?:\n|\Z)", re.MULTILINE)


@settings(max_examples=200, deadline=None)
@given(
    parts=st.lists(
        st.sampled_from(
            ["<|endoftext|>\n", "\n<|endoftext|>\n", "\n  </s> \n", "<|endoftext|> and more\n", "\n\n", " "]
        )
        | st.integers(1, 7000).map(lambda length: "a word " * (length // 7) + "\n"),
        max_size=30,
    )
)
def test_documents_and_their_pieces_are_those_of_the_whole_text(parts: list[str]) -> None:
    """The reference parts the whole text by one regular expression; the reader sees some thousand characters of it."""
    text = "".join(parts)
    separators = Separators((END_OF_TEXT, "</s>"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain_text, "WHOLE_FILE_CHARS", 5000)
        patch.setattr(plain_text, "PIECE_CHARS", 1000)
        rows = _rows(text.encode(), separators=separators)
    found: dict[str, str] = {}
    for where, piece in rows:
        document = re.sub(r", piece \d+$", "", where.replace(", document 1,", ","))
        document = "a.txt" if document == "a.txt, document 1" else document
        found[document] = found.get(document, "") + piece
        assert len(piece) <= (2000 if "piece" in where else 5000)
    expected = SEPARATOR_LINE.split(text)
    assert [part for part in found.values() if part.strip()] == [part for part in expected if part.strip()]


def test_a_long_file_of_documents_is_read_in_blocks() -> None:
    stream = io.BytesIO(b"a small document\n<|endoftext|>\n" * 500_000)
    rows = read_text(stream, "a.txt", _refuse)
    assert next(rows)[1] == {"text": "a small document\n"}
    assert stream.tell() < 2 * WHOLE_FILE_CHARS
    assert sum(1 for _ in rows) == 499_999


def test_a_document_with_a_nul_character_is_told() -> None:
    told: list[str] = []
    rows = read_text(io.BytesIO(b"one\n<|endoftext|>\nt\0w\0o\n<|endoftext|>\nthree"), "a.txt", told.append)
    assert [fields["text"] for _, fields in rows] == ["one\n", "three"]
    assert told == [
        "a.txt, document 2: holds a NUL character, so it is not plain UTF-8 text; convert it, e.g. with iconv"
    ]


def test_a_file_can_be_read_without_cutting_its_documents() -> None:
    text = "word " * WHOLE_FILE_CHARS
    assert _rows(f"{text}\n<|endoftext|>\nend".encode(), cut=False) == [
        ("a.txt, document 1", f"{text}\n"),
        ("a.txt, document 2", "end"),
    ]
