"""Encode the texts of examples as tokens, so that every prompt has the ids that it has when a model is asked.

Templates of our own give parts. They are encoded separately, in training as in a chat, so no token contains characters
of both a prompt and a response. Most tokenizers encode a text in the same way at every position. Tokenizers of the
SentencePiece kind put a space before the first word of a text; there, every part but the first is encoded behind a line
end, whose ids are then removed.

A chat template gives, for each response, the whole text that asks for it. A model is asked with the ids of that text
encoded as a whole, so these are the ids before the response, whatever the tokenizer does at a border:

    ids(asked)          if ids(asked + response) begins with ids(asked), the rest of it is the response; otherwise a
    ids(asked+response) token lies across the border, which no model can generate, and the response is encoded alone
    ids(next asked)     if it begins with all ids so far, the example goes on with the next turn; otherwise, because
                        the template or the tokenizer writes the turn otherwise as history, the next turn begins an
                        example of its own

Texts grow from turn to turn, so encoding each as a whole would take a time that grows with the square of the turns.
They are cut before control tokens, where tokenizers cut them, too, and the pieces are kept. Each conversation's last
text is also encoded in one piece; at the first that differs, nothing is cut any more.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import tokenizers

from relora.data.finetuning.chat_template import Turn
from relora.data.finetuning.messages import MARK
from relora.data.finetuning.templates import Part

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass
class Encoded:
    """The ids of an example, in the order in which they are added."""

    ids: list[int] = field(default_factory=list)
    responses: list[tuple[int, int]] = field(default_factory=list)
    """(start, end) of each response that is scored, or of its scored pieces."""
    excluded: list[tuple[int, int]] = field(default_factory=list)
    """(start, end) of what is never scored: responses that say so, prompts that an earlier example has scored."""
    asked: int = 0
    """Number of ids before the last response."""

    def add_prompt(self, ids: Iterable[int]) -> None:
        """Append the ids of a prompt."""
        self.ids += ids
        self.asked = len(self.ids)

    def add_response(self, ids: Sequence[int], *, is_scored: bool) -> None:
        """Append the ids of a response."""
        span = (len(self.ids), len(self.ids) + len(ids))
        self.ids += ids
        (self.responses if is_scored else self.excluded).append(span)

    def scored(self, *, prompts: bool) -> npt.NDArray[np.bool_]:
        """Return which ids are scored, [ids]: those of responses; with `prompts`, also those of prompts."""
        scored = np.full(len(self.ids), prompts)
        for spans, value in ((self.responses, True), (self.excluded, False)):
            for start, end in spans:
                scored[start:end] = value
        return scored


class _Backend:
    """The tokenizer itself, without truncation and padding.

    Args:
        tokenizer: encodes the texts.
        control_tokens: whether control tokens in texts act as such.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", *, control_tokens: bool) -> None:
        self._backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = not control_tokens
        self._line_end = self.ids(["\n"])[0]
        self.is_position_independent = self.continuation_ids(["x"]) == self.ids(["x"])

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Return the tokenizer's ids of each text, without special tokens added."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def continuation_ids(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text as the continuation of another text.

        Each text is encoded behind a line end, whose ids are removed. If the line end forms one token with the
        beginning of the text, the text is encoded alone.
        """
        size = len(self._line_end)
        behind_line_end = self.ids([f"\n{text}" for text in texts])
        return [
            ids[size:] if ids[:size] == self._line_end else self.ids([text])[0]
            for text, ids in zip(texts, behind_line_end, strict=True)
        ]


class PartEncoder:
    """Encode the parts of examples: the first one as the beginning of a text, the others as its continuation.

    Control tokens in the parts are ordinary text.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        self._backend = _Backend(tokenizer, control_tokens=False)
        self._eos: int = tokenizer.eos_token_id
        self._opening = _opening(tokenizer)

    def encode(self, examples: Sequence[list[Part]]) -> list[Encoded]:
        """Return the ids of each example, including BOS where the tokenizer has it, and EOS."""
        texts = [part.text for parts in examples for part in parts]
        beginnings = set(np.cumsum([0, *map(len, examples)]).tolist())
        ids = iter(self._text_ids(texts, beginnings))
        encoded = []
        for parts in examples:
            example = Encoded(list(self._opening))
            for part in parts:
                if part.is_response:
                    example.asked = len(example.ids)
                    example.add_response([*next(ids), *([self._eos] if part.eos else [])], is_scored=part.is_scored)
                else:
                    example.add_prompt(next(ids))
            if parts[0].is_response:  # a completion, whose opening counts as part of it
                example.responses[0] = (0, example.responses[0][1])
            encoded.append(example)
        return encoded

    def _text_ids(self, texts: list[str], beginnings: set[int]) -> list[list[int]]:
        """Return the ids of each text, as the beginning of a text if its number is in `beginnings`."""
        if self._backend.is_position_independent:
            return self._backend.ids(texts)
        first = iter(self._backend.ids([text for number, text in enumerate(texts) if number in beginnings]))
        later = (text for number, text in enumerate(texts) if number not in beginnings)
        continued = iter(self._backend.continuation_ids(list(later)))
        return [next(first) if number in beginnings else next(continued) for number in range(len(texts))]


