"""Continue prompts with a trained model: streamed to a person, or silently for the report of a run.

With several adapters, each of them continues every prompt in turn. The base is opened once and every continuation is
drawn with the same seed, so that all differences between the texts come from the adapters.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from relora.adapters.attached import BASE, Attached
from relora.device import peak_memory_bytes
from relora.errors import UserError
from relora.inference.conversation import Conversation
from relora.inference.decoding import Continuation, Sampling, check_stop, continue_prompt, continue_prompts
from relora.inference.generation_settings import check_generation_settings
from relora.inference.growing_text import Write
from relora.inference.loading import LoadedModel, load_model_or_run
from relora.model.load import max_positions


@dataclass(frozen=True)
class Speed:
    """Number of generated tokens and how fast they were generated."""

    tokens: int
    """Generated tokens of all texts together."""
    seconds: float
    """Time of generation, without opening the model."""
    tokens_per_second: float

    @classmethod
    def of(cls, continuations: Sequence[Continuation]) -> "Speed":
        """Add up the tokens and the seconds of several continuations."""
        tokens = sum(each.tokens for each in continuations)
        seconds = sum(each.seconds for each in continuations)
        return cls(tokens, seconds, tokens / seconds if seconds else 0.0)

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens in {self.seconds:.2f} s, {self.tokens_per_second:,.1f} tokens/s"


@dataclass(frozen=True)
class Generation(Speed):
    """The generated texts, with time and memory."""

    texts: list[str]
    """Each text with its prompt; with `chat`, the answer alone."""
    adapters: list[str]
    """Name of the adapter that was in use for each text; `base` if none was."""
    peak_memory_bytes: int
    """The most memory taken: on a CUDA device by its tensors, elsewhere by the process."""
    by_adapter: dict[str, Speed]
    """Speed with each adapter, by name."""


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
    """Continue every prompt; with one adapter or none, several at a time where the model's form allows it.

    The same seed gives the same text for a prompt, whatever the other prompts and adapters are.

    Args:
        model_or_run: a run folder, a model folder or a hub id; or an adapter's folder, which opens its base.
        adapters: folders or runs whose adapters continue every prompt in turn, after the model's own adapter; `base`
            among them stands for the model without any adapter, which comes first.
        compare: let the base continue every prompt as well, before all adapters.
        chat: treat every prompt as a user's turn, written with the chat template or the template of the run.
        system: system prompt of such a turn.
        stop: strings that end a text; they are not part of it.
        trust_remote_code: run code that comes with the model.
        write: receives the texts in pieces as they are generated, each with its prompt first (with `chat`, the answer
            alone), and the names of the adapters if there are several.

    Raises:
        UserError: the model or an adapter does not exist, an adapter belongs to another base, a setting is out of
            range, there is no chat template, or a prompt leaves too little room in the model's context. All of this is
            found before the first token is generated.
    """
    sampling = sampling or Sampling()
    check_stop(stop)
    if system is not None and not chat:
        raise UserError("system: a system prompt is part of a chat; add --chat")
    loaded = load_model_or_run(
        model_or_run,
        adapters=[each for each in adapters if each != BASE],
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    check_generation_settings(loaded, continues=not chat)
    names = _adapters_in_turn(loaded, with_base=compare or BASE in adapters, compare=compare)
    pairs = [(prompt, name) for prompt in prompts for name in names]
    jobs = [(name, _encode_prompt(loaded, prompt, sampling, name if chat else None, system)) for prompt, name in pairs]
    model, tokenizer = loaded.model, loaded.tokenizer
    continuations: list[Continuation] = []
    for name, some in _in_turn(jobs):
        loaded.adapters.use(name)
        if write is not None and len(names) > 1:
            write(f"== {name}\n")
        continuations += continue_prompts(model, tokenizer, some, sampling, seed, write, echo=not chat, stop=stop)
    total, used = Speed.of(continuations), [name for name, _ in jobs]
    return Generation(
        **asdict(total),
        texts=[each.text if chat else each.prompt + each.text for each in continuations],
        adapters=used,
        peak_memory_bytes=peak_memory_bytes(model.device),
        by_adapter={name: _speed_with(name, used, continuations) for name in names},
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
    """Continue every prompt without output, on the model's device, and return the texts with their prompts.

    The model's mode and the global random streams are as before when this returns, so training can go on. If a prompt
    leaves less room than `max_new_tokens` in the model's context, its text is shorter.
    """
    loaded = LoadedModel(model, tokenizer, 0, Attached(model))
    texts = []
    for prompt in prompts:
        ids = loaded.encode(prompt)
        room = (max_positions(model) or len(ids) + max_new_tokens) - len(ids)
        sampling = Sampling(max_new_tokens=max(1, min(max_new_tokens, room)), temperature=temperature, top_p=top_p)
        continuation = continue_prompt(model, tokenizer, ids, sampling, seed, trains_afterwards=True)
        texts.append(continuation.prompt + continuation.text)
    return texts


def describe(generation: Generation) -> str:
    """Format the speed and the memory: one line, preceded by a line for each adapter if there are several."""
    by_adapter = generation.by_adapter if len(generation.by_adapter) > 1 else {}
    lines = [f"{name}: {speed}" for name, speed in by_adapter.items()]
    return "\n".join([*lines, f"{generation}, peak memory {generation.peak_memory_bytes / 1e9:.2f} GB"])


def _adapters_in_turn(loaded: LoadedModel, *, with_base: bool, compare: bool) -> list[str]:
    """List the names of what continues every prompt, in order.

    Raises:
        UserError: `compare` was asked for, but there is no adapter to compare the base with.
    """
    names = loaded.adapters.names
    if compare and not names:
        raise UserError("compare: there is no adapter beside the base; give --adapter")
    return [BASE, *names] if with_base or not names else [*names]


def _in_turn(jobs: Sequence[tuple[str, list[int]]]) -> Iterator[tuple[str, list[list[int]]]]:
    """Yield each adapter in turn with the prompts that it continues before another one has its turn."""
    for name, group in groupby(jobs, itemgetter(0)):
        yield name, [ids for _, ids in group]


def _speed_with(adapter: str, used: Sequence[str], continuations: Sequence[Continuation]) -> Speed:
    """Add up those continuations that were generated with `adapter`; `used` has the name for each continuation."""
    return Speed.of([each for each, name in zip(continuations, used, strict=True) if name == adapter])


def _encode_prompt(
    loaded: LoadedModel, prompt: str, sampling: Sampling, chat_adapter: str | None, system: str | None
) -> list[int]:
    """Return the token ids of a prompt.

    Args:
        chat_adapter: the prompt is a turn of a chat with this adapter; None if it is plain text to be continued.
        system: system prompt of the chat.

    Raises:
        UserError: prompt and `max_new_tokens` exceed the model's context.
    """
    if chat_adapter is None:
        ids = loaded.encode(prompt)
    else:
        ids = loaded.encode_chat(Conversation(system).messages(prompt), chat_adapter)
    positions, wanted = max_positions(loaded.model), sampling.max_new_tokens
    if positions is not None and len(ids) + wanted > positions:
        mend = f"at most {positions - len(ids)} fit" if len(ids) < positions else "shorten it"
        raise UserError(
            f"max_new_tokens ({wanted}) and the prompt ({len(ids)} tokens) exceed the model's {positions} "
            f"positions; {mend}"
        )
    return ids
