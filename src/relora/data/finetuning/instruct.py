"""From records to examples: a layout reads a record, a template writes it, the tokenizer encodes it, part by part.

    record -> conversation (`layouts`) -> prompts and responses (`templates`) -> tokens, of which responses are scored

Prompts and responses are encoded apart, so a token is never part of both and a prompt has the ids that it has when a
model is asked. Most tokenizers encode a text alike wherever it stands; those of SentencePiece's kind put a space before
the first word, so parts that follow others are encoded behind a line end, which is then taken off. Control tokens act
as such only where a chat template wrote them. (A tokenizer that gives no text back exactly, such as T5's, which reads
line ends as spaces, is no more exact here.)

What does not fit into a sequence is cut so that the response stays: of several turns those that fit from the start are
kept; of a single one the prompt loses its middle; and only a response that would not fit by itself loses its end.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import tokenizers

from relora.data.finetuning.examples import Example
from relora.data.finetuning.layouts import MARK, BadRecord, Conversation, Layout, LayoutName, find_layout
from relora.data.finetuning.records import Record
from relora.data.finetuning.templates import Part, Template, TemplateName, find_template
from relora.data.pretraining.encode import CHUNK_CHARS
from relora.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class InstructionForm:
    """How records become examples."""

    layout: LayoutName | Literal["auto"] = "auto"
    """`auto` goes by the columns of the first record."""
    template: TemplateName | Literal["auto"] = "auto"
    """`auto` is the tokenizer's chat template where it has one, else alpaca."""
    loss_on: Literal["response", "all"] = "response"
    """Which tokens are scored."""
    prompt_column: str | None = None
    """With `response_column`: of the layout `columns`. Without it, that column holds completions."""
    response_column: str | None = None


@dataclass(frozen=True)
class ExampleCounts:
    """What became of the records."""

    read: int
    used: int
    bad: int
    """Left out because they could not be used."""
    empty: int
    """Left out because there is no response in them."""
    prompt_cut: int
    """Used, without the middle of the prompt."""
    response_cut: int
    """Used, without the end of the response, or without the later turns of several."""

    def __str__(self) -> str:
        left_out = {"with no response": self.empty, "bad": self.bad}
        cut = {"in the prompt": self.prompt_cut, "in the response": self.response_cut}
        return "; ".join(
            [
                f"{self.used:,} of {self.read:,} records used",
                *(f"{number:,} left out, {why}" for why, number in left_out.items() if number),
                *(f"{number:,} cut {where}" for where, number in cut.items() if number),
            ]
        )


@dataclass(frozen=True)
class InstructionSet:
    """Examples, and where they come from."""

    examples: tuple[Example, ...]
    counts: ExampleCounts
    layout: Layout
    template: str

    def __str__(self) -> str:
        return f"{self.layout}, template {self.template}: {self.counts}"


class Prompt(NamedTuple):
    """What a model is asked, and the response it should give."""

    input_ids: list[int]
    response: str
    where: str


def encode(
    records: Iterable[Record],
    tokenizer: "PreTrainedTokenizerFast",
    form: InstructionForm,
    *,
    sequence_length: int,
    skip_bad: bool = False,
) -> InstructionSet:
    """The examples of a data set, in order, each of at most `sequence_length` tokens.

    `UserError` where the layout or the template does not fit, no record is left, or one is bad (unless `skip_bad`).
    """
    if sequence_length < 2:
        raise UserError(f"sequence_length is {sequence_length}: an example needs at least 2 tokens")
    reader = _Reader(records, tokenizer, form, skip_bad)
    examples = []
    for record, _, parts in reader.encoded():
        parts, prompt_cut, response_cut = _fitting(parts, sequence_length)
        reader.counts.update(prompt_cut=prompt_cut, response_cut=response_cut)
        ids = np.fromiter(chain.from_iterable(part.ids for part in parts), dtype=np.int32)
        lengths, are_responses = [len(part.ids) for part in parts], [part.is_response for part in parts]
        scored = np.repeat(np.array(are_responses) | (form.loss_on == "all"), lengths)
        examples.append(Example(ids, scored, record.where))
    count = reader.counts
    counts = ExampleCounts(
        read=count["read"],
        used=len(examples),
        bad=count["bad"],
        empty=count["empty"],
        prompt_cut=count["prompt_cut"],
        response_cut=count["response_cut"],
    )
    if not examples:
        raise UserError(f"no example is left to use: {counts}")
    return InstructionSet(tuple(examples), counts, reader.layout, reader.template.name)


