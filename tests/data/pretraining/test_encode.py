import json
import os
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.paths import DATA
from tokenizers import normalizers, pre_tokenizers

from relora.data.pretraining import encode
from relora.data.pretraining.encode import Chunk, Encoder, _encodes_word_by_word, encode_all
from relora.data.sampling import DRAWS, SplitRule
from relora.data.tokenizer import END_OF_TEXT, load_tokenizer


def _encoder(tokenizer_folder: Path, share: float = 0.0) -> Encoder:
    tokenizer = load_tokenizer(str(tokenizer_folder))
    return Encoder(tokenizer.backend_tokenizer.to_str(), 0, "uint16", SplitRule(0, int(share * DRAWS)))


TOKENIZERS = DATA / "tokenizers"
TRICKY = [
    "a",
    "b c",
    " ",
    "  ",
    "\n",
    "\t",
    "'s",
    " 's",
    "1",
    "-",
    "é",
    "\u0301",
    "\u00a0",
    "\u200b",
    "\u3000",
    "\u00a8",
    "你",
    "▁",
]


@pytest.fixture(scope="module", params=["gpt2", "t5-base", "pythia-gpt-neox-20b", "corpus-bpe-4k"])
def encoder(request: pytest.FixtureRequest) -> Encoder:
    if not TOKENIZERS.is_dir():
        pytest.skip("no shared tokenizers")
    backend = (TOKENIZERS / request.param / "tokenizer.json").read_text()
    return Encoder(backend, 1, "uint32", SplitRule(0, 0))


@settings(deadline=None, max_examples=300)
@given(texts=st.lists(st.lists(st.sampled_from(TRICKY) | st.text(max_size=3), min_size=1).map("".join), min_size=1))
def test_words_have_the_ids_of_whole_texts(encoder: Encoder, texts: list[str]) -> None:
    texts = [text for text in texts if text] or ["a b"]
    assert encoder._word_by_word
    tokenizer = encoder._tokenizer()
    expected = [id for text in texts for id in [*tokenizer.encode(text, add_special_tokens=False).ids, 1]]
    for _ in range(2):  # met for the first time, and known
        np.testing.assert_array_equal(encoder.encode(Chunk(texts, 0)).train.tokens, expected)


@pytest.mark.parametrize(("most", "longest"), [(0, 64), (7, 64), (1 << 18, 3)])
def test_threads_and_full_caches_change_no_id(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, most: int, longest: int
) -> None:
    """Several threads meet the same new words; words that are too long or too many are encoded in every chunk."""
    monkeypatch.setattr(encode, "CACHED_WORDS", most)
    monkeypatch.setattr(encode, "LONGEST_CACHED_WORD", longest)
    encoder = _encoder(tokenizer_folder)
    texts = [" ".join(f"word{at % 13} été{at % 5}" for at in range(number, number + 60)) for number in range(80)]
    tokenizer = encoder._tokenizer()
    found = encode_all((Chunk([text], 0) for text in texts), encoder, workers=4)
    for text, (_, encoded) in zip(texts, found, strict=True):
        expected = [*tokenizer.encode(text, add_special_tokens=False).ids, 0]
        np.testing.assert_array_equal(encoded.train.tokens, expected)
    known = encoder._known.words.to_pylist()
    assert len(known) == len(set(known)) <= most and max(map(len, known), default=0) <= longest


def test_words_are_left_whole_where_something_may_look_across_a_space(tokenizer_folder: Path) -> None:
    text = (tokenizer_folder / "tokenizer.json").read_text()

    def reads_word_by_word(change) -> bool:
        backend = tokenizers.Tokenizer.from_str(text)
        change(backend)
        return _encodes_word_by_word(json.loads(backend.to_str()))

    assert reads_word_by_word(lambda backend: None)
    for change in (
        lambda backend: setattr(backend, "normalizer", normalizers.Strip()),
        lambda backend: setattr(backend, "normalizer", normalizers.Replace("e f", "x")),
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.ByteLevel(use_regex=False)),
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.Digits()),
        lambda backend: setattr(backend.model, "dropout", 0.1),
        lambda backend: backend.add_tokens(["New York"]),
        lambda backend: backend.add_tokens([tokenizers.AddedToken("York", lstrip=True)]),
    ):
        assert not reads_word_by_word(change)


def test_the_share_is_met_on_average_and_keyed() -> None:
    texts = [f"document {number}" for number in range(20_000)]
    rule, other = SplitRule(0, DRAWS // 10), SplitRule(1, DRAWS // 10)
    drawn = [rule.is_held_out(text) for text in texts]
    assert abs(sum(drawn) - 2000) < 200
    assert sum(a and b for a, b in zip(drawn, map(other.is_held_out, texts), strict=True)) < 300


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
