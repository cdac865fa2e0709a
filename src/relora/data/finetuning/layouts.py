"""Layouts of instruction data: which columns of a record hold the messages of a conversation.

    alpaca      instruction, input (may be missing), output        Taori et al. 2023, Stanford Alpaca
    dolly       instruction, context (may be missing), response    Conover et al. 2023, databricks-dolly-15k
    chat        messages [{role, content}], or ShareGPT's conversations [{from, value}]; any number of turns
    columns     a prompt and a response, in columns that the user names
    completion  text, which is a response without a prompt

Except in completions, a column `system` or `system_prompt` gives the first message of the conversation, the system
message, if the messages have none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from relora.data.finetuning.records import Record
from relora.data.readers import column_names
from relora.errors import UserError
from relora.messages import short_name, short_repr

LayoutName = Literal["alpaca", "dolly", "chat", "columns", "completion"]

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",  # ShareGPT's name
    "assistant": "assistant",
    "gpt": "assistant",  # ShareGPT's name
    "tool": "tool",
}
"""Roles in records -> roles of `Message`."""

SYSTEM_COLUMNS = ("system", "system_prompt")
"""Columns that may hold a system message; the first one that has a text is used."""

MOST_MESSAGES = 1000
"""Most messages of a conversation."""

LONGEST_TEXT = 1 << 20
"""Most characters of a conversation: far more than any context, and few enough for their tokens to fit into memory."""

MARK = "\ufdd0"
"""A code point that Unicode reserves as no character. Texts that contain it are refused, so templates can use it to
mark where a text has to be split."""


class BadRecord(Exception):
    """A record cannot be used; the message says why, but not which record it is."""


class Message(NamedTuple):
    """One message of a conversation."""

    role: str
    """One of the values of `ROLES`."""
    content: str
    input: str = ""
    """Text that an instruction is about, such as Alpaca's column `input`."""


Conversation = tuple[Message, ...]


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

    def __str__(self) -> str:
        columns = [column for column in (self.prompt, self.input, self.response) if column is not None]
        return f"layout {self.name} ({', '.join(map(short_name, columns))})"

    @property
    def needed(self) -> set[str]:
        """The columns that every record must have."""
        return {self.response} if self.prompt is None else {self.prompt, self.response}

    def conversation(self, fields: Mapping[str, Any]) -> Conversation:
        """Return the messages of a record up to its last response that can be used; none if it has no such response.

        Raises:
            BadRecord: a column is missing, its value is not what the layout says, or the texts are too long.
        """
        if missing := sorted(self.needed - fields.keys()):
            raise BadRecord(f"no column `{short_name(missing[0])}`; there are {column_names(fields)}")
        messages = _messages(fields, self.response) if self.name == "chat" else self._one_turn(fields)
        if self.name != "completion" and not any(message.role == "system" for message in messages):
            system = next((text for column in SYSTEM_COLUMNS if (text := _text(fields, column))), None)
            messages = messages if system is None else [Message("system", system), *messages]
        if (length := sum(len(message.content) + len(message.input) for message in messages)) > LONGEST_TEXT:
            raise BadRecord(f"has {length:,} characters; one example has at most {LONGEST_TEXT:,}")
        return _up_to_last_response(messages)

    def _one_turn(self, fields: Mapping[str, Any]) -> list[Message]:
        """Return the prompt, unless the layout has none, and the response."""
        response = Message("assistant", _text(fields, self.response))
        if self.prompt is None:
            return [response]
        about = "" if self.input is None else _text(fields, self.input)
        return [Message("user", _text(fields, self.prompt), about), response]


KNOWN = (
    Layout("chat", "messages"),
    Layout("chat", "conversations"),
    Layout("alpaca", response="output", prompt="instruction", input="input"),
    Layout("dolly", response="response", prompt="instruction", input="context"),
    Layout("columns", response="completion", prompt="prompt"),
    Layout("columns", response="response", prompt="prompt"),
    Layout("columns", response="answer", prompt="question"),
    Layout("completion", "text"),
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
    if response is not None:
        if name not in ("auto", "columns"):
            raise UserError(f"layout {name} has columns of its own; name columns with the layout `columns` only")
        candidates = [Layout("completion", response) if prompt is None else Layout("columns", response, prompt)]
    elif prompt is not None:
        raise UserError(f"column `{short_name(prompt)}` holds the prompts; name the responses' column, too")
    else:
        candidates = [layout for layout in KNOWN if name in ("auto", layout.name)]
    fitting = [layout for layout in candidates if layout.needed <= first.fields.keys()]
    if fitting:
        return fitting[0]
    there = f"{first.where}: there are the columns {column_names(first.fields)}"
    if len(candidates) == 1:
        lacking = column_names(sorted(candidates[0].needed - first.fields.keys()))
        raise UserError(f"{there}; layout {candidates[0].name} also needs {lacking}")
    if name == "auto":
        raise UserError(f"{there}, which is no known layout; name the prompt's and the response's column")
    wanted = " or ".join(column_names(sorted(layout.needed)) for layout in candidates)
    mend = ", or columns named by you" if name == "columns" else ""
    raise UserError(f"{there}; layout {name} needs {wanted}{mend}")


def _messages(fields: Mapping[str, Any], column: str) -> list[Message]:
    """Read the messages in a column of the layout chat; raise `BadRecord` if it does not hold messages."""
    value = fields[column]
    if not isinstance(value, list):
        raise BadRecord(f"`{column}` is not a list of messages but {type(value).__name__}")
    if len(value) > MOST_MESSAGES:
        raise BadRecord(f"`{column}` has {len(value):,} messages; one example has at most {MOST_MESSAGES:,}")
    messages = []
    for number, entry in enumerate(value, start=1):
        if not isinstance(entry, dict):
            raise BadRecord(f"message {number} of `{column}` is not an object")
        role, content = ("role", "content") if "role" in entry else ("from", "value")
        if role not in entry or content not in entry:
            raise BadRecord(f"message {number} of `{column}` has neither role and content nor from and value")
        if not isinstance(entry[role], str) or entry[role] not in ROLES:
            raise BadRecord(
                f"message {number} of `{column}` is from {short_repr(entry[role])}; known are {', '.join(ROLES)}"
            )
        messages.append(Message(ROLES[entry[role]], _text(entry, content)))
    return messages


def _up_to_last_response(messages: list[Message]) -> Conversation:
    """Return the messages up to the last response that stands before the first blank response.

    Messages behind the last response have nothing to score, and messages behind a blank one answer a missing text.
    """
    end = 0
    for number, message in enumerate(messages, start=1):
        if message.role == "assistant":
            if not message.content.strip():
                break
            end = number
    return tuple(messages[:end])


def _text(fields: Mapping[str, Any], column: str) -> str:
    """Return the text in a column, empty if the column is missing or null; raise `BadRecord` if it is not a text."""
    value = fields.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRecord(f"`{short_name(column)}` is not text but {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRecord(f"`{short_name(column)}` holds half of a surrogate pair") from None
    if MARK in value:
        raise BadRecord(f"`{short_name(column)}` holds U+FDD0, which is no character")
    return value