def prompts(
    records: Iterable[Record],
    tokenizer: "PreTrainedTokenizerFast",
    form: InstructionForm,
    *,
    skip_bad: bool = False,
) -> Iterator[Prompt]:
    """What comes before the last response of each record, as `encode` would write it, whole; and that response."""
    reader = _Reader(records, tokenizer, form, skip_bad)
    if reader.layout.name == "completion":
        raise UserError(f"{reader.layout}: completions have no prompt that a model could be asked")
    for record, conversation, parts in reader.encoded():
        ids = list(chain.from_iterable(part.ids for part in parts[:-1]))
        yield Prompt(ids, conversation[-1].content, record.where)


def shown(example: Example, tokenizer: "PreTrainedTokenizerFast") -> str:
    """An example as a model sees it, for a person: special tokens spelt out, what is scored between ⟦ and ⟧.

    Characters that a terminal would obey are escaped.
    """
    borders = np.flatnonzero(np.diff(example.scored.astype(np.int8))) + 1
    pieces, before = [], ""
    for start, end in zip([0, *borders.tolist()], [*borders.tolist(), len(example.input_ids)], strict=True):
        # decoded from the start, since some decoders drop a space before the first word
        text = tokenizer.decode(example.input_ids[:end].tolist(), clean_up_tokenization_spaces=False)
        piece = _printable(text[len(before) :])
        pieces.append(f"⟦{piece}⟧" if example.scored[start] else piece)
        before = text
    scored = int(example.scored.sum())
    return f"{example.where}: {len(example.input_ids)} tokens, {scored} scored\n{''.join(pieces)}"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


class EncodedPart(NamedTuple):
    """A part of an example, encoded."""

    ids: list[int]
    is_response: bool


class _Reader:
    """Records on their way to tokens; the first one decides the layout."""

    def __init__(
        self, records: Iterable[Record], tokenizer: "PreTrainedTokenizerFast", form: InstructionForm, skip_bad: bool
    ) -> None:
        self._records = iter(records)
        first = next(self._records, None)
        if first is None:
            raise UserError("there is no record to use")
        self._records = chain([first], self._records)
        self.layout = find_layout(first, form.layout, form.prompt_column, form.response_column)
        self.template: Template = find_template(form.template, self.layout, tokenizer)
        self._encoder = PartEncoder(tokenizer, is_chat=self.template.is_chat)
        self._skip_bad = skip_bad
        self.counts: Counter[str] = Counter()

    def encoded(self) -> Iterator[tuple[Record, Conversation, list[EncodedPart]]]:
        """The records that have a response, and their parts; about CHUNK_CHARS of text are encoded at a time."""
        waiting: list[tuple[Record, Conversation, list[Part]]] = []
        chars = 0
        for record in self._records:
            self.counts["read"] += 1
            try:
                conversation = self.layout.conversation(record.fields)
                parts = self.template.parts(conversation) if conversation else []
            except BadRecord as error:
                self._bad(f"{record.where}: {error}")
                continue
            if not parts:
                self.counts["empty"] += 1
                continue
            waiting.append((record, conversation, parts))
            chars += sum(len(part.text) for part in parts)
            if chars >= CHUNK_CHARS:
                yield from self._encode(waiting)
                waiting, chars = [], 0
        yield from self._encode(waiting)

    def _encode(
        self, waiting: list[tuple[Record, Conversation, list[Part]]]
    ) -> Iterator[tuple[Record, Conversation, list[EncodedPart]]]:
        encoded = self._encoder.encode([parts for _, _, parts in waiting])
        for (record, conversation, _), parts in zip(waiting, encoded, strict=True):
            yield record, conversation, parts

    def _bad(self, message: str) -> None:
        if not self._skip_bad:
            raise UserError(f"{message} (skip_bad leaves such records out)")
        self.counts["bad"] += 1


