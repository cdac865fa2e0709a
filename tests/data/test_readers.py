import io
from pathlib import Path

import huggingface_hub
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from relora.data.readers import PIECE_CHARS, WHOLE_FILE_CHARS, hub_revision, read_hub_dataset, read_text
from relora.errors import UserError


def _refuse(message: str) -> None:
    raise AssertionError(message)


def test_a_text_file_is_one_document() -> None:
    text = "line\n\nline\n" * 100
    assert list(read_text(io.BytesIO(text.encode()))) == [text]
    whole = "x" * WHOLE_FILE_CHARS
    assert list(read_text(io.BytesIO(whole.encode()))) == [whole]


@settings(max_examples=10)
@given(
    paragraphs=st.lists(st.integers(1, 3 * PIECE_CHARS), min_size=8, max_size=20),
    mark=st.sampled_from(["\n\n", "\n", " ", ""]),
)
def test_a_long_text_file_is_cut_without_a_gap(paragraphs: list[int], mark: str) -> None:
    text = mark.join("ä" * length for length in paragraphs) + "z" * WHOLE_FILE_CHARS
    pieces = list(read_text(io.BytesIO(text.encode())))
    assert "".join(pieces) == text
    assert all(PIECE_CHARS <= len(piece) <= 2 * PIECE_CHARS for piece in pieces[:-1])
    assert 0 < len(pieces[-1]) <= 2 * PIECE_CHARS


def test_a_long_text_file_is_cut_at_blank_lines() -> None:
    text = ("A sentence of a book.\n" * 20 + "\n") * 1000
    pieces = list(read_text(io.BytesIO(text.encode())))
    assert len(pieces) > 5
    assert all(piece.startswith("A sentence") and piece.endswith("\n\n") for piece in pieces)


def test_a_byte_order_mark_and_foreign_line_ends_are_dropped() -> None:
    assert list(read_text(io.BytesIO(b"\xef\xbb\xbfone\r\ntwo"))) == ["one\ntwo"]


def test_a_streamed_dataset_gives_its_texts(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["one", "", "two"], "other": [1, 2, 3]}).to_parquet(tmp_path / "train.parquet")
    assert list(read_hub_dataset(str(tmp_path), None, None, "text", _refuse)) == ["one", "two"]
    with pytest.raises(AssertionError, match=r"row 1: no field `body`; there are `text`, `other`"):
        list(read_hub_dataset(str(tmp_path), None, None, "body", _refuse))


def test_a_dataset_that_cannot_be_streamed_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be streamed: ") as caught:
        list(read_hub_dataset(str(tmp_path), None, None, "text", _refuse))
    assert "\n" not in str(caught.value)


def test_a_name_that_the_hub_does_not_know_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="no such file or folder, and the hub gave no dataset of that name") as caught:
        hub_revision("relora-tests/no-such-dataset")
    assert "\n" not in str(caught.value)
