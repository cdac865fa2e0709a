"""Conversion of a tokenizer into the keys of a GGUF file; refused if llama.cpp would tokenize text in another way.

llama.cpp has three tokenizers that matter here (its src/llama-vocab.cpp), each with keys of its own:

    gpt2    byte-level BPE: merges by rank within words; the split into words is one of a fixed list, given by its name
    llama   SentencePiece BPE: of all pairs of neighbours that form a token, the pair of the highest score is joined
            first; text that no token covers becomes bytes
    t5      SentencePiece unigram: the sequence of tokens with the highest sum of scores

A tokenizer.json can express more than these keys: other normalizers, splits and options. What has no counterpart is
refused, because a model that receives other tokens than those it was trained on answers worse without any visible
error. Of SentencePiece BPE, the ranks of the merges become scores, after a check that both give the same tokens.

BOS is put in front of a text if the tokenizer does so. EOS is never appended, although T5's tokenizer does so, since a
model does not continue a prompt that ends its document.

The price: text that is not in Unicode's NFC gets other tokens if the tokenizer normalises it first (GPT-NeoX, Qwen; a
warning says so), and so does text that begins with a space if the tokenizer adds a space only to text that has none.
"""

import base64
import json
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from relora.errors import UserError
from relora.messages import short_repr

Value = str | bool | int | float | bytes | list[str] | list[int] | list[float]
"""Type of a key's value in a GGUF file; `bytes` is an array of uint8."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""GGUF's types of tokens. Control tokens are never found in a text; user-defined ones are found before all others."""

_BYTE = re.compile("<0x[0-9A-F]{2}>")
"""Text of a token that stands for one byte."""
_UNUSED_SCORE = -10000.0
"""Score of ids without a token in the unigram model."""

_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGIT = r"\p{N}"
_SPLITS = {
    ((_GPT2_WORDS,), False): "gpt-2",
    ((_DIGIT, _GPT2_WORDS), False): "smollm",
    ((_LLAMA3_WORDS.replace("{1,3}", ""),), False): "qwen2",
    ((_LLAMA3_WORDS,), True): "llama-bpe",
}
"""llama.cpp's names of the splits of text into words, by (regular expressions, whether a word that is a token as a
whole is never split by merges)."""

_log = logging.getLogger(__name__)


def vocabulary(tokenizer: PreTrainedTokenizerFast, rows: int, ends: Sequence[int] = ()) -> dict[str, Value]:
    """Return the keys `tokenizer.*` of a GGUF file.

    Args:
        rows: number of rows of the model's embedding; ids without a token get a name of their own.
        ends: ids at which the model's generation settings end a text, beside the tokenizer's EOS.

    Raises:
        UserError: llama.cpp cannot tokenize as this tokenizer does, or the tokenizer has ids that the model lacks.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    if model["type"] == "Unigram":
        keys = _unigram(backend, rows)
    elif model["type"] == "BPE" and any(step["type"] == "ByteLevel" for step in _steps(backend["pre_tokenizer"])):
        keys = _byte_level(backend, rows)
    elif model["type"] == "BPE" and model["byte_fallback"]:
        keys = _sentencepiece(backend, rows)
    else:
        raise UserError(
            f"tokenizer: llama.cpp has none of the kind {short_repr(model['type'])} as it is set up here; it has "
            "byte-level BPE, SentencePiece BPE that falls back to bytes, and SentencePiece unigram"
        )
    assert isinstance(keys["tokens"], list)
    twice, times = Counter(keys["tokens"]).most_common(1)[0]
    if times > 1:
        raise UserError(f"tokenizer: {short_repr(twice)} would stand for two ids, which llama.cpp does not open")
    keys = {**_special_tokens(tokenizer), **_further_ends(tokenizer.eos_token_id, ends, rows), **keys}
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()} | _chat_templates(tokenizer)


def _further_ends(eos: int, ends: Sequence[int], rows: int) -> dict[str, Value]:
    """Return the keys of end tokens beside EOS: llama.cpp ends a text at EOT and EOM, too, and has no more."""
    further = [end for end in dict.fromkeys(ends) if end != eos and 0 <= end < rows]
    names = ("eot_token_id", "eom_token_id")
    if left := further[len(names) :]:
        _log.warning("warning: a GGUF file has room for three end tokens; left out: %s", ", ".join(map(str, left)))
    return dict(zip(names, further, strict=False))


def _chat_templates(tokenizer: PreTrainedTokenizerFast) -> dict[str, Value]:
    """Return the keys of the chat templates: the default one, and others by their names."""
    template = tokenizer.chat_template
    if not template:
        return {}
    if isinstance(template, str):
        return {"tokenizer.chat_template": template}
    named = {name: source for name, source in template.items() if name != "default"}
    keys: dict[str, Value] = {f"tokenizer.chat_template.{_key_part(name)}": each for name, each in named.items()}
    if named:
        keys["tokenizer.chat_templates"] = [_key_part(name) for name in named]
    if "default" in template:
        return {**keys, "tokenizer.chat_template": template["default"]}
    _log.warning(
        "warning: the tokenizer has no default chat template, only %s; llama.cpp asks for a name", ", ".join(named)
    )
    return keys


def _key_part(name: str) -> str:
    """Return the name of a chat template as a part of a key, as llama.cpp's own converter writes it."""
    return re.sub(r"[^A-Za-z0-9]", "_", name)


