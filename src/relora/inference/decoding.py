"""Continue prompts with a model: token by token, streamed, up to an end token or a stop string.

A model of LLaMA's form is run by our `decoder`, several prompts at a time; transformers (`generate`) does it for any
other, one prompt after the other. The tokens are the same. What text they stand for is decided by `growing_text`, in
one place for what is streamed, what ends the text and what is returned.

A stop string that is a special token of the tokenizer never appears in decoded text, so it ends the text by its token
id.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from relora.errors import UserError
from relora.inference.choice import follows
from relora.inference.decoder import decoder_of
from relora.inference.growing_text import GrowingText, InOrder, Write
from relora.inference.rows import Heard, grow
from relora.measure import evaluating
from relora.messages import first_line
from relora.model.load import quiet_transformers
from relora.seeding import keyed_seed

ROWS = 8
"""Prompts that are continued at a time: the weights are read once for all, and each has its keys and values."""
_TRIED_TOKENS = 2
"""Length of the prompt, and of its continuation, with which a model's cache is tried."""
_CACHES: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
"""Models that transformers has generated with -> whether with a cache."""


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
    heard: Heard | None = None,
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
        heard: what is kept between the turns of a chat: of a prompt that begins as the last text did, only the rest is
            read. Models that transformers generates with read all of it.
    """
    begin = time.perf_counter()
    texts, stop_ids = _texts_of(tokenizer, [ids], stop, [write], asked_to_end)
    (growing,) = texts
    if write is not None and echo:
        write(growing.prompt)
    prompt = torch.tensor([ids], device=model.device)
    settings = _generation_config(model, tokenizer, sampling, stop_ids)
    seeded = _seeded(_key(seed, ids), model.device)
    inference = torch.no_grad() if trains_afterwards else torch.inference_mode()
    with evaluating(model), quiet_transformers(), without_generation_settings(model), seeded, inference:
        watched = growing if growing.is_needed else None
        output = generate_ids(model, prompt, torch.ones_like(prompt), settings, watched, heard)
    text = growing.close(output[0].tolist())
    return Continuation(growing.prompt, text, output.shape[1] - len(ids), time.perf_counter() - begin)


def continue_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    seed: int,
    write: Write | None = None,
    *,
    echo: bool = True,
    stop: Sequence[str] = (),
) -> list[Continuation]:
    """Continue prompts, `ROWS` at a time where the model's form allows it; see `continue_prompt`.

    Args:
        write: receives the texts one after another, each with a line end after it: the first that is unfinished is
            streamed, the others are kept until their turn.

    Returns:
        The continuations in the order of the prompts. The time of texts that grew together is shared equally.
    """
    found: list[Continuation] = []
    for first in range(0, len(prompts), ROWS):
        some = prompts[first : first + ROWS]
        if len(some) > 1 and decoder_of(model) is not None:
            found += _together(model, tokenizer, some, sampling, seed, write, echo, stop)
            continue
        for ids in some:
            found.append(continue_prompt(model, tokenizer, ids, sampling, seed, write, echo=echo, stop=stop))
            if write is not None:
                write("\n")
    return found


def _together(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    seed: int,
    write: Write | None,
    echo: bool,
    stop: Sequence[str],
) -> list[Continuation]:
    """Continue prompts at the same time, by our decoder; see `continue_prompts`."""
    begin = time.perf_counter()
    order = InOrder(write)
    writes = [order.of(row) if write is not None else None for row in range(len(prompts))]
    texts, stop_ids = _texts_of(tokenizer, prompts, stop, writes)
    for text, piece in zip(texts, writes, strict=True):
        if piece is not None and echo:
            piece(text.prompt)
    settings = _generation_config(model, tokenizer, sampling, stop_ids)
    draws = [torch.Generator(model.device).manual_seed(_key(seed, ids)) for ids in prompts]
    ended: dict[int, tuple[str, int]] = {}
    with evaluating(model), torch.inference_mode():
        decoder = decoder_of(model)
        assert decoder is not None  # the caller has asked
        ends = [text.ends if text.is_needed else None for text in texts]
        for row, generated in grow(decoder, prompts, settings, draws=draws, ends=ends):
            ended[row] = texts[row].close([*prompts[row], *generated]), len(generated)
            order.end(row)
    seconds = (time.perf_counter() - begin) / len(prompts)
    return [Continuation(text.prompt, *ended[row], seconds) for row, text in enumerate(texts)]


def _texts_of(
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[list[int]],
    stop: Sequence[str],
    writes: Sequence[Write | None],
    asked_to_end: Callable[[], bool] | None = None,
) -> tuple[list[GrowingText], list[int]]:
    """Return the text of each prompt, and the ids of those stop strings that are special tokens."""
    special = _special_token_ids(tokenizer)
    strings = [each for each in stop if each not in special]
    texts = [
        GrowingText(tokenizer, ids, strings, write, asked_to_end) for ids, write in zip(prompts, writes, strict=True)
    ]
    return texts, [special[each] for each in stop if each in special]


def _key(seed: int, ids: Sequence[int]) -> int:
    """Return the seed of a text: with the same draws for all, texts of different prompts choose the same words."""
    return keyed_seed(seed, "sample", *ids)


def generate_ids(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    settings: GenerationConfig,
    growing: GrowingText | None = None,
    heard: Heard | None = None,
) -> Tensor:
    """Return the ids of prompts and generated tokens [prompts, length].

    Where transformers generates, keys and values are kept between tokens as it does; where it fails to make that cache
    for the model's class, the text is generated without.

    Args:
        input_ids: [prompts, longest], padded on the left.
        attention_mask: of the same shape; 0 where it is padded.
        growing: called after every token of the one prompt.
        heard: see `continue_prompt`.

    Raises:
        UserError: the class cannot generate text.
    """
    decoder = decoder_of(model) if follows(settings) and not (settings.do_sample and len(input_ids) > 1) else None
    if decoder is not None:
        prompts = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
        ends = None if growing is None else [growing.ends]
        with torch.no_grad():
            generated = dict(grow(decoder, prompts, settings, ends=ends, heard=heard))
        rows = [torch.tensor(generated[row]) for row in range(len(prompts))]
        padding = settings.pad_token_id if len(rows) > 1 else 0
        more = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
        return torch.cat([input_ids, more.to(input_ids.device)], dim=1)
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
