"""Encode records as examples: a layout reads the record, a template writes it, and the tokenizer encodes it.

    record -> conversation (`layouts`) -> prompts and responses (`templates`, `chat_template`) -> tokens (`encoding`)

Of the tokens those of responses are scored. A conversation is one example, or several where it cannot be one.

An example that does not fit into a sequence is cut so that the response is kept: of several turns, the first ones that
fit are kept; of a single turn, the middle of the prompt is left out; only a response that alone is too long loses its
end.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from relora.data.finetuning.encoding import Encoded
from relora.data.finetuning.examples import Example
from relora.data.finetuning.layouts import Conversation, Layout, LayoutName, find_layout
from relora.data.finetuning.messages import BadRecord
from relora.data.finetuning.record_notes import RecordNotes
from relora.data.finetuning.records import SKIP_OPTION, Record
from relora.data.finetuning.templates import TemplateName
from relora.data.finetuning.writer import Writer, Written, find_writer
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
    """Examples without the middle of the prompt."""
    response_cut: int
    """Examples without the end of the response, or without the later ones of several turns."""
    unscored: int = 0
    """Records left out because no response is scored."""
    examples: int | None = None
    """Number of examples, if it is not that of the records used."""

    def __str__(self) -> str:
        left_out = {"with no response": self.empty, "with no response that is scored": self.unscored, "bad": self.bad}
        several = "" if self.examples is None else f" as {self.examples:,} examples"
        cut = {"in the prompt": self.prompt_cut, "in the response": self.response_cut}
        return "; ".join(
            [
                f"{self.used:,} of {self.read:,} records used{several}",
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
    notes: tuple[str, ...] = ()
    """Lines about what of the records is not used, or was changed."""

    def __str__(self) -> str:
        return f"{self.layout}, template {self.template}: {self.counts}"


SEVERAL = (
    "conversations that became several examples, because an earlier turn is written otherwise once it is history "
    "(by the chat template, or by the tokenizer)"
)


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
    skip_bad: bool | None = None,
) -> InstructionSet:
    """Encode records as examples, in their order.

    Args:
        records: the records of one data set; the first one decides the layout.
        tokenizer: encodes the texts; may have the chat template.
        form: settings of layout, template and loss.
        sequence_length: most tokens of an example.
        skip_bad: leave out records that cannot be used and count them, instead of refusing them. None refuses them in
            a command that has no such option, so the message does not name it.

    Raises:
        UserError: the layout or the template does not fit, no record can be used, or one is bad (unless `skip_bad`).
    """
    if sequence_length < 2:
        raise UserError(f"sequence_length is {sequence_length}: an example needs at least 2 tokens")
    reader = _Reader(records, tokenizer, form, skip_bad)
    examples = []
    for record, _, encoded in reader.encoded():
        for one in encoded:
            kept, prompt_cut, response_cut = _fitting(one, sequence_length)
            reader.counts.update(prompt_cut=prompt_cut, response_cut=response_cut)
            ids = np.array(one.ids, dtype=np.int32)[kept]
            scored = one.scored(prompts=form.loss_on == "all")[kept]
            examples.append(Example(ids, scored, record.where))
    count = reader.counts
    counts = ExampleCounts(
        read=count["read"],
        used=count["used"],
        bad=count["bad"],
        empty=count["empty"],
        prompt_cut=count["prompt_cut"],
        response_cut=count["response_cut"],
        unscored=count["unscored"],
        examples=None if len(examples) == count["used"] else len(examples),
    )
    if not examples:
        raise UserError(f"no example is left to use: {counts}")
    return InstructionSet(tuple(examples), counts, reader.layout, reader.writer.name, reader.noticed.lines)


def prompts(
    records: Iterable[Record],
    tokenizer: "PreTrainedTokenizerFast",
    form: InstructionForm,
    *,
    skip_bad: bool | None = None,
) -> Iterator[Prompt]:
    """Yield the prompt before the last scored response of each record, and this response.

    A prompt is encoded as by `encode`, with all earlier turns, and is not cut. See `encode` for arguments and errors;
    in addition, completions are refused.
    """
    reader = _Reader(records, tokenizer, form, skip_bad)
    if reader.layout.name == "completion":
        raise UserError(f"{reader.layout}: completions have no prompt that a model could be asked")
    for record, written, encoded in reader.encoded():
        yield Prompt(encoded[-1].ids[: encoded[-1].asked], written.response, record.where)


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


class _Reader:
    """Read records by a layout and encode them by a template; the first record decides the layout.

    See `encode` for the arguments. `counts` has the numbers of records by what became of them, `noticed` what is not
    used of them.
    """

    def __init__(
        self,
        records: Iterable[Record],
        tokenizer: "PreTrainedTokenizerFast",
        form: InstructionForm,
        skip_bad: bool | None,
    ) -> None:
        self._records = iter(records)
        first = next(self._records, None)
        if first is None:
            raise UserError("there is no record to use")
        self._records = chain([first], self._records)
        self.layout = find_layout(first, form.layout, form.prompt_column, form.response_column)
        self.writer: Writer = find_writer(form.template, self.layout, tokenizer)
        self._skip_bad = skip_bad
        self.counts: Counter[str] = Counter()
        self.noticed = RecordNotes()

    def encoded(self) -> Iterator[tuple[Record, Written, list[Encoded]]]:
        """Yield each record that has a response, what was written of it, and its examples.

        About `CHUNK_CHARS` characters of text are encoded at a time.
        """
        waiting: list[tuple[Record, Written]] = []
        chars = 0
        for record in self._records:
            self.counts["read"] += 1
            try:
                conversation = self.layout.conversation(record.fields)
                written = self.writer.write(conversation) if conversation.messages else None
            except BadRecord as error:
                self._bad(f"{record.where}: {error}")
                continue
            if written is None:
                self.counts["unscored" if conversation.noticed else "empty"] += 1
                continue
            self.noticed.add(record.where, *_noticed(conversation, written))
            waiting.append((record, written))
            chars += written.chars
            if chars >= CHUNK_CHARS:
                yield from self._encode(waiting)
                waiting, chars = [], 0
        yield from self._encode(waiting)

    def _encode(self, waiting: list[tuple[Record, Written]]) -> Iterator[tuple[Record, Written, list[Encoded]]]:
        """Encode the records that have been collected."""
        for (record, written), examples in zip(waiting, self.writer.encode([one for _, one in waiting]), strict=True):
            self.counts["used"] += 1
            if len(examples) > 1:
                self.noticed.add(record.where, (), [SEVERAL])
            yield record, written, examples

    def _bad(self, message: str) -> None:
        """Refuse a record that cannot be used, or count it."""
        if not self._skip_bad:
            raise UserError(message if self._skip_bad is None else f"{message} ({SKIP_OPTION} leaves such records out)")
        self.counts["bad"] += 1


def _noticed(conversation: Conversation, written: Written) -> tuple[list[str], list[str]]:
    """Return what of a record is not used, and what became of its messages."""
    return [*conversation.unused, *written.unused], [*conversation.noticed, *written.noticed]


def _fitting(example: Encoded, most: int) -> tuple[npt.NDArray[np.int64], bool, bool]:
    """Cut an example to at most `most` tokens, as the module says.

    Returns:
        The numbers of the tokens that are kept, whether a prompt was cut, and whether a response was cut or left out.
    """
    ends = [end for _, end in example.responses if end <= most]
    if ends:
        return np.arange(ends[-1]), False, ends[-1] < example.responses[-1][1]
    start, end = example.responses[0]
    room, response_cut = most - (end - start), False
    # One token of the prompt has to be kept, because the first token of an example is not scored.
    if room < min(1, start):
        room, response_cut = min(start, most // 2), True
    head = np.arange(start)
    if prompt_cut := room < start:
        tail = room // 2
        head = np.concatenate([head[: room - tail], head[start - tail :]])
    response = np.arange(start, min(end, start + most - len(head)))
    return np.concatenate([head, response]), prompt_cut, response_cut or len(example.responses) > 1