class PartEncoder:
    """Encodes the parts of examples: the first of each as the start of a text, the others as what follows it."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", *, is_chat: bool) -> None:
        self._backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = not is_chat
        self._eos: int = tokenizer.eos_token_id
        self._opening = [] if is_chat else _opening(tokenizer)
        self._line_end = self._ids(["\n"])[0]
        self._alike = self._behind_line_ends(["x"]) == self._ids(["x"])

    def encode(self, examples: Sequence[list[Part]]) -> list[list[EncodedPart]]:
        """The ids of all parts of each example, its opening and its ends among them."""
        pieces: list[str] = []
        firsts = set()
        for parts in examples:
            firsts.add(len(pieces))
            pieces += [piece for part in parts for piece in part.text.split(MARK)]
        ids = iter(self._pieces(pieces, firsts))
        return [
            [
                EncodedPart(
                    [
                        *(self._opening if index == 0 else ()),
                        *chain.from_iterable(next(ids) for _ in range(part.text.count(MARK) + 1)),
                        *((self._eos,) if part.eos else ()),
                    ],
                    part.is_response,
                )
                for index, part in enumerate(parts)
            ]
            for parts in examples
        ]

    def _pieces(self, texts: list[str], firsts: set[int]) -> list[list[int]]:
        if self._alike:
            return self._ids(texts)
        starts = iter(self._ids([text for number, text in enumerate(texts) if number in firsts]))
        others = iter(self._behind_line_ends([text for number, text in enumerate(texts) if number not in firsts]))
        return [next(starts) if number in firsts else next(others) for number in range(len(texts))]

    def _behind_line_ends(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text in the middle of another."""
        size = len(self._line_end)
        behind = self._ids([f"\n{text}" for text in texts])
        return [
            ids[size:] if ids[:size] == self._line_end else self._ids([text])[0]  # joined with what follows
            for text, ids in zip(texts, behind, strict=True)
        ]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]


def _opening(tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    """What a tokenizer puts before every text, such as LLaMA's BOS."""
    bare, whole = (tokenizer("x", add_special_tokens=special)["input_ids"] for special in (False, True))
    ends = (end for end in range(len(whole)) if whole[end : end + len(bare)] == bare)
    return list(whole[: next(ends, 0)])


def _fitting(parts: list[EncodedPart], most: int) -> tuple[list[EncodedPart], bool, bool]:
    """(parts of at most `most` tokens in all, whether a prompt was cut, whether a response was cut or left out)."""
    length = kept = 0
    for number, part in enumerate(parts, start=1):
        length += len(part.ids)
        if part.is_response and length <= most:
            kept = number
    if kept:
        return parts[:kept], False, kept < len(parts)
    prompts_before = next(number for number, part in enumerate(parts) if part.is_response)
    prompt = list(chain.from_iterable(part.ids for part in parts[:prompts_before]))
    response = parts[prompts_before].ids
    room, response_cut = most - len(response), False
    if room < min(1, len(prompt)):  # the first token is scored only if one comes before it
        room, response_cut = min(len(prompt), most // 2), True
    prompt_cut = room < len(prompt)
    if prompt_cut:
        tail = room // 2
        prompt = prompt[: room - tail] + prompt[len(prompt) - tail :]
    fitting = [EncodedPart(prompt, False), EncodedPart(response[: most - len(prompt)], True)]
    return fitting, prompt_cut, response_cut or prompts_before + 1 < len(parts)
