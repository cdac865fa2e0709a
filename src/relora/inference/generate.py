"""Let a finished model write: streamed to a person, or quietly for the report of a run.

With several adapters every prompt is continued by each in turn, from one base that is opened once and with the same
seed, so that what differs is the adapters' doing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from relora.adapters.attached import BASE, Attached
from relora.device import peak_memory_bytes
from relora.errors import UserError
from relora.inference.conversation import Conversation
from relora.inference.decoding import Continuation, Sampling, Write, check_stop, continue_prompt
from relora.inference.loading import LoadedModel, load_model_or_run
from relora.model.load import max_positions


@dataclass(frozen=True)
class Speed:
    """How fast texts were written."""

    tokens: int
    """New ones, all texts together."""
    seconds: float
    """Of generation, without opening the model."""
    tokens_per_second: float

    @classmethod
    def of(cls, written: Sequence[Continuation]) -> "Speed":
        tokens, seconds = sum(each.tokens for each in written), sum(each.seconds for each in written)
        return cls(tokens, seconds, tokens / seconds if seconds else 0.0)

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens in {self.seconds:.2f} s, {self.tokens_per_second:,.1f} tokens/s"


@dataclass(frozen=True)
class Generation(Speed):
    """What was written, and what it took."""

    texts: list[str]
    """Each with its prompt; the answer alone where a prompt was a turn of a chat."""
    adapters: list[str]
    """Who wrote each; `base` where no adapter was in use."""
    peak_memory_bytes: int
    """On a CUDA device of its tensors, elsewhere of the process."""
    by_adapter: dict[str, Speed]


def generate(
    model_or_run: str | Path,
    prompts: Sequence[str],
    sampling: Sampling | None = None,
    *,
    adapters: Sequence[str] = (),
    compare: bool = False,
    chat: bool = False,
    system: str | None = None,
    stop: Sequence[str] = (),
    seed: int = 0,
    device: str = "auto",
    dtype: str = "fp32",
    trust_remote_code: bool = False,
    write: Write | None = None,
) -> Generation:
    """Continue every prompt, one after another; `write` gets the text in pieces as it comes, prompt first.

    The same seed writes the same text, whatever the other prompts and adapters are.

    Args:
        model_or_run: a run folder, a model folder or a hub id; or an adapter's folder, which opens its base.
        adapters: folders or runs whose adapters continue every prompt in turn, after the model's own; `base` is the
            model without any.
        compare: the base, too, and first.
        chat: every prompt is a user's turn, put into the words of the chat template or of the run's template.
        system: the system prompt of such a turn.
        stop: strings that end a text; they are not part of it.
        trust_remote_code: run code that comes with the model.

    Raises:
        UserError: no such model or adapter, an adapter of another base, a setting out of range, no chat template, or a
            prompt that leaves too little room.
    """
    sampling = sampling or Sampling()
    check_stop(stop)
    if system is not None and not chat:
        raise UserError("system: a system prompt is part of a chat; add --chat")
    finished = load_model_or_run(
        model_or_run,
        adapters=[each for each in adapters if each != BASE],
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    names = _writers(finished, adapters, compare)
    jobs = [
        (name, _encode(finished, prompt, sampling, name if chat else None, system))
        for prompt in prompts
        for name in names
    ]
    written: list[Continuation] = []
    for name, ids in jobs:
        finished.adapters.use(name)
        if write is not None and len(names) > 1:
            write(f"== {name}\n")
        tokenizer = finished.tokenizer
        written.append(continue_prompt(finished.model, tokenizer, ids, sampling, seed, write, echo=not chat, stop=stop))
        if write is not None:
            write("\n")
    total, by = Speed.of(written), [name for name, _ in jobs]
    return Generation(
        total.tokens,
        total.seconds,
        total.tokens_per_second,
        texts=[each.text if chat else each.prompt + each.text for each in written],
        adapters=by,
        peak_memory_bytes=peak_memory_bytes(finished.model.device),
        by_adapter={n: Speed.of([each for each, who in zip(written, by, strict=True) if who == n]) for n in names},
    )


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
    finished = LoadedModel(model, tokenizer, 0, Attached(model))
    texts = []
    for prompt in prompts:
        ids = finished.encode(prompt)
        room = (max_positions(model) or len(ids) + max_new_tokens) - len(ids)
        sampling = Sampling(max_new_tokens=max(1, min(max_new_tokens, room)), temperature=temperature, top_p=top_p)
        written = continue_prompt(model, tokenizer, ids, sampling, seed, trains_on=True)
        texts.append(written.prompt + written.text)
    return texts


def describe(generation: Generation) -> str:
    """The figures: one line, and one more for each of several adapters."""
    several = generation.by_adapter if len(generation.by_adapter) > 1 else {}
    lines = [f"{name}: {speed}" for name, speed in several.items()]
    return "\n".join([*lines, f"{generation}, peak memory {generation.peak_memory_bytes / 1e9:.2f} GB"])


def _writers(finished: LoadedModel, adapters: Sequence[str], compare: bool) -> list[str]:
    """Who continues every prompt, in turn."""
    loaded = finished.adapters.names
    if compare and not loaded:
        raise UserError("compare: there is no adapter beside the base; give --adapter")
    return [*[BASE] * (compare or BASE in adapters or not loaded), *loaded]


def _encode(
    finished: LoadedModel, prompt: str, sampling: Sampling, chat_with: str | None, system: str | None
) -> list[int]:
    """The ids of a prompt, as it is or as a turn of a chat with an adapter; `UserError` where an answer has no room."""
    if chat_with is None:
        ids = finished.encode(prompt)
    else:
        ids = finished.encode_chat(Conversation(system).messages(prompt), chat_with)
    positions, wanted = max_positions(finished.model), sampling.max_new_tokens
    if positions is not None and len(ids) + wanted > positions:
        raise UserError(
            f"max_new_tokens ({wanted}) and the prompt ({len(ids)} tokens) exceed the model's {positions} "
            + (f"positions; at most {positions - len(ids)} fit" if len(ids) < positions else "positions; shorten it")
        )
    return ids
