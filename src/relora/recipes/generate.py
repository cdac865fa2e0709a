"""Let a finished model write: streamed to a person, or quietly for the report of a run."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast, TextStreamer

from relora.device import peak_memory_bytes
from relora.draws import keyed_seed
from relora.errors import UserError
from relora.measure import evaluating
from relora.model.load import max_positions, quiet_transformers
from relora.recipes.finished import Finished, open_finished

Write = Callable[[str], object]

STREAM_SECONDS = 0.05
"""Text is written this often at most: no eye follows more."""


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
class Generation:
    """What was written, and what it took."""

    texts: list[str]
    """Each with its prompt."""
    tokens: int
    """New ones, all texts together."""
    seconds: float
    """Of generation, without opening the model."""
    tokens_per_second: float
    peak_memory_bytes: int
    """On a CUDA device of its tensors, elsewhere of the process."""


def generate(
    model_or_run: str | Path,
    prompts: Sequence[str],
    sampling: Sampling | None = None,
    *,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "fp32",
    trust_remote_code: bool = False,
    write: Write | None = None,
) -> Generation:
    """Continue every prompt, one after another; `write` gets the text, prompt first, in pieces as it comes.

    The same seed writes the same text, whatever the other prompts are. `trust_remote_code` runs code that comes with
    the model.

    Raises:
        UserError: no such model, a setting out of range, or a prompt that leaves too little room.
    """
    sampling = sampling or Sampling()
    finished = open_finished(model_or_run, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    prompt_ids = [_encode(finished, prompt, sampling.max_new_tokens) for prompt in prompts]
    texts, new_tokens = [], 0
    begin = time.perf_counter()
    for ids in prompt_ids:
        whole = continue_prompt(finished.model, finished.tokenizer, ids, sampling, seed, write)
        texts.append(finished.tokenizer.decode(whole, skip_special_tokens=True))
        new_tokens += len(whole) - len(ids)
    seconds = time.perf_counter() - begin
    return Generation(texts, new_tokens, seconds, new_tokens / seconds, peak_memory_bytes(finished.model.device))


def sample_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> list[str]:
    """Continue every prompt in silence, on the model's device; its mode and the random streams stay as they are.

    Where a model has no room for `max_new_tokens` after a prompt, its text is shorter.
    """
    finished = Finished(model, tokenizer, sequence_length=0)
    texts = []
    for prompt in prompts:
        ids = finished.encode(prompt)
        room = (max_positions(model) or len(ids) + max_new_tokens) - len(ids)
        sampling = Sampling(max_new_tokens=max(1, min(max_new_tokens, room)), temperature=temperature, top_p=top_p)
        texts.append(tokenizer.decode(continue_prompt(model, tokenizer, ids, sampling, seed), skip_special_tokens=True))
    return texts


def describe(generation: Generation) -> str:
    """The figures in one line."""
    return (
        f"{generation.tokens:,} tokens in {generation.seconds:.2f} s, {generation.tokens_per_second:,.1f} tokens/s, "
        f"peak memory {generation.peak_memory_bytes / 1e9:.2f} GB"
    )


def _encode(finished: Finished, prompt: str, max_new_tokens: int) -> list[int]:
    ids = finished.encode(prompt)
    positions = max_positions(finished.model)
    if positions is not None and len(ids) + max_new_tokens > positions:
        raise UserError(
            f"max_new_tokens ({max_new_tokens}) and the prompt ({len(ids)} tokens) exceed the model's {positions} "
            + (f"positions; at most {positions - len(ids)} fit" if len(ids) < positions else "positions; shorten it")
        )
    return ids


def continue_prompt(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    ids: list[int],
    sampling: Sampling,
    seed: int,
    write: Write | None = None,
) -> Tensor:
    """Prompt ids -> prompt and new ids, [length]."""
    eos = model.generation_config.eos_token_id
    eos = tokenizer.eos_token_id if eos is None else eos
    first_eos = eos[0] if isinstance(eos, list) else eos
    settings = {
        "max_new_tokens": sampling.max_new_tokens,
        "repetition_penalty": sampling.repetition_penalty,
        "eos_token_id": eos,
        "pad_token_id": first_eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        "do_sample": sampling.do_sample and sampling.temperature > 0,
    }
    if settings["do_sample"]:
        settings |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    prompt = torch.tensor([ids], device=model.device)
    # keyed by the prompt, too: with one draw for all, texts of different prompts fall into the same words
    with evaluating(model), quiet_transformers(), _seeded(keyed_seed(seed, "sample", *ids), model.device):
        whole = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=GenerationConfig(**settings),
            streamer=None if write is None else _Streamer(tokenizer, write),
        )
    text: Tensor = whole[0]
    return text


class _Streamer(TextStreamer):  # type: ignore[misc]  # transformers has no types
    """Whole words as they are known; the prompt too, or SentencePiece would lose the space after it.

    Decoding takes as long as a token of a tiny model, so tokens wait for one another up to STREAM_SECONDS.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, write: Write) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self._write = write
        self._waiting: list[Tensor] = []
        self._written = 0.0

    def put(self, value: Tensor) -> None:
        self._waiting.append(value.flatten())
        if time.monotonic() - self._written >= STREAM_SECONDS:
            self._flush()

    def end(self) -> None:
        self._flush()
        super().end()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._write(text + "\n" * stream_end)

    def _flush(self) -> None:
        if self._waiting:
            super().put(torch.cat(self._waiting))
        self._waiting, self._written = [], time.monotonic()


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