def _special_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, Value]:
    """Return the keys for BOS, EOS, unknown and padding tokens, and whether BOS and EOS are added to a text.

    Raises:
        UserError: the tokenizer puts something other than one BOS in front of a text.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    plain = tokenizer("a", add_special_tokens=False).input_ids
    ids = tokenizer("a").input_ids
    first_plain = next((start for start in range(len(ids)) if ids[start : start + len(plain)] == plain), 0)
    front = ids[:first_plain]
    if front not in ([], [bos]):
        raise UserError(
            f"tokenizer: begins a text with {short_repr(front)}; llama.cpp can put one BOS there and no more"
        )
    # llama.cpp has defaults for missing ids, and its default for BOS may be an ordinary word here
    keys: dict[str, Value] = {
        "bos_token_id": eos if bos is None else bos,
        "eos_token_id": eos,
        "add_bos_token": bool(front),
        "add_eos_token": False,
    }
    others = {"unknown_token_id": tokenizer.unk_token_id, "padding_token_id": tokenizer.pad_token_id}
    return keys | {key: number for key, number in others.items() if number is not None}


def _byte_level(backend: Mapping[str, Any], rows: int) -> dict[str, Value]:
    """Return the keys of a byte-level BPE tokenizer; `backend` is its tokenizer.json."""
    model = backend["model"]
    split = _SPLITS.get((_words(backend["pre_tokenizer"]), bool(model["ignore_merges"])))
    if split is None:
        raise UserError(
            f"tokenizer: llama.cpp does not split text into words as it does ({short_repr(backend['pre_tokenizer'])}); "
            f"of what llama.cpp knows, {', '.join(sorted(_SPLITS.values()))} can be written"
        )
    normalizers = [step["type"] for step in _steps(backend["normalizer"])]
    if normalizers not in ([], ["NFC"]):
        raise UserError(f"tokenizer: llama.cpp has no normalizer {short_repr(normalizers)} before byte-level BPE")
    if normalizers:
        _log.warning("warning: llama.cpp does not bring text into NFC, as the tokenizer does; give it composed text")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model[option]:
            raise UserError(
                f"tokenizer: llama.cpp's byte-level BPE has no {option}, which is {short_repr(model[option])}"
            )
    if not model["merges"]:
        raise UserError("tokenizer: it has no merges, and llama.cpp opens no byte-level BPE without")
    texts, kinds = _tokens({number: text for text, number in model["vocab"].items()}, backend, rows)
    merges = [" ".join(pair) for pair in model["merges"]]
    return {"model": "gpt2", "pre": split, "tokens": texts, "token_type": kinds, "merges": merges}


def _words(pre_tokenizer: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Return the regular expressions by which a pre-tokenizer splits text, in order.

    A step of another kind is represented by the name of its type, which is in no split of llama.cpp.
    """
    found: list[str] = []
    for step in _steps(pre_tokenizer):
        match step:
            case {"type": "ByteLevel", "add_prefix_space": False}:
                if step.get("use_regex", True):
                    found.append(_GPT2_WORDS)
            case {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}:
                found.append(expression)
            case {"type": "Digits", "individual_digits": True}:
                found.append(_DIGIT)
            case _:
                found.append(step["type"])
    return tuple(found)


def _sentencepiece(backend: Mapping[str, Any], rows: int) -> dict[str, Value]:
    """Return the keys of a SentencePiece BPE tokenizer; `backend` is its tokenizer.json."""
    model = backend["model"]
    texts, kinds = _tokens({number: text for text, number in model["vocab"].items()}, backend, rows)
    for number, text in enumerate(texts):
        if _BYTE.fullmatch(text):
            kinds[number] = BYTE
        elif text == model["unk_token"]:
            kinds[number] = UNKNOWN
    if kinds.count(BYTE) < 256:
        raise UserError("tokenizer: it falls back to bytes and has not all of them, which llama.cpp needs")
    normal = {text for text, kind in zip(texts, kinds, strict=True) if kind == NORMAL}
    ranks = _token_ranks([(left, right) for left, right in model["merges"]], normal)
    return {
        "model": "llama",
        "pre": "default",
        "tokens": texts,
        "token_type": kinds,
        "scores": [-float(ranks.get(text, len(model["merges"]))) for text in texts],
        "add_space_prefix": _space_prefix(backend),
    }


