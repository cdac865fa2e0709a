import os
from pathlib import Path

import pytest

from relora.data.encode import DRAWS, Chunk, Encoder, SplitRule, encode_all
from relora.data.tokenizer import END_OF_TEXT, load_tokenizer


def _encoder(tokenizer_folder: Path, share: float = 0.0) -> Encoder:
    tokenizer = load_tokenizer(str(tokenizer_folder))
    return Encoder(tokenizer.backend_tokenizer.to_str(), 0, "uint16", SplitRule(0, int(share * DRAWS)))


def test_the_share_is_met_on_average_and_keyed() -> None:
    texts = [f"document {number}" for number in range(20_000)]
    rule, other = SplitRule(0, DRAWS // 10), SplitRule(1, DRAWS // 10)
    drawn = [rule.is_validation(text) for text in texts]
    assert abs(sum(drawn) - 2000) < 200
    assert sum(a and b for a, b in zip(drawn, map(other.is_validation, texts), strict=True)) < 300


def test_an_eos_in_the_text_is_text(tokenizer_folder: Path) -> None:
    encoded = _encoder(tokenizer_folder).encode(Chunk([f"one {END_OF_TEXT} two", "three"], 0))
    assert (encoded.train.tokens == 0).sum() == 2
    assert encoded.train.documents == 2
    text = load_tokenizer(str(tokenizer_folder)).decode(encoded.train.tokens[:-1])
    assert text == f"one {END_OF_TEXT} two{END_OF_TEXT}three"


def test_order_is_kept_and_little_is_held(tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    taken = 0

    def chunks():
        nonlocal taken
        for number in range(40):
            taken += 1
            yield Chunk([f"{number} " * (1 + 50 * (number % 3))], number)

    for done, (chunk, encoded) in enumerate(encode_all(chunks(), _encoder(tokenizer_folder), workers=3)):
        assert chunk.read_bytes == done
        assert taken - done <= 6
        assert encoded.train.text_bytes == len(chunk.texts[0])
    assert done == 39
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def test_a_failure_in_the_source_comes_through(tokenizer_folder: Path) -> None:
    def chunks():
        yield Chunk(["text"], 0)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        list(encode_all(chunks(), _encoder(tokenizer_folder), workers=2))
