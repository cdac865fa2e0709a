"""Encode records as examples: a layout reads the record, a template writes it, and the tokenizer encodes each part.

    record -> conversation (`layouts`) -> prompts and responses (`templates`) -> tokens, of which responses are scored

Prompts and responses are encoded separately, so no token contains characters of both, and a prompt has the same ids as
in generation. Most tokenizers encode a text in the same way at every position. Tokenizers of the SentencePiece kind put
a space before the first word of a text; there, every part but the first is encoded behind a line end, whose ids are
then removed. Control tokens act as such only where a chat template wrote them. (Tokenizers that do not reproduce texts
exactly, such as T5's, which treats line ends as spaces, are not more exact here.)

An example that does not fit into a sequence is cut so that the response is kept: of several turns, the first ones that
fit are kept; of a single turn, the middle of the prompt is left out; only a response that alone is too long loses its
end.
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
    """Settings by which records become examples."""

    layout: LayoutName | Literal["auto"] = "auto"
    """`auto` chooses the layout by the columns of the first record."""
    template: TemplateName | Literal["auto"] = "auto"
    """`auto` is the tokenizer's chat template if it has one, else alpaca."""
    loss_on: Literal["response", "all"] = "response"
    """The tokens that are scored: those of the responses, or all."""
    prompt_column: str | None = None
    """Column of the prompt in the layout `columns`; needs `response_column`."""
    response_column: str | None = None
    """Column of the response in the layout `columns`; without `prompt_column`, the column of completions."""


@dataclass(frozen=True)
class ExampleCounts:
    """Numbers of records: read, used, left out and cut."""

    read: int
    used: int
    bad: int
    """Records left out because they could not be used."""
    empty: int
    """Records left out because they have no response."""
    prompt_cut: int
    """Records used without the middle of the prompt."""
    response_cut: int
    """Records used without the end of the response, or without the later ones of several turns."""

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
    """The examples of a data set, with the layout and the template by which they were made."""

    examples: tuple[Example, ...]
    counts: ExampleCounts
    layout: Layout
    template: str
    """Name of the template."""

    def __str__(self) -> str:
        return f"{self.layout}, template {self.template}: {self.counts}"


class Prompt(NamedTuple):
    """A prompt for a model, and the response expected of it."""

    input_ids: list[int]
    response: str
    where: str
    """Place of the record, for messages."""


def encode(
    records: Iterable[Record],
    tokenizer: "PreTrainedTokenizerFast",
    form: InstructionForm,
    *,
    sequence_length: int,
    skip_bad: bool = False,
) -> InstructionSet:
    """Encode records as examples, in their order.

    Args:
        records: the records of one data set; the first one decides the layout.
        tokenizer: encodes the texts; may have the chat template.
        form: settings of layout, template and loss.
        sequence_length: most tokens of an example.
        skip_bad: leave out records that cannot be used and count them, instead of refusing them.

    Raises:
        UserError: the layout or the template does not fit, no record can be used, or one is bad (unless `skip_bad`).
    """
    if sequence_length < 2:
        raise UserError(f"sequence_length is {sequence_length}: an example needs at least 2 tokens")
    reader = _Reader(records, tokenizer, form, skip_bad)
    examples = []
    for record, _, parts in reader.encoded():
        parts, prompt_cut, response_cut = _fitting(parts, sequence_length)
        reader.counts.update(prompt_cut=prompt_cut, response_cut=response_cut)
        ids = np.fromiter(chain.from_iterable(part.ids for part in parts), dtype=np.int32)
        part_is_scored = [part.is_response or form.loss_on == "all" for part in parts]
        scored = np.repeat(np.array(part_is_scored), [len(part.ids) for part in parts])
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
    """Yield the prompt before the last response of each record, and this response.

    A prompt is encoded as by `encode`, with all earlier turns, and is not cut. See `encode` for arguments and errors;
    in addition, completions are refused.
    """
    reader = _Reader(records, tokenizer, form, skip_bad)
    if reader.layout.name == "completion":
        raise UserError(f"{reader.layout}: completions have no prompt that a model could be asked")
    for record, conversation, parts in reader.encoded():
        ids = list(chain.from_iterable(part.ids for part in parts[:-1]))
        yield Prompt(ids, conversation[-1].content, record.where)


def render_example(example: Example, tokenizer: "PreTrainedTokenizerFast") -> str:
    """Return an example as text for a terminal: special tokens written out, scored parts between ⟦ and ⟧.

    Control characters are escaped, so that they have no effect on the terminal.
    """
    borders = np.flatnonzero(np.diff(example.scored.astype(np.int8))) + 1
    pieces, decoded = [], ""
    for start, end in zip([0, *borders.tolist()], [*borders.tolist(), len(example.input_ids)], strict=True):
        # Always from the first token on, since some decoders drop a space before the first word.
        text = tokenizer.decode(example.input_ids[:end].tolist(), clean_up_tokenization_spaces=False)
        piece = _printable(text[len(decoded) :])
        pieces.append(f"⟦{piece}⟧" if example.scored[start] else piece)
        decoded = text
    scored = int(example.scored.sum())
    return f"{example.where}: {len(example.input_ids)} tokens, {scored} scored\n{''.join(pieces)}"


def _printable(text: str) -> str:
    """Escape all characters that are neither printable nor a line end or tab."""

    def escaped(char: str) -> str:
        return char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode()

    return "".join(map(escaped, text))


