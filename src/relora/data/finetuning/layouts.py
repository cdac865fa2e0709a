"""What a record says: the columns of the usual instruction sets, read as one conversation.

    alpaca      instruction, input (may be missing), output        Taori et al. 2023, Stanford Alpaca
    dolly       instruction, context (may be missing), response    Conover et al. 2023, databricks-dolly-15k
    chat        messages [{role, content}], or ShareGPT's conversations [{from, value}]; any number of turns
    columns     a prompt and a response, in columns by name
    completion  text

A column `system` or `system_prompt` beside them opens the conversation.
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
    "human": "user",  # ShareGPT's
    "assistant": "assistant",
    "gpt": "assistant",  # ShareGPT's
    "tool": "tool",
}
SYSTEM_COLUMNS = ("system", "system_prompt")

MOST_MESSAGES = 1000

LONGEST_TEXT = 1 << 20
"""Characters of a conversation: far beyond any context, and well below what would fill the memory as tokens."""

MARK = "\ufdd0"
"""A code point that is no character, now or ever: no text holds it, so that templates can part texts by it."""


class BadRecord(Exception):
    """Why a record cannot be used, without its place."""


class Message(NamedTuple):
    """One message of a conversation."""

    role: str
    content: str
    input: str = ""
    """Of an instruction: what it is about."""


Conversation = tuple[Message, ...]


@dataclass(frozen=True)
class Layout:
    """Which columns hold what."""

    name: LayoutName
    response: str
    """The column with the response; of chat the messages, of completion the text."""
    prompt: str | None = None
    input: str | None = None

    def __str__(self) -> str:
        columns = [column for column in (self.prompt, self.input, self.response) if column is not None]
        return f"layout {self.name} ({', '.join(map(short_name, columns))})"

    @property
    def needed(self) -> set[str]:
        """Columns that every record has."""
        return {self.response} if self.prompt is None else {self.prompt, self.response}

    def conversation(self, fields: Mapping[str, Any]) -> Conversation:
        """What a record says, up to its last usable response; empty where there is none, or it is blank.

        `BadRecord` where a column is missing or not what the layout says.
        """
        if missing := sorted(self.needed - fields.keys()):
            raise BadRecord(f"no column `{short_name(missing[0])}`; there are {column_names(fields)}")
        messages = _messages(fields, self.response) if self.name == "chat" else self._one_turn(fields)
        if self.name != "completion" and not any(message.role == "system" for message in messages):
            system = next((text for column in SYSTEM_COLUMNS if (text := _text(fields, column))), None)
            messages = messages if system is None else [Message("system", system), *messages]
        if (length := sum(len(message.content) + len(message.input) for message in messages)) > LONGEST_TEXT:
            raise BadRecord(f"has {length:,} characters; one example has at most {LONGEST_TEXT:,}")
        return _with_responses(messages)

    def _one_turn(self, fields: Mapping[str, Any]) -> list[Message]:
        response = Message("assistant", _text(fields, self.response))
        if self.prompt is None:
            return [response]
        about = "" if self.input is None else _text(fields, self.input)
        return [Message("user", _text(fields, self.prompt), about), response]


KNOWN = (
    Layout("chat", "messages"),
    Layout("chat", "conversations"),
    Layout("alpaca", "output", "instruction", "input"),
    Layout("dolly", "response", "instruction", "context"),
    *(
        Layout("columns", response, prompt)
        for prompt, response in (("prompt", "completion"), ("prompt", "response"), ("question", "answer"))
    ),
    Layout("completion", "text"),
)
"""In the order in which they are tried."""


def find_layout(
    first: Record, name: LayoutName | Literal["auto"] = "auto", prompt: str | None = None, response: str | None = None
) -> Layout:
    """The layout of a data set by its first record; `UserError`, which names the columns there are, if none fits.

    `prompt` and `response` name the columns of the layout `columns`; `response` alone, one of completions.
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


def _with_responses(messages: list[Message]) -> Conversation:
    """Up to the last response, and before the first blank one: what follows has nothing to score, or no meaning."""
    end = 0
    for number, message in enumerate(messages, start=1):
        if message.role == "assistant":
            if not message.content.strip():
                break
            end = number
    return tuple(messages[:end])


def _text(fields: Mapping[str, Any], column: str) -> str:
    """A text; empty where there is none."""
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
