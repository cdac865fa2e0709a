"""The text of one generation while it is being generated: what is streamed, and what ends it.

A text is always decoded as a whole, prompt included, and the part that is new is passed on: decoded piece by piece, a
SentencePiece tokenizer would lose the space at the start of each piece. The price is that every streamed piece costs a
decoding of the whole text, so tokens are collected for STREAM_SECONDS before they are decoded and written. With stop
strings the last few tokens are also decoded after every single token, which is noticeable on a model that takes only a
millisecond per token.

A stop string ends the text where it begins, however it is split into tokens. The `stop_strings` of transformers are not
used, because they leave the stop string in the text, match one that began in the prompt, and go through the whole
vocabulary at their first use.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, StoppingCriteria

Write = Callable[[str], object]
"""Receives text piece by piece, for example to print it; its result is not used."""

STREAM_SECONDS = 0.05
"""Shortest time between two streamed pieces of text; updates that come faster cannot be read."""
_TOKENS_PER_CHAR = 4
"""The most tokens that one character takes: one that the vocabulary lacks is spelled as up to four bytes."""
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""The text that the first bytes of a character decode to as long as its last byte is missing."""


def possible_stop_chars(text: str, stop: Sequence[str]) -> int:
    """Count the characters at the end of `text` that may be the beginning of a stop string (the longest such end).

    A stop string that is complete does not count.
    """
    return max((size for each in stop for size in range(1, len(each)) if text.endswith(each[:size])), default=0)


class GrowingText(StoppingCriteria):  # type: ignore[misc]  # transformers has no types
    """The text of one generation while it is being generated.

    As a stopping criterion, transformers calls it after every token: it streams the text to `write`, and ends the
    generation at a stop string or when `asked_to_end` says so. `close` returns the finished text. The attribute
    `prompt` is the text of the prompt, which is not streamed.

    Args:
        prompt: token ids of the prompt.
        stop: strings that end the text; they are searched for after the prompt only.
        write: receives the text in pieces.
        asked_to_end: called after every token; the text ends as soon as it returns true.
        stream_seconds: shortest time between two pieces.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        prompt: list[int],
        stop: Sequence[str] = (),
        write: Write | None = None,
        asked_to_end: Callable[[], bool] | None = None,
        *,
        stream_seconds: float = STREAM_SECONDS,
    ) -> None:
        self._tokenizer, self._stop, self._write, self._asked_to_end = tokenizer, stop, write, asked_to_end
        self._stream_seconds = stream_seconds
        self._ids = list(prompt)
        self._prompt_tokens = len(prompt)
        self.prompt = self._decode(self._ids)
        self._stopped = False
        self._written_chars, self._written_at = 0, 0.0
        longest = max(map(len, stop), default=0)
        self._stop_tokens = 1 + _TOKENS_PER_CHAR * longest  # a stop string that has just ended lies within so many

    @property
    def is_needed(self) -> bool:
        """Whether anything has to be done before the generation is over; if not, transformers need not call this."""
        return bool(self._stop) or self._write is not None or self._asked_to_end is not None

    def __call__(self, input_ids: Tensor, scores: object, **others: object) -> Tensor:
        """Return `ends` of `input_ids`, [1, length], as transformers wants it: a boolean tensor of shape [1]."""
        return torch.full((1,), self.ends(input_ids[0]), device=input_ids.device)

    def ends(self, ids: Tensor) -> bool:
        """Take in the newest token and return whether the text ends with it.

        Args:
            ids: [length], the tokens of the prompt and all generated tokens.
        """
        self._ids += ids[len(self._ids) :].tolist()
        is_due = self._write is not None and time.monotonic() - self._written_at >= self._stream_seconds
        if is_due or self._may_hold_stop():
            self._update(final=False)
        return self._stopped or (self._asked_to_end is not None and self._asked_to_end())

    def close(self, ids: list[int]) -> str:
        """Finish the generated text and return it, without the prompt; what was held back so far is written.

        Args:
            ids: the tokens of the prompt and all generated tokens.
        """
        self._ids = ids
        return self._update(final=True)

    def _may_hold_stop(self) -> bool:
        """Tell whether the last tokens may contain a stop string: if so, the whole text is decoded and searched.

        The tokens that are decoded here reach back to at most one before the first generated token. That one belongs to
        them because a decoder may strip the space that a text begins with; so a stop string that began in the prompt
        is found here, too, and dismissed by the search.
        """
        if not self._stop:
            return False
        first = max(self._prompt_tokens - 1, len(self._ids) - self._stop_tokens - 1, 0)
        tail = self._decode(self._ids[first:])
        return any(each in tail for each in self._stop)

    def _update(self, *, final: bool) -> str:
        """Decode the generated text, cut it at the first stop string, write what is certain and new, and return all.

        Unless `final`, an incomplete character and a possible beginning of a stop string at the end are held back.
        """
        text = self._decode(self._ids)[len(self.prompt) :]
        stops = [start for each in self._stop if (start := text.find(each)) >= 0]
        if stops:
            self._stopped = True
            text = text[: min(stops)]
        elif not final:
            text = text.rstrip(_INCOMPLETE)
            text = text[: len(text) - possible_stop_chars(text, self._stop)]
        if self._write is not None and len(text) > self._written_chars:
            self._write(text[self._written_chars :])
            self._written_chars = len(text)
        self._written_at = time.monotonic()
        return text

    def _decode(self, ids: list[int]) -> str:
        """Return the text of tokens, without special tokens."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


class InOrder:
    """Writes texts that grow at the same time one after another, each with a line end after it.

    Args:
        write: receives the pieces; None writes nothing.
    """

    def __init__(self, write: Write | None) -> None:
        self._write = write
        self._current = 0
        self._waiting: dict[int, str] = {}
        self._ended: set[int] = set()

    def of(self, row: int) -> Write:
        """Return what takes the pieces of a text."""
        return partial(self._take, row)

    def end(self, row: int) -> None:
        """Note that a text has ended; the next ones have their turn as far as all before them have ended."""
        self._ended.add(row)
        while self._current in self._ended:
            self._take(self._current, "\n")
            self._current += 1
            if piece := self._waiting.pop(self._current, ""):
                self._take(self._current, piece)

    def _take(self, row: int, piece: str) -> None:
        if row != self._current:
            self._waiting[row] = self._waiting.get(row, "") + piece
        elif self._write is not None:
            self._write(piece)
