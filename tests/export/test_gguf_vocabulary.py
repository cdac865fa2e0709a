"""llama.cpp's SentencePiece algorithms, written out here, tokenize with the written keys as the tokenizer does."""

import json
import math
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tests.model.test_load import DATA, STORIES, needs_data
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from relora.data.tokenizer import load_tokenizer
from relora.errors import UserError
from relora.export.gguf_vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, vocabulary

TOKENIZERS = DATA / "tokenizers"
TEXTS = (
    "Once upon a time, there was a little girl named Lily.",
    "It's 2024: they'll pay $1,234.50 (or 99%)!",
    "naïve café, Straße, 東京タワー, привет 🙂🙂",
    "def f(x):\n    return x  # two  spaces\n\n\tand a tab",
    " a space in front, and at the end ",
    "x",
)

Keys = dict[str, Any]


def keys_of(tokenizer: PreTrainedTokenizerFast, more: int = 0) -> Keys:
    found = vocabulary(tokenizer, len(tokenizer) + more)
    return {key.removeprefix("tokenizer.").removeprefix("ggml."): value for key, value in found.items()}


def by_scores(keys: Keys, text: str) -> list[int]:
    """SentencePiece BPE as in llama.cpp: join the pair of the highest score, the leftmost of equals first."""
    ids = {token: number for number, token in enumerate(keys["tokens"])}
    symbols = list((" " * keys["add_space_prefix"] + text).replace(" ", "▁"))
    while True:
        pairs = ((ids.get(left + right), at) for at, (left, right) in enumerate(pairwise(symbols)))
        joinable = [(keys["scores"][number], -at) for number, at in pairs if number is not None]
        if not joinable:
            break
        at = -max(joinable)[1]
        symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
    found: list[int] = []
    for symbol in symbols:
        found += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return found


def by_best_sum(keys: Keys, text: str) -> list[int]:
    """SentencePiece unigram as in llama.cpp, for a text that the character map does not change."""
    if keys["remove_extra_whitespaces"]:
        text = " ".join(part for part in text.split(" ") if part)
    text = ("▁" * keys["add_space_prefix"] + text).replace(" ", "▁")
    usable = zip(keys["tokens"], keys["scores"], keys["token_type"], strict=True)
    ids = {token: (score, number) for number, (token, score, kind) in enumerate(usable) if kind in (NORMAL, UNUSED)}
    normal = [score for score, kind in zip(keys["scores"], keys["token_type"], strict=True) if kind == NORMAL]
    unknown = min(normal) - 10
    best: list[tuple[float, int, int]] = [(0.0, 0, 0)]
    for end in range(1, len(text) + 1):
        ways = [
            (best[start][0] + ids[text[start:end]][0], start, ids[text[start:end]][1])
            for start in range(max(0, end - 40), end)
            if text[start:end] in ids
        ]
        if text[end - 1 : end] not in ids:
            ways.append((best[end - 1][0] + unknown, end - 1, keys["unknown_token_id"]))
        best.append(max(ways, default=(-math.inf, end - 1, keys["unknown_token_id"])))
    found: list[int] = []
    at = len(text)
    while at:
        _, start, number = best[at]
        if not (found and number == found[-1] == keys["unknown_token_id"]):
            found.append(number)
        at = start
    return found[::-1]


# SentencePiece


