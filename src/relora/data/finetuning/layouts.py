"""Layouts of instruction data: which columns of a record hold the messages of a conversation.

    alpaca      instruction, input (may be missing), output        Taori et al. 2023, Stanford Alpaca
    dolly       instruction, context (may be missing), response    Conover et al. 2023, databricks-dolly-15k
    chat        messages [{role, content}], or ShareGPT's conversations [{from, value}]; any number of turns; or
                UltraChat's data, a list of texts, which the user and the assistant wrote in turn
    columns     a prompt and a response, in columns that the user names; question, context (may be missing), answer;
                input, a list of messages, and output (Nemotron)
    completion  text, which is a response without a prompt

Except in completions, a column `system` or `system_prompt` gives the first message of the conversation, the system
message, if the messages have none, and a column `tools` (or `functions`) describes the tools that may be called. In the
layouts with a prompt and a response, either may also be a list of messages, as in TRL; the responses in the prompt are
then seen and not scored. Other columns with a value are returned as not used.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from relora.data.finetuning.messages import (
    BadRecord,
    Message,
    checked_text,
    content_text,
    nested_texts,
    read_messages,
    read_tools,
)
from relora.data.finetuning.record_notes import unused_columns
from relora.data.finetuning.records import Record
from relora.data.readers import column_names
from relora.errors import UserError
from relora.messages import short_name

LayoutName = Literal["alpaca", "dolly", "chat", "columns", "completion"]

SYSTEM_COLUMNS = ("system", "system_prompt")
"""Columns that may hold a system message; the first one that has a text is used."""

HISTORY = "history"
"""Column of the earlier turns in alpaca's layout, pairs of prompt and response (LLaMA-Factory)."""

LONGEST_TEXT = 1 << 20
"""Most characters of a conversation: far more than any context, and few enough for their tokens to fit into memory."""

BEHIND_LAST = "messages left out behind the last response that is scored"
BEHIND_BLANK = "messages left out because they are a blank response or stand behind one"
UNSCORED = "responses seen and not scored, by their `weight`, `train` or `loss`, or since they stand in the prompt"

PREFERENCES = (("chosen", "rejected"), ("preferred_output", "non_preferred_output"), ("prompt", "completion", "label"))
"""Columns by which preference data is told: pairs (DPO, reward models), and single judged responses (KTO)."""