class ChatEncoder:
    """Encode what a chat template has written, in which control tokens act as such, and `MARK` splits texts."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        self._backend = _Backend(tokenizer, control_tokens=True)
        self._eos: int = tokenizer.eos_token_id
        # A token that takes in white space on its left, or looks at it, has to be seen with what stands there.
        borders = (
            token.content
            for token in tokenizer.added_tokens_decoder.values()
            if token.special and not (token.lstrip or token.single_word or token.normalized)
        )
        alternatives = "|".join(map(re.escape, sorted(borders, key=len, reverse=True)))
        self._border = re.compile(alternatives or "(?!)")
        self._kept: dict[tuple[str, bool], list[int]] = {}
        """Ids of pieces of text, by the text and whether it continues a word."""

    def encode(self, conversations: Sequence[Sequence[Turn]]) -> list[list[Encoded]]:
        """Return the examples of each conversation: one, or several where a turn is written otherwise as history."""
        self._check_borders([text for turns in conversations for text in list(_texts(turns[-1]))[-1:]])
        self._keep(text for turns in conversations for turn in turns for text in _texts(turn))
        encoded = [self._examples(turns) for turns in conversations]
        self._kept.clear()
        return encoded

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text, as `apply_chat_template` gives them."""
        self._check_borders([text])
        self._keep([text])
        ids = self._ids(text)
        self._kept.clear()
        return ids

    def _examples(self, turns: Sequence[Turn]) -> list[Encoded]:
        """Encode a conversation."""
        examples: list[Encoded] = []
        for number, turn in enumerate(turns):
            asked = self._ids(turn.asked)
            if examples and asked[: len(examples[-1].ids)] == examples[-1].ids:
                examples[-1].add_prompt(asked[len(examples[-1].ids) :])
            else:
                if examples:
                    self._end(examples[-1], turns[number - 1])
                examples.append(Encoded(asked, excluded=[(0, len(asked))] if examples else [], asked=len(asked)))
            text, example = turn.asked, examples[-1]
            for piece, is_scored in turn.pieces:
                ids = self._ids(text + piece)
                begins = ids[: len(example.ids)] == example.ids
                ids = ids[len(example.ids) :] if begins else self._backend.continuation_ids([piece])[0]
                example.add_response(ids, is_scored=is_scored)
                text += piece
        self._end(examples[-1], turns[-1])
        return [example for example in examples if example.responses]

    def _end(self, example: Encoded, last: Turn) -> None:
        """Append EOS to an example whose last response does not end with a control token."""
        if last.eos:
            example.add_response([self._eos], is_scored=last.pieces[-1][1])

    def _ids(self, text: str) -> list[int]:
        """Join the ids of the pieces of a text, which have been encoded by `_keep`."""
        return list(chain.from_iterable(self._kept[piece] for piece in self._pieces(text)))

    def _keep(self, texts: Iterable[str]) -> None:
        """Encode all pieces of texts that have not been encoded before."""
        new = list({piece: None for text in texts for piece in self._pieces(text) if piece not in self._kept})
        encoded = iter(self._backend.ids([text for text, continues in new if not continues]))
        continued = iter(self._backend.continuation_ids([text for text, continues in new if continues]))
        for piece in new:
            self._kept[piece] = next(continued if piece[1] else encoded)

    def _pieces(self, text: str) -> Iterator[tuple[str, bool]]:
        """Yield the pieces of a text that can be encoded alone, and for each whether it continues a word."""
        for number, part in enumerate(text.split(MARK)):
            cuts = [0, *(token.start() for token in self._border.finditer(part) if token.start()), len(part)]
            for start, end in pairwise(cuts):
                yield part[start:end], number > 0 and start == 0

    def _check_borders(self, texts: Sequence[str]) -> None:
        """Cut no texts any more if one of these has other ids in pieces than as a whole."""
        whole = [text for text in texts if MARK not in text]
        self._keep(whole)
        if any(self._ids(text) != ids for text, ids in zip(whole, self._backend.ids(whole), strict=True)):
            self._border = re.compile("(?!)")
            self._kept.clear()


def _texts(turn: Turn) -> Iterator[str]:
    """Yield all texts of a turn that are encoded: what is asked, and with it the pieces of the response in turn."""
    text = turn.asked
    yield text
    for piece, _ in turn.pieces:
        text += piece
        yield text


def _opening(tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    """Return the ids that a tokenizer puts before every text, such as LLaMA's BOS."""
    bare, whole = (tokenizer("x", add_special_tokens=special)["input_ids"] for special in (False, True))
    ends = (end for end in range(len(whole)) if whole[end : end + len(bare)] == bare)
    return list(whole[: next(ends, 0)])