def _space_prefix(backend: Mapping[str, Any]) -> bool:
    """Tell whether a SentencePiece BPE tokenizer puts a space in front of a text.

    Raises:
        UserError: it changes or splits the text in another way than to write its spaces as `▁`.
    """
    match [*_steps(backend["normalizer"]), *_steps(backend["pre_tokenizer"])]:
        case [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]:
            return True
        case [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]:
            return False
        case [{"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}]:
            return bool(scheme != "never")
        case steps:
            names = [step["type"] for step in steps]
            raise UserError(f"tokenizer: llama.cpp has no counterpart of {short_repr(names)} before SentencePiece BPE")


def _token_ranks(merges: Sequence[tuple[str, str]], normal: set[str]) -> dict[str, int]:
    """Return the rank of the first merge that forms each token.

    llama.cpp joins neighbours by the rank of the token that they form, a tokenizer.json by the rank of the merge. Both
    give the same tokens if all merges that form a token follow one another, and if every pair of tokens that forms a
    token is a merge. Tokenizers converted from SentencePiece satisfy this.

    Args:
        normal: texts of the normal tokens.

    Raises:
        UserError: the merges do not satisfy this.
    """
    ranks: dict[str, int] = {}
    previous = None
    for rank, (left, right) in enumerate(merges):
        joined = left + right
        if ranks.setdefault(joined, rank) != rank and joined != previous:
            raise UserError(
                f"tokenizer: its merges into {short_repr(joined)} are not ordered as SentencePiece orders them"
            )
        previous = joined
    pairs = set(merges)
    for text in normal:
        for cut in range(1, len(text)):
            pair = text[:cut], text[cut:]
            if pair not in pairs and pair[0] in normal and pair[1] in normal:
                raise UserError(
                    f"tokenizer: llama.cpp would join {short_repr(pair[0])} and {short_repr(pair[1])}, which have no "
                    "merge; it was not converted from a SentencePiece model"
                )
    return ranks


def _unigram(backend: Mapping[str, Any], rows: int) -> dict[str, Value]:
    """Return the keys of a SentencePiece unigram tokenizer; `backend` is its tokenizer.json."""
    model = backend["model"]
    if model["byte_fallback"] or model["unk_id"] is None:
        raise UserError("tokenizer: llama.cpp's unigram model has an unknown token where this one has bytes")
    prefix, one_space, charsmap = None, False, b""
    for step in (*_steps(backend["normalizer"]), *_steps(backend["pre_tokenizer"])):
        match step:
            case {"type": "Precompiled", "precompiled_charsmap": text}:
                charsmap = base64.b64decode(text)
            case {"type": "Replace", "pattern": {"Regex": " {2,}"}} | {"type": "WhitespaceSplit"}:
                one_space = True
            case {"type": "Strip"}:
                pass  # llama.cpp also drops spaces at the ends of a text if it joins several spaces into one
            case {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme}:
                prefix = scheme != "never"
            case _:
                raise UserError(f"tokenizer: llama.cpp has no counterpart of {short_repr(step['type'])} before unigram")
    if prefix is None:
        raise UserError("tokenizer: llama.cpp's unigram model spells spaces as SentencePiece does, which this does not")
    scores = dict(enumerate(score for _, score in model["vocab"]))
    texts, kinds = _tokens(dict(enumerate(text for text, _ in model["vocab"])), backend, rows)
    kinds[model["unk_id"]] = UNKNOWN
    keys: dict[str, Value] = {
        "model": "t5",
        "pre": "default",
        "tokens": texts,
        "token_type": kinds,
        "scores": [scores.get(number, _UNUSED_SCORE) for number in range(rows)],
        "unknown_token_id": model["unk_id"],
        "add_space_prefix": prefix,
        "remove_extra_whitespaces": one_space,
    }
    return {**keys, "precompiled_charsmap": charsmap} if charsmap else keys


def _tokens(vocabulary: Mapping[int, str], backend: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """List the text and the GGUF type of every id from 0 to `rows` - 1.

    Args:
        vocabulary: texts of the model's tokens by id, without the added ones.
        backend: the tokenizer.json, with the added tokens.

    Raises:
        UserError: the tokenizer has an id of `rows` or more.
    """
    added = {token["id"]: token for token in backend["added_tokens"]}
    largest = max([*vocabulary, *added])
    if largest >= rows:
        raise UserError(f"the tokenizer has id {largest:,} but the model has {rows:,} ids; they do not belong together")
    texts, kinds = [], []
    for number in range(rows):
        if number in added:
            special = added[number]["special"]
            text = added[number]["content"]
            # user-defined tokens are searched for in the original text, before spaces are written as `▁`
            texts.append(text if special else text.replace("▁", " "))
            kinds.append(CONTROL if special else USER_DEFINED)
        else:
            texts.append(vocabulary.get(number, f"[PAD{number}]"))
            kinds.append(NORMAL if number in vocabulary else UNUSED)
    return texts, kinds


def _steps(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer as a flat list; empty if there is none."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for inner in part.get("normalizers") or part.get("pretokenizers") or () for step in _steps(inner)]
