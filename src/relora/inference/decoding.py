"""One prompt continued by a model: token by token, streamed, up to an end or a stop string.

transformers chooses the tokens (`generate`); what they read as is settled here, in one place for what is streamed, what
ends the text and what is returned. Text is always decoded whole and handed on from where it was: decoded piece by
piece, a SentencePiece tokenizer would lose the space that a piece begins with. That costs a decoding of the whole at
every piece, so pieces wait for one another up to STREAM_SECONDS. With stop strings, the last tokens are decoded after
every token, which a model that takes a millisecond for one can feel.

A stop string ends the text where it begins, whatever tokens it is made of; transformers' own `stop_strings` leaves it
in, matches one that began in the prompt, and goes through the vocabulary at every first use. A stop string that is a
special token of the tokenizer is not part of any text and ends it by its id.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast, StoppingCriteria

from relora.errors import UserError
from relora.measure import evaluating
from relora.model.load import quiet_transformers
from relora.seeding import keyed_seed

Write = Callable[[str], object]

STREAM_SECONDS = 0.05
"""Text is written this often at most: no eye follows more."""
_TOKENS_PER_CHAR = 4
"""At most: a character that the vocabulary lacks is spelt as up to four bytes."""
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What the first bytes of a character read as until its last has come."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the names are those of `transformers.GenerationConfig`."""

    max_new_tokens: int = 200
    temperature: float = 0.8
    """0 is greedy, as is `do_sample=False`."""
    top_p: float = 0.95
    top_k: int = 0
    """0 is no limit."""
    do_sample: bool = True
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, sound, wanted in (
            ("max_new_tokens", self.max_new_tokens > 0, "above 0"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (no limit) or more"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0 (1 is none)"),
        ):
            if not sound:
                raise UserError(f"{name} is {getattr(self, name)}; it must be {wanted}")


@dataclass(frozen=True)
class Continuation:
    """What a model wrote after one prompt."""

    prompt: str
    """As its tokens read."""
    text: str
    """What is new, without the stop string that ended it."""
    tokens: int
    """New ones, those of an end or a stop string among them."""
    seconds: float


def check_stop(stop: Sequence[str]) -> None:
    """`UserError` for a stop string that ends every text before it begins."""
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
    trains_on: bool = False,
) -> Continuation:
    """Continue the prompt `ids`; the same seed writes the same text after the same prompt.

    Args:
        write: gets the text in pieces as it comes; a piece that may become a stop string waits until it is known.
        echo: `write` gets the prompt, too, before the first token is there.
        stop: strings that end the text.
        asked_to_end: looked at after every token; once true, the text ends there.
        trains_on: the model trains afterwards. Otherwise what it remembers of this text may be beyond autograd, which
            saves a tenth of the time that a small model takes for a token.
    """
    begin = time.perf_counter()
    special = _special_ids(tokenizer)
    stop_ids = [special[each] for each in stop if each in special]
    growing = GrowingText(tokenizer, ids, [each for each in stop if each not in special], write, asked_to_end)
    if write is not None and echo:
        write(growing.prompt)
    prompt = torch.tensor([ids], device=model.device)
    # keyed by the prompt, too: with one draw for all, texts of different prompts fall into the same words
    settings = _generation_config(model, tokenizer, sampling, stop_ids)
    seeded = _seeded(keyed_seed(seed, "sample", *ids), model.device)
    with evaluating(model), quiet_transformers(), without_settings(model), seeded, torch.inference_mode(not trains_on):
        whole: Tensor = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=settings,
            stopping_criteria=[growing] if growing.is_watched else None,
        )
    text = growing.close(whole[0].tolist())
    return Continuation(growing.prompt, text, whole.shape[1] - len(ids), time.perf_counter() - begin)


def _generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, sampling: Sampling, stop_ids: list[int]
) -> GenerationConfig:
    """`sampling` alone, whatever came with the model; a text ends at the EOS of the model's or of the tokenizer's."""
    ends = end_ids(model, tokenizer, stop_ids)
    sampled = sampling.do_sample and sampling.temperature > 0
    chosen = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k} if sampled else {}
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        repetition_penalty=sampling.repetition_penalty,
        eos_token_id=ends,
        pad_token_id=ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        do_sample=sampled,
        **chosen,
    )


@contextmanager
def without_settings(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model has no settings for generation (beams, penalties, suppressed tokens), from which transformers
    would fill in what ours leave open."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, more: Iterable[int] = ()) -> list[int]:
    """The ids that end a text, each once: the model's, the tokenizer's, and `more`."""
    own = model.generation_config.eos_token_id
    ends = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, *more]
    return [token for token in dict.fromkeys(ends) if token is not None]


def _special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """The tokens that decoding leaves out of a text, and their ids."""
    return {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}


def held_back(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop string."""
    return max((size for each in stop for size in range(1, len(each)) if text.endswith(each[:size])), default=0)


class GrowingText(StoppingCriteria):  # type: ignore[misc]  # transformers has no types
    """The text of one generation as it grows; transformers asks it after every token whether that was the last."""

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
        self.prompt = self._read(self._ids)
        self._stopped = False
        self._written_chars, self._written_at = 0, 0.0
        longest = max(map(len, stop), default=0)
        self._watched_tokens = 1 + _TOKENS_PER_CHAR * longest

    @property
    def is_watched(self) -> bool:
        """Whether anything hangs on the text before it is done."""
        return bool(self._stop) or self._write is not None or self._asked_to_end is not None

    def __call__(self, input_ids: Tensor, scores: object, **others: object) -> Tensor:
        """Whether the text is done, [1]; `input_ids` [1, length] are prompt and new tokens."""
        self._ids += input_ids[0, len(self._ids) :].tolist()
        due = self._write is not None and time.monotonic() - self._written_at >= self._stream_seconds
        if due or self._may_hold_stop():
            self._settle(final=False)
        done = self._stopped or (self._asked_to_end is not None and self._asked_to_end())
        return torch.full((1,), done, device=input_ids.device)

    def close(self, ids: list[int]) -> str:
        """The text that `ids`, prompt and new tokens, read as; what of it was held back is written."""
        self._ids = ids
        return self._settle(final=True)

    def _may_hold_stop(self) -> bool:
        """Whether a stop string stands in the last tokens, or in the one before the first new one: to be looked at."""
        if not self._stop:
            return False
        # from one token before, since a decoder may strip the space that a text begins with
        tail = self._read(self._ids[max(self._prompt_tokens - 1, len(self._ids) - self._watched_tokens - 1, 0) :])
        return any(each in tail for each in self._stop)

    def _settle(self, *, final: bool) -> str:
        """Decode what is new, cut it at a stop string, and write what is certain of it."""
        text = self._read(self._ids)[len(self.prompt) :]
        found = [at for each in self._stop if (at := text.find(each)) >= 0]
        if found:
            self._stopped, text = True, text[: min(found)]
        elif not final:
            text = text.rstrip(_INCOMPLETE)
            text = text[: len(text) - held_back(text, self._stop)]
        if self._write is not None and len(text) > self._written_chars:
            self._write(text[self._written_chars :])
            self._written_chars = len(text)
        self._written_at = time.monotonic()
        return text

    def _read(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """transformers draws from the global streams: set them for the length of one text, then put them back."""
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)
        if gpus:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