@needs_data
@pytest.mark.parametrize("folder", [STORIES, TOKENIZERS / "mistral-v1-32k"], ids=lambda path: path.name)
def test_sentencepiece_bpe(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    keys = keys_of(tokenizer)
    assert keys["model"] == "llama" and keys["add_space_prefix"] is True
    assert (keys["bos_token_id"], keys["eos_token_id"], keys["unknown_token_id"]) == (1, 2, 0)
    assert keys["add_bos_token"] is True and keys["add_eos_token"] is False and "padding_token_id" not in keys
    assert keys["token_type"].count(BYTE) == 256 and keys["token_type"][:3] == [UNKNOWN, CONTROL, CONTROL]
    for text in TEXTS:
        assert by_scores(keys, text) == tokenizer(text, add_special_tokens=False).input_ids, text


@needs_data
def test_sentencepiece_unigram() -> None:
    tokenizer = load_tokenizer(str(TOKENIZERS / "t5-base"))
    keys = keys_of(tokenizer, more=28)
    assert keys["model"] == "t5" and keys["add_space_prefix"] is keys["remove_extra_whitespaces"] is True
    assert (keys["bos_token_id"], keys["eos_token_id"], keys["unknown_token_id"]) == (1, 1, 2)
    assert keys["padding_token_id"] == 0
    assert keys["add_bos_token"] is keys["add_eos_token"] is False  # the tokenizer puts EOS behind every text
    assert keys["token_type"][:4] == [CONTROL, CONTROL, UNKNOWN, NORMAL] and keys["tokens"][32099] == "<extra_id_0>"
    assert keys["tokens"][-1] == "[PAD32127]" and keys["token_type"][-1] == UNUSED and keys["scores"][-1] < -1000
    assert isinstance(keys["precompiled_charsmap"], bytes) and len(keys["precompiled_charsmap"]) > 100_000
    for text in (*TEXTS[:2], "naïve café", "two  spaces  ", " one in front", "日本 an unknown 日 one"):
        assert by_best_sum(keys, text) == tokenizer(text, add_special_tokens=False).input_ids, text


# Byte-level BPE


@needs_data
@pytest.mark.parametrize("name", ["gpt2", "corpus-bpe-4k", "pythia-gpt-neox-20b"])
def test_byte_level_bpe(name: str, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = load_tokenizer(str(TOKENIZERS / name))
    keys = keys_of(tokenizer)
    assert (keys["model"], keys["pre"]) == ("gpt2", "gpt-2")
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    assert [tuple(pair.split(" ")) for pair in keys["merges"]] == [tuple(pair) for pair in backend["model"]["merges"]]
    assert keys["tokens"][tokenizer.eos_token_id] == tokenizer.eos_token == "<|endoftext|>"
    assert keys["token_type"][tokenizer.eos_token_id] == CONTROL
    assert ("NFC" in caplog.text) == (name == "pythia-gpt-neox-20b")
    if name == "pythia-gpt-neox-20b":
        assert keys["tokens"][50254] == " " * 24 and keys["token_type"][50254] == USER_DEFINED
    assert len(keys["tokens"]) == len(tokenizer)


def byte_level(**changes: Any) -> PreTrainedTokenizerFast:
    """A GPT-2 tokenizer of two letters and their merge, with the given changes."""
    vocabulary = {"a": 0, "b": 1, "ab": 2, "<eos>": 3}
    options = {"vocab": vocabulary, "merges": [("a", "b")]} | changes.pop("model", {})
    backend = Tokenizer(models.BPE(**options))
    backend.pre_tokenizer = changes.pop("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False))
    backend.decoder = decoders.ByteLevel()
    if "normalizer" in changes:
        backend.normalizer = changes.pop("normalizer")
    if "post_processor" in changes:
        backend.post_processor = changes.pop("post_processor")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", **changes)


def words(expression: str) -> pre_tokenizers.PreTokenizer:
    from tokenizers import Regex

    split = pre_tokenizers.Split(Regex(expression), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def test_how_words_are_split_is_known_by_name() -> None:
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2

    digits = pre_tokenizers.Digits(individual_digits=True)
    smollm = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    llama3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
    assert keys_of(byte_level())["pre"] == "gpt-2"
    assert keys_of(byte_level(pre_tokenizer=smollm))["pre"] == "smollm"
    assert keys_of(byte_level(pre_tokenizer=words(QWEN2)))["pre"] == "qwen2"
    assert keys_of(byte_level(pre_tokenizer=words(llama3), model={"ignore_merges": True}))["pre"] == "llama-bpe"


def bos_in_front() -> processors.PostProcessor:
    return processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=[("<bos>", 4), ("<eos>", 3)])


def test_bos_goes_where_the_tokenizer_puts_it_and_eos_never() -> None:
    tokenizer = byte_level(bos_token="<bos>", post_processor=bos_in_front())
    assert tokenizer("a").input_ids == [4, 0, 3]
    keys = keys_of(tokenizer)
    assert keys["add_bos_token"] is True and keys["bos_token_id"] == 4 and keys["add_eos_token"] is False
    assert keys_of(byte_level(bos_token="<bos>"))["add_bos_token"] is False
    assert keys_of(byte_level())["bos_token_id"] == 3


def test_chat_templates_and_added_tokens() -> None:
    tokenizer = byte_level(chat_template={"default": "plain", "tools": "other"})
    tokenizer.add_tokens(["<think>"])
    keys = keys_of(tokenizer)
    assert keys["chat_template"] == "plain"
    assert keys["tokens"] == ["a", "b", "ab", "<eos>", "<think>"]
    assert keys["token_type"] == [NORMAL, NORMAL, NORMAL, CONTROL, USER_DEFINED]
    assert "chat_template" not in keys_of(byte_level())


def test_every_chat_template_goes_along_under_its_name(caplog: pytest.LogCaptureFixture) -> None:
    keys = keys_of(byte_level(chat_template={"default": "plain", "tool-use": "other"}))
    assert (keys["chat_template"], keys["chat_template.tool_use"]) == ("plain", "other")
    assert keys["chat_templates"] == ["tool_use"] and not caplog.records
    keys = keys_of(byte_level(chat_template={"rag": "other"}))
    assert keys["chat_template.rag"] == "other" and "chat_template" not in keys
    assert "no default chat template, only rag" in caplog.text


def test_end_tokens_beside_eos(caplog: pytest.LogCaptureFixture) -> None:
    """Ids that end a text by the generation settings end it in llama.cpp, too; a fourth one is named."""
    tokenizer = byte_level()  # its EOS is 3
    assert vocabulary(tokenizer, 4)["tokenizer.ggml.eos_token_id"] == 3
    assert "tokenizer.ggml.eot_token_id" not in vocabulary(tokenizer, 4, [3, 99])
    keys = vocabulary(tokenizer, 4, [3, 1, 0])
    assert (keys["tokenizer.ggml.eot_token_id"], keys["tokenizer.ggml.eom_token_id"]) == (1, 0) and not caplog.records
    assert vocabulary(tokenizer, 4, [1, 0, 2])["tokenizer.ggml.eom_token_id"] == 0
    assert "left out: 2" in caplog.text


# What is refused


def sentencepiece(merges: list[tuple[str, str]], **changes: Any) -> PreTrainedTokenizerFast:
    tokens = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "t", "h", "e", "th", "he", "the"]
    model = models.BPE(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=merges,
        unk_token="<unk>",
        byte_fallback=True,
    )
    backend = Tokenizer(model)
    backend.normalizer = changes.pop("normalizer", normalizers.Replace(" ", "▁"))
    backend.pre_tokenizer = changes.pop("pre_tokenizer", None)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


WHOLE = [("t", "h"), ("h", "e"), ("t", "he"), ("th", "e")]


def test_merges_that_are_sentencepieces() -> None:
    keys = keys_of(sentencepiece(WHOLE))
    assert [keys["scores"][keys["tokens"].index(token)] for token in ("th", "he", "the", "t")] == [
        0.0,
        -1.0,
        -2.0,
        -4.0,
    ]
    assert keys["add_space_prefix"] is False
    spelt = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    assert keys_of(sentencepiece(WHOLE, normalizer=None, pre_tokenizer=spelt))["add_space_prefix"] is True


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: sentencepiece(WHOLE[:3]), "would join 'th' and 'e'"),
        (lambda: sentencepiece([WHOLE[0], WHOLE[2], WHOLE[1], WHOLE[3]]), "merges into 'the' are not ordered"),
        (lambda: sentencepiece(WHOLE, normalizer=normalizers.NFKC()), "no counterpart of .*NFKC"),
        (lambda: byte_level(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)), "split text into words"),
        (lambda: byte_level(pre_tokenizer=words(r"\w+")), "split text into words"),
        (lambda: byte_level(model={"ignore_merges": True}), "split text into words"),
        (lambda: byte_level(normalizer=normalizers.Lowercase()), "no normalizer .*Lowercase"),
        (lambda: byte_level(model={"end_of_word_suffix": "</w>"}), "no end_of_word_suffix"),
        (lambda: byte_level(model={"merges": []}), "no merges"),
        (lambda: byte_level(pre_tokenizer=pre_tokenizers.Whitespace()), "none of the kind 'BPE'"),
        (
            lambda: byte_level(
                post_processor=processors.TemplateProcessing(single="b $A", special_tokens=[("b", 1)]), bos_token="a"
            ),
            "begins a text with",
        ),
    ],
)
def test_what_llama_cpp_does_otherwise(make: Callable[[], PreTrainedTokenizerFast], match: str) -> None:
    with pytest.raises(UserError, match=match) as refusal:
        keys_of(make())
    assert "\n" not in str(refusal.value) and str(refusal.value).startswith("tokenizer: ")


def test_other_kinds_of_tokenizers() -> None:
    pieces = models.WordPiece(vocab={"a": 0, "[UNK]": 1}, unk_token="[UNK]")
    with pytest.raises(UserError, match="none of the kind 'WordPiece'"):
        keys_of(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(pieces), eos_token="a", unk_token="[UNK]"))
    with_bytes = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0, byte_fallback=True))
    with pytest.raises(UserError, match="unknown token where this one"):
        keys_of(PreTrainedTokenizerFast(tokenizer_object=with_bytes, eos_token="a"))
    bare = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    with pytest.raises(UserError, match="spells spaces"):
        keys_of(PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="a"))


def test_ids_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="id 3 but the model has 3 ids"):
        keys_of(byte_level(), more=-1)
    tokenizer = byte_level()
    tokenizer.add_tokens(["[PAD6]"])
    with pytest.raises(UserError, match=re.escape("'[PAD6]' would stand for two ids")):
        keys_of(tokenizer, more=2)