class EncodedPart(NamedTuple):
    """The ids of a part of an example."""

    ids: list[int]
    is_response: bool


class _Reader:
    """Read records by a layout and encode them by a template; the first record decides the layout.

    See `encode` for the arguments. `counts` has the numbers of records by what became of them.
    """

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
        """Yield each record that has a response, its conversation and its encoded parts.

        About `CHUNK_CHARS` characters of text are encoded at a time.
        """
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
        """Encode the records that have been collected."""
        encoded = self._encoder.encode([parts for _, _, parts in waiting])
        for (record, conversation, _), parts in zip(waiting, encoded, strict=True):
            yield record, conversation, parts

    def _bad(self, message: str) -> None:
        """Refuse a record that cannot be used, or count it."""
        if not self._skip_bad:
            raise UserError(f"{message} (skip_bad leaves such records out)")
        self.counts["bad"] += 1


class PartEncoder:
    """Encode the parts of examples: the first one as the beginning of a text, the others as its continuation.

    Args:
        tokenizer: encodes the texts.
        is_chat: whether the parts come from a chat template: control tokens in them then act as such, and the
            tokenizer's own beginning of a text, such as BOS, is not added.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", *, is_chat: bool) -> None:
        self._backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = not is_chat
        self._eos: int = tokenizer.eos_token_id
        self._opening = [] if is_chat else _opening(tokenizer)
        self._line_end = self._ids(["\n"])[0]
        self._is_position_independent = self._continuation_ids(["x"]) == self._ids(["x"])

    def encode(self, examples: Sequence[list[Part]]) -> list[list[EncodedPart]]:
        """Return the ids of all parts of each example, including BOS where the tokenizer has it, and EOS."""
        pieces: list[str] = []  # the parts of all examples, split at MARK
        beginnings = set()  # numbers of the pieces with which an example begins
        for parts in examples:
            beginnings.add(len(pieces))
            pieces += [piece for part in parts for piece in part.text.split(MARK)]
        piece_ids = iter(self._piece_ids(pieces, beginnings))
        return [self._encoded_parts(parts, piece_ids) for parts in examples]

    def _encoded_parts(self, parts: list[Part], piece_ids: Iterator[list[int]]) -> list[EncodedPart]:
        """Join the ids of the pieces of one example, which are next in `piece_ids`, to those of its parts."""
        encoded = []
        for number, part in enumerate(parts):
            ids = list(self._opening) if number == 0 else []
            for _ in range(part.text.count(MARK) + 1):
                ids += next(piece_ids)
            if part.eos:
                ids.append(self._eos)
            encoded.append(EncodedPart(ids, part.is_response))
        return encoded

    def _piece_ids(self, pieces: list[str], beginnings: set[int]) -> list[list[int]]:
        """Return the ids of each piece, as the beginning of a text if its number is in `beginnings`."""
        if self._is_position_independent:
            return self._ids(pieces)
        first = iter(self._ids([piece for number, piece in enumerate(pieces) if number in beginnings]))
        later = iter(self._continuation_ids([piece for number, piece in enumerate(pieces) if number not in beginnings]))
        return [next(first) if number in beginnings else next(later) for number in range(len(pieces))]

    def _continuation_ids(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text as the continuation of another text.

        Each text is encoded behind a line end, whose ids are removed. If the line end forms one token with the
        beginning of the text, the text is encoded alone.
        """
        size = len(self._line_end)
        behind_line_end = self._ids([f"\n{text}" for text in texts])
        return [
            ids[size:] if ids[:size] == self._line_end else self._ids([text])[0]
            for text, ids in zip(texts, behind_line_end, strict=True)
        ]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """Return the tokenizer's ids of each text, without special tokens added."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]


def _opening(tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    """Return the ids that a tokenizer puts before every text, such as LLaMA's BOS."""
    bare, whole = (tokenizer("x", add_special_tokens=special)["input_ids"] for special in (False, True))
    ends = (end for end in range(len(whole)) if whole[end : end + len(bare)] == bare)
    return list(whole[: next(ends, 0)])


def _fitting(parts: list[EncodedPart], most: int) -> tuple[list[EncodedPart], bool, bool]:
    """Cut an example to at most `most` tokens, as the module says.

    Returns:
        The parts, whether a prompt was cut, and whether a response was cut or left out.
    """
    length = kept = 0
    for number, part in enumerate(parts, start=1):
        length += len(part.ids)
        if part.is_response and length <= most:
            kept = number
    if kept:
        return parts[:kept], False, kept < len(parts)
    first_response = next(number for number, part in enumerate(parts) if part.is_response)
    prompt = list(chain.from_iterable(part.ids for part in parts[:first_response]))
    response = parts[first_response].ids
    prompt_room, response_cut = most - len(response), False
    # One token of the prompt has to be kept, because the first token of an example is not scored.
    if prompt_room < min(1, len(prompt)):
        prompt_room, response_cut = min(len(prompt), most // 2), True
    prompt_cut = prompt_room < len(prompt)
    if prompt_cut:
        tail = prompt_room // 2
        prompt = prompt[: prompt_room - tail] + prompt[len(prompt) - tail :]
    fitting = [EncodedPart(prompt, False), EncodedPart(response[: most - len(prompt)], True)]
    return fitting, prompt_cut, response_cut or first_response + 1 < len(parts)
