"""Continue one prompt with a model: token by token, streamed, up to an end token or a stop string.

transformers chooses the tokens (`generate`). This module decides what text they stand for, in one place for what is
streamed, what ends the text and what is returned.

A text is always decoded as a whole, prompt included, and the part that is new is passed on: decoded piece by piece, a
SentencePiece tokenizer would lose the space at the start of each piece. The price is that every streamed piece costs a
decoding of the whole text, so tokens are collected for STREAM_SECONDS before they are decoded and written. With stop
strings the last few tokens are also decoded after every single token, which is noticeable on a model that takes only a
millisecond per token.

A stop string ends the text where it begins, however it is split into tokens. The `stop_strings` of transformers are not
used, because they leave the stop string in the text, match one that began in the prompt, and go through the whole
vocabulary at their first use. A stop string that is a special token of the tokenizer never appears in decoded text, so
it ends the text by its token id.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast, StoppingCriteria

from relora.errors import UserError
from relora.measure import evaluating
from relora.messages import first_line
from relora.model.load import quiet_transformers
from relora.seeding import keyed_seed

Write = Callable[[str], object]
"""Receives text piece by piece, for example to print it; its result is not used."""

STREAM_SECONDS = 0.05
"""Shortest time between two streamed pieces of text; updates that come faster cannot be read."""
_TOKENS_PER_CHAR = 4
"""The most tokens that one character takes: one that the vocabulary lacks is spelled as up to four bytes."""
_TRIED_TOKENS = 2
"""Length of the prompt, and of its continuation, with which a model's cache is tried."""
_CACHES: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
"""Models that have generated -> whether with a cache."""
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""The text that the first bytes of a character decode to as long as its last byte is missing."""


@dataclass(frozen=True)
class Sampling:
    """Settings by which the next token is chosen, under the names that `transformers.GenerationConfig` gives them.

    Raises:
        UserError: a setting is out of its range.
    """

    max_new_tokens: int = 200
    temperature: float = 0.8
    """0 selects greedy decoding, as does `do_sample=False`."""
    top_p: float = 0.95
    top_k: int = 0
    """0 sets no limit."""
    do_sample: bool = True
    repetition_penalty: float = 1.0
    """1 applies no penalty."""

    def __post_init__(self) -> None:
        for name, is_valid, requirement in (
            ("max_new_tokens", self.max_new_tokens > 0, "above 0"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (no limit) or more"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0 (1 is none)"),
        ):
            if not is_valid:
                raise UserError(f"{name} is {getattr(self, name)}; it must be {requirement}")


@dataclass(frozen=True)
class Continuation:
    """The text that a model generated after one prompt."""

    prompt: str
    """The prompt, decoded from its token ids, without special tokens."""
    text: str
    """The generated text, without the stop string that ended it."""
    tokens: int
    """Number of generated tokens, including those of an end token or a stop string."""
    seconds: float
    """Time for the whole call: set-up, generation and decoding."""


def check_stop(stop: Sequence[str]) -> None:
    """Raise `UserError` if a stop string is empty: it would end every text before its first token."""
    if "" in stop:
        raise UserError("stop: a stop string is empty; give the text that ends an answer, or leave it out")


def continue_prompt(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    ids: list[int],
    sampling: Sampling,
    seed: int,
    write: Write | None = None,
    *,
    echo: bool = True,
    stop: Sequence[str] = (),
    asked_to_end: Callable[[], bool] | None = None,
    trains_afterwards: bool = False,
) -> Continuation:
    """Continue one prompt. The same seed gives the same text after the same prompt.

    The model's mode, its generation settings and the global random streams are as before when this returns.

    Args:
        ids: token ids of the prompt.
        seed: key of the random draws, together with `ids`.
        write: receives the text in pieces as it is generated. A piece that may be the beginning of a stop string is
            held back until that is decided.
        echo: also give `write` the prompt, before the first token is generated.
        stop: strings that end the text; none may be empty (see `check_stop`).
        asked_to_end: called after every token; the text ends as soon as it returns true.
        trains_afterwards: whether the model is trained after this call. If it is not, the text is generated in
            inference mode, so tensors that a module keeps from this call cannot take part in autograd; that saves a
            tenth of the time that a small model takes per token.
    """
    begin = time.perf_counter()
    special = _special_token_ids(tokenizer)
    stop_ids = [special[each] for each in stop if each in special]
    growing = GrowingText(tokenizer, ids, [each for each in stop if each not in special], write, asked_to_end)
    if write is not None and echo:
        write(growing.prompt)
    prompt = torch.tensor([ids], device=model.device)
    settings = _generation_config(model, tokenizer, sampling, stop_ids)
    # the prompt is part of the key: with the same draws for all, texts of different prompts choose the same words
    seeded = _seeded(keyed_seed(seed, "sample", *ids), model.device)
    inference = torch.inference_mode(not trains_afterwards)
    with evaluating(model), quiet_transformers(), without_generation_settings(model), seeded, inference:
        output = generate_ids(model, prompt, torch.ones_like(prompt), settings, growing if growing.is_needed else None)
    text = growing.close(output[0].tolist())
    return Continuation(growing.prompt, text, output.shape[1] - len(ids), time.perf_counter() - begin)


def generate_ids(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    settings: GenerationConfig,
    growing: "GrowingText | None" = None,
) -> Tensor:
    """Return the ids of prompts and generated tokens [prompts, length].

    Keys and values are kept between tokens as transformers does; where it fails to make that cache for the model's
    class, the text is generated without.

    Args:
        input_ids: [prompts, longest], padded on the left.
        attention_mask: of the same shape; 0 where it is padded.
        growing: called after every token.

    Raises:
        UserError: the class cannot generate text.
    """
    if model not in _CACHES:
        _CACHES[model] = _has_cache(model)
    if not _CACHES[model]:
        settings.use_cache = False
    criteria = None if growing is None else [growing]
    found: Tensor = model.generate(
        input_ids, attention_mask=attention_mask, generation_config=settings, stopping_criteria=criteria
    )
    return found


def _has_cache(model: PreTrainedModel) -> bool:
    """Try whether the cache that transformers makes fits the model's class: a few tokens are generated with it.

    Raises:
        UserError: the class cannot generate text without a cache either.
    """
    ids = torch.zeros(1, _TRIED_TOKENS, dtype=torch.long, device=model.device)
    reason = ""
    for cached in (True, False):
        settings = GenerationConfig(
            max_new_tokens=_TRIED_TOKENS, do_sample=False, use_cache=cached, pad_token_id=0, eos_token_id=None
        )
        try:
            model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        except Exception as error:  # of any kind: the class's layers may stumble anywhere over a cache of another shape
            reason = first_line(str(error)) or type(error).__name__
        else:
            return cached
    raise UserError(f"a {model.config.model_type} model cannot generate text: {reason}")


def _generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, sampling: Sampling, stop_ids: list[int]
) -> GenerationConfig:
    """Translate `sampling` for transformers. Of the model's own settings only its end tokens are used.

    A text ends at the EOS of the model, at that of the tokenizer, or at one of `stop_ids`.
    """
    ends = end_token_ids(model, tokenizer, stop_ids)
    common = {
        "max_new_tokens": sampling.max_new_tokens,
        "repetition_penalty": sampling.repetition_penalty,
        "eos_token_id": ends,
        "pad_token_id": ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    }
    if not sampling.do_sample or sampling.temperature == 0:
        return GenerationConfig(do_sample=False, **common)
    return GenerationConfig(
        do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k, **common
    )


@contextmanager
def without_generation_settings(model: PreTrainedModel) -> Iterator[None]:
    """Remove the model's own generation settings (beams, penalties, suppressed tokens) inside the context.

    transformers would take from them every setting that the caller's `GenerationConfig` leaves open.
    """
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, more: Iterable[int] = ()) -> list[int]:
    """List the ids that end a text, without duplicates: the EOS of the model and of the tokenizer, then `more`."""
    own = model.generation_config.eos_token_id
    ends = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, *more]
    return [token for token in dict.fromkeys(ends) if token is not None]


def _special_token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Map every special token, which decoding leaves out of a text, to its id."""
    return {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}


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
        """Take in the newest token and return whether the text ends with it.

        Args:
            input_ids: [1, length], the tokens of the prompt and all generated tokens.

        Returns:
            A boolean tensor of shape [1].
        """
        self._ids += input_ids[0, len(self._ids) :].tolist()
        is_due = self._write is not None and time.monotonic() - self._written_at >= self._stream_seconds
        if is_due or self._may_hold_stop():
            self._update(final=False)
        done = self._stopped or (self._asked_to_end is not None and self._asked_to_end())
        return torch.full((1,), done, device=input_ids.device)

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


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global random streams inside the context, and restore them afterwards.

    transformers draws from them: from that of the CPU, and from that of `device` if it is a CUDA device.
    """
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)
        if gpus:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