@dataclass(frozen=True)
class Conversation:
    """The messages of a record up to its last response that is scored, and what became of the rest of the record."""

    messages: tuple[Message, ...]
    """Empty if no response can be scored."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """Descriptions of the tools that may be called; only chat templates can write them."""
    unused: tuple[str, ...] = ()
    """Names of columns with a value that is not used."""
    noticed: tuple[str, ...] = ()
    """Reasons why messages are left out or not scored, one entry for each message."""


@dataclass(frozen=True)
class Layout:
    """The columns that hold the parts of a conversation."""

    name: LayoutName
    response: str
    """Column of the response; in the layout chat, of the messages; in the layout completion, of the text."""
    prompt: str | None = None
    """Column of the prompt; None in the layouts chat and completion."""
    input: str | None = None
    """Column of a text that the prompt is about; a record may lack it."""
    listed: str | None = None
    """Column that must hold a list for the layout to be found by it, since its name is that of much else, too."""

    def __str__(self) -> str:
        columns = [column for column in (self.prompt, self.input, self.response) if column is not None]
        return f"layout {self.name} ({', '.join(map(short_name, columns))})"

    @property
    def needed(self) -> set[str]:
        """The columns that every record must have."""
        return {self.response} if self.prompt is None else {self.prompt, self.response}

    def fits(self, fields: Mapping[str, Any]) -> bool:
        """Tell whether a record has the columns, and a list where the layout is told by one."""
        return self.needed <= fields.keys() and (self.listed is None or isinstance(fields[self.listed], list))

    def conversation(self, fields: Mapping[str, Any]) -> Conversation:
        """Return the messages of a record up to its last response that is scored; none if it has no such response.

        Raises:
            BadRecord: a column is missing, its value is not what the layout says, or the texts are too long.
        """
        if missing := sorted(self.needed - fields.keys()):
            raise BadRecord(f"no column `{short_name(missing[0])}`; there are {column_names(fields)}")
        messages = self._messages(fields)
        used = {column for column in (self.prompt, self.input, self.response) if column is not None}
        tools: tuple[Mapping[str, Any], ...] = ()
        if self.name == "alpaca":
            used.add(HISTORY)
        if self.name != "completion":
            tools = read_tools(fields)
            used.add("tools" if fields.get("tools") else "functions")
        if self.name != "completion" and not any(message.role in ("system", "developer") for message in messages):
            column = next((column for column in SYSTEM_COLUMNS if content_text(fields.get(column), column)), None)
            if column is not None:
                used.add(column)
                messages = [Message("system", content_text(fields[column], column)), *messages]
        chars = sum(len(message.content) + len(message.input) for message in messages)
        chars += sum(map(len, nested_texts([[message.extra for message in messages], tools], -4)))
        if chars > LONGEST_TEXT:
            raise BadRecord(f"has {chars:,} characters; one example has at most {LONGEST_TEXT:,}")
        kept, noticed = _up_to_last_response(messages)
        return Conversation(kept, tools, tuple(unused_columns(fields, used)), noticed)

    def _messages(self, fields: Mapping[str, Any]) -> list[Message]:
        """Return all messages of a record, without those of columns that may give a system message."""
        if self.name == "chat":
            value = fields[self.response]
            return read_messages(_by_turns(value) if self.listed else value, self.response)
        response = fields[self.response]
        answers = (
            read_messages(response, self.response)
            if isinstance(response, list) and self.name != "completion"
            else [Message("assistant", checked_text(response, short_name(self.response)))]
        )
        if self.prompt is None:
            return answers
        prompt = fields[self.prompt]
        if isinstance(prompt, list):  # what is scored is the completion, as in TRL
            return [*read_messages(prompt, self.prompt, scored=False), *answers]
        about = "" if self.input is None else checked_text(fields.get(self.input), short_name(self.input))
        about = about if about.strip() else ""
        asked = Message("user", checked_text(prompt, short_name(self.prompt)), about)
        return [*(_history(fields.get(HISTORY)) if self.name == "alpaca" else []), asked, *answers]


KNOWN = (
    Layout("chat", "messages"),
    Layout("chat", "conversations"),
    Layout("chat", "conversation"),
    Layout("alpaca", response="output", prompt="instruction", input="input"),
    Layout("dolly", response="response", prompt="instruction", input="context"),
    Layout("columns", response="completion", prompt="prompt"),
    Layout("columns", response="response", prompt="prompt"),
    Layout("columns", response="answer", prompt="question", input="context"),
    Layout("completion", "text"),
    Layout("columns", response="output", prompt="input", listed="input"),  # Nemotron
    Layout("chat", "data", listed="data"),  # UltraChat
)
"""The layouts that are found by their columns, in the order in which they are tried."""


def find_layout(
    first: Record, name: LayoutName | Literal["auto"] = "auto", prompt: str | None = None, response: str | None = None
) -> Layout:
    """Find the layout of a data set by the columns of its first record.

    Args:
        first: the first record.
        name: the layout to use, or `auto`: the first of `KNOWN` whose columns the record has.
        prompt: with `response`, the columns of the layout `columns`.
        response: without `prompt`, the column of completions.

    Raises:
        UserError: no layout fits; the message names the columns that the record has.
    """
    if response is None and name == "auto":
        _refuse_preferences(first)
    if response is not None:
        if name not in ("auto", "columns"):
            raise UserError(f"layout {name} has columns of its own; name columns with the layout `columns` only")
        is_chat = prompt is None and isinstance(first.fields.get(response), list)
        alone = Layout("chat" if is_chat else "completion", response)
        candidates = [alone if prompt is None else Layout("columns", response, prompt)]
    elif prompt is not None:
        raise UserError(f"column `{short_name(prompt)}` holds the prompts; name the responses' column, too")
    else:
        candidates = [layout for layout in KNOWN if name in ("auto", layout.name)]
    fitting = [layout for layout in candidates if layout.fits(first.fields)]
    if fitting:
        return fitting[0]
    there = f"{first.where}: there are the columns {column_names(first.fields)}"
    if len(candidates) == 1:
        lacking = column_names(sorted(candidates[0].needed - first.fields.keys()))
        raise UserError(f"{there}; layout {candidates[0].name} also needs {lacking}")
    if name == "auto":
        raise UserError(
            f"{there}, which is no known layout; name the prompt's and the response's column (data.layout: columns, "
            "data.prompt_column, data.response_column)"
        )
    wanted = " or ".join(column_names(sorted(layout.needed)) for layout in candidates if layout.listed is None)
    mend = ", or columns named by you" if name == "columns" else ""
    raise UserError(f"{there}; layout {name} needs {wanted}{mend}")


def _refuse_preferences(first: Record) -> None:
    """Raise `UserError` if a data set says which of its responses are good ones: none is trained on as if it were."""
    for columns in PREFERENCES:
        if not set(columns) <= first.fields.keys():
            continue
        if columns[-1] == "label" and not isinstance(first.fields["label"], bool):
            continue
        raise UserError(
            f"{first.where}: the columns {column_names(columns)} are preference data (DPO, KTO, reward models), which "
            "is not trained on here; to train on one column's responses, name it as data.response_column (and "
            "data.prompt_column)"
        )


def _by_turns(value: Any) -> Any:
    """Return a list of texts alone as messages, which the user begins; another value as it is."""
    if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
        return value
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(value)]


def _history(value: Any) -> list[Message]:
    """Return the earlier turns of an alpaca record: a list of [prompt, response]; `BadRecord` if it is none."""
    messages = []
    for pair in [] if value is None else value if isinstance(value, list) else [value]:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRecord(f"`{HISTORY}` is not a list of pairs of a prompt and a response")
        prompt, response = (checked_text(text, HISTORY) for text in pair)
        messages += [Message("user", prompt), Message("assistant", response)]
    return messages


def _up_to_last_response(messages: list[Message]) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """Return the messages up to the last scored response that stands before the first blank one.

    Messages behind the last response have nothing to score, and messages behind a blank one answer a missing text.

    Returns:
        The messages, and for each that is left out why; without messages, whether there are responses at all.
    """
    end, blank = 0, len(messages)
    for number, message in enumerate(messages, start=1):
        if message.role == "assistant":
            if message.is_blank:
                blank = number - 1
                break
            if message.is_scored:
                end = number
    if not end:
        unscored = any(message.role == "assistant" for message in messages[:blank])
        return (), ("responses, none of which is scored",) if unscored else ()
    unscored_count = sum(message.role == "assistant" and not message.is_scored for message in messages[:end])
    noticed = [BEHIND_LAST] * (blank - end) + [BEHIND_BLANK] * (len(messages) - blank) + [UNSCORED] * unscored_count
    return tuple(messages[:end]), tuple(noticed)
