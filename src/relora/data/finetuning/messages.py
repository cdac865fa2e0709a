"""Messages of a conversation: read from the objects in which records hold them.

    role            `role` or `from`; the names in `ROLES`, in small or capital letters
    text            `content` or `value`: a text, null, or a list of text parts, which are joined; without it `refusal`
    tool calls      `tool_calls`, OpenAI's older `function_call`, the text of ShareGPT's role function_call, or
                    Anthropic's parts of the type `tool_use`; results of tools may be parts of the type `tool_result`
    reasoning       `reasoning_content`, `thinking` or `reasoning`, or parts of the type `thinking`
    scored or not   `weight` (0 or 1: OpenAI, Mistral, Together), `train` (axolotl), `loss` (ms-swift, ChatGLM),
                    `trainable`: a response with a false one is seen and not scored

All other keys go to a chat template, which may write them. What is neither used nor written is named by whoever reads
the records (`relora.data.finetuning.record_notes`).
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from relora.messages import short_name, short_repr

ROLES = {
    "system": "system",
    "developer": "developer",  # OpenAI's newer name of the system's role
    "user": "user",
    "human": "user",  # ShareGPT's name
    "assistant": "assistant",
    "gpt": "assistant",  # ShareGPT's name
    "chatgpt": "assistant",  # its older one
    "model": "assistant",  # Gemini's and Gemma's name
    "function_call": "assistant",  # ShareGPT's name of a response that calls a tool
    "tool_call": "assistant",  # that of ms-swift
    "tool": "tool",
    "observation": "tool",  # ShareGPT's name
    "function": "tool",  # OpenAI's older name
    "tool_response": "tool",  # that of ms-swift
    "ipython": "tool",  # Llama 3's name
}
"""Roles in records -> roles of `Message`."""

CALL_ROLES = ("function_call", "tool_call")
"""Roles whose text spells tool calls."""

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Keys that may hold the reasoning before a response, in the order in which transformers looks for them."""

SCORE_KEYS = ("weight", "train", "loss", "trainable")
"""Keys that say whether a message is scored."""

DETAIL_KEYS = ("train_detail", "train_details")
"""Keys that score parts of a message (axolotl)."""

MOST_MESSAGES = 1000
"""Most messages of a conversation."""

MOST_NESTED = 50
"""Most levels of objects and lists in a message or a tool."""

MARK = "\ufdd0"
"""A code point that Unicode reserves as no character. Texts that contain it are refused, so templates can use it to
mark where a text has to be split."""


class BadRecord(Exception):
    """A record cannot be used; the message says why, but not which record it is."""


@dataclass(frozen=True)
class Message:
    """One message of a conversation."""

    role: str
    """One of the values of `ROLES`."""
    content: str
    input: str = ""
    """Text that an instruction is about, such as Alpaca's column `input`."""
    is_scored: bool = True
    """Whether it is scored, if it is a response."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Parts that only chat templates can write: `tool_calls`, with objects as arguments, `reasoning_content`, ..."""

    @property
    def is_blank(self) -> bool:
        """Whether there is nothing to write: no text, no tool call and no reasoning."""
        return not (self.content.strip() or self.extra.get("tool_calls") or self.reasoning.strip())

    @property
    def reasoning(self) -> str:
        """The reasoning before the response, empty if there is none."""
        return str(self.extra.get(REASONING_KEYS[0], ""))


def read_messages(value: Any, column: str, *, scored: bool = True) -> list[Message]:
    """Read a list of messages.

    Args:
        value: the value in the column, also as its JSON, which is how tables of text hold it.
        column: its name, for messages.
        scored: whether responses are scored, unless they say otherwise.

    Raises:
        BadRecord: it does not hold messages, or one of them cannot be used.
    """
    column = short_name(column)
    if isinstance(value, str):
        with contextlib.suppress(BadRecord):
            value = from_json(value, column)
    if not isinstance(value, list):
        raise BadRecord(f"`{column}` is not a list of messages but {type(value).__name__}")
    if len(value) > MOST_MESSAGES:
        raise BadRecord(f"`{column}` has {len(value):,} messages; one example has at most {MOST_MESSAGES:,}")
    messages = []
    for number, entry in enumerate(value, start=1):
        if not isinstance(entry, dict):
            raise BadRecord(f"message {number} of `{column}` is not an object")
        try:
            messages += [_message(one, scored) for one in _without_tool_parts(entry)]
        except BadRecord as error:
            separator = ": " if str(error).startswith("`") else " "
            raise BadRecord(f"message {number} of `{column}`{separator}{error}") from None
    return messages


def _message(entry: Mapping[str, Any], scored: bool) -> Message:
    """Read one message; `BadRecord` says what is wrong with it."""
    entry = {key: value for key, value in entry.items() if value is not None or key in ("content", "value")}
    role_key, content_key = "role" if "role" in entry else "from", "content" if "content" in entry else "value"
    calls = _tool_calls(entry)
    if entry.get("refusal") and not entry.get(content_key):
        entry[content_key] = entry.pop("refusal")
    if role_key not in entry or not (content_key in entry or calls):
        raise BadRecord("has neither role and content nor from and value")
    role = _role(entry[role_key])
    content, thinking = _content(entry.get(content_key), content_key)
    extra = {key: value for key, value in entry.items() if key not in _READ_KEYS and value not in ("", [], {})}
    if ROLES[role] != "assistant":  # it is not scored, so that it should be is left to be named as not used
        extra |= {key: entry[key] for key in SCORE_KEYS if entry.get(key)}
    if role in CALL_ROLES:
        calls, content = [_tool_call(call) for call in _calls_in_text(content)], ""
    if calls:
        extra["tool_calls"] = calls
    reasoning = next((entry[key] for key in REASONING_KEYS if key in entry), None) or thinking
    if reasoning:
        extra[REASONING_KEYS[0]] = checked_text(reasoning, "reasoning")
    if content is None:
        content, extra["content"] = "", None  # without a content for a chat template, as transformers does it
    check_nested(extra)
    return Message(ROLES[role], content, "", _is_scored(entry, scored), extra)


_READ_KEYS = frozenset(
    ("role", "from", "content", "value", "tool_calls", "function_call", *REASONING_KEYS, *SCORE_KEYS, *DETAIL_KEYS)
)


def _role(value: Any) -> str:
    """Return the role of a message, in small letters; `BadRecord` if it is none of `ROLES`."""
    role = value.lower() if isinstance(value, str) else ""
    if role not in ROLES:
        raise BadRecord(f"is from {short_repr(value)}; known are {', '.join(ROLES)}")
    return role


def _without_tool_parts(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return a message with its parts that call tools as `tool_calls`, behind one message for each result of a tool."""
    parts, role = entry.get("content"), str(entry.get("role")).lower()
    if not isinstance(parts, list):
        return [entry]
    calls: list[dict[str, Any]] = []
    results: list[Mapping[str, Any]] = []
    rest: list[Any] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "tool_use" and ROLES.get(role) == "assistant":
            function = {"name": part.get("name"), "arguments": part.get("input")}
            calls.append({"function": function} | ({"id": part["id"]} if "id" in part else {}))
        elif kind == "tool_result" and role == "user":
            others = {key: value for key, value in part.items() if key not in ("type", "content", "tool_use_id")}
            result = {"role": "tool", "content": part.get("content"), "tool_call_id": part.get("tool_use_id")}
            results.append(result | others)
        else:
            rest.append(part)
    if not (calls or results):
        return [entry]
    message = {**entry, "content": rest or None}
    if calls:
        message["tool_calls"] = calls
    return [*results, *([message] if rest or calls else [])]


def _is_scored(entry: Mapping[str, Any], scored: bool) -> bool:
    """Return whether a response is scored: unless one of `SCORE_KEYS` is false."""
    if detail := next((key for key in DETAIL_KEYS if key in entry), None):
        raise BadRecord(
            f"has `{detail}`: a message is scored as a whole or not at all; use `train: false`, or split it"
        )
    for key in SCORE_KEYS:
        value = entry.get(key)
        if value is not None and value not in (0, 1):
            raise BadRecord(f"has {short_repr(value)} as `{key}`; a message is scored (1, true) or not (0, false)")
        scored = scored and value != 0
    return scored


def _content(value: Any, key: str) -> tuple[str | None, str]:
    """Return the text and the reasoning in a message's content; the text is None if there is no content."""
    if value is None:
        return None, ""
    if not isinstance(value, list):
        return checked_text(value, key), ""
    texts, reasoning = [], []
    for number, part in enumerate(value, start=1):
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind not in ("text", "input_text", "output_text", "refusal", "thinking"):
            raise BadRecord(
                f"has a part of the type {short_repr(kind)} (part {number} of `{key}`); only text can be trained on"
            )
        if flag := next((one for one in SCORE_KEYS if part.get(one) is not None), None):
            raise BadRecord(f"has a part with `{flag}`; a message is scored as a whole or not at all")
        if kind == "thinking":
            reasoning.append(_content(part.get("thinking"), key)[0] or "")
        else:
            text = part.get("refusal" if kind == "refusal" else "text")
            texts.append(checked_text(text, f"{key}, part {number}"))
    return "".join(texts), "".join(reasoning)


def content_text(value: Any, key: str) -> str:
    """Return the text of a content: a text, null, or a list of text parts; raises `BadRecord` if it is none."""
    return _content(value, key)[0] or ""


def _tool_calls(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the tool calls of a message, in the form that chat templates take."""
    calls = entry.get("tool_calls", [entry["function_call"]] if "function_call" in entry else [])
    calls = from_json(calls, "tool_calls")
    if not isinstance(calls, list):
        raise BadRecord(f"has `tool_calls` that are no list but {type(calls).__name__}")
    return [_tool_call(call) for call in calls]


def _tool_call(call: Any) -> dict[str, Any]:
    """Return a tool call as {..., "type": "function", "function": {"name", "arguments": object}}."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRecord(f"calls a tool by {short_repr(call)}, which has no name and arguments")
    arguments = function.get("arguments")
    arguments = {} if arguments is None or arguments == "" else from_json(arguments, "arguments")
    if not isinstance(arguments, dict):
        raise BadRecord(f"calls `{short_name(function['name'])}` with arguments that are no object")
    outer = {key: value for key, value in call.items() if key != "function"} if "function" in call else {}
    return {"type": "function", **outer, "function": {"name": function["name"], "arguments": arguments}}


def _calls_in_text(text: str | None) -> list[Any]:
    """Return the tool calls that the text of ShareGPT's role function_call spells: one JSON object, or a list."""
    value = from_json(text or "", "value")
    return value if isinstance(value, list) else [value]


def from_json(value: Any, name: str) -> Any:
    """Return the value that a text spells in JSON, or any other value as it is; `BadRecord` if a text is no JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise BadRecord(f"has {short_repr(value)} as `{name}`, which is not valid JSON") from None


def read_tools(fields: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """Return the tools that a record describes in its column `tools`, or in OpenAI's older column `functions`.

    Anthropic's descriptions, with an `input_schema`, are given as OpenAI's, which chat templates take.

    Raises:
        BadRecord: the column does not hold a list of objects.
    """
    key = "tools" if fields.get("tools") else "functions"
    value = fields.get(key) or []
    try:
        tools = from_json(value, key)
    except BadRecord:
        tools = value
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRecord(f"`{key}` is not a list of descriptions of tools; rename the column if it is something else")
    check_nested(tools)
    return tuple(_tool(tool, is_function=key == "functions") for tool in tools)


def _tool(tool: dict[str, Any], *, is_function: bool) -> dict[str, Any]:
    """Return the description of a tool as {"type": "function", "function": ...} if it is that of a function alone."""
    if "input_schema" in tool and "function" not in tool:
        others = {key: value for key, value in tool.items() if key not in ("type", "input_schema")}
        return {"type": "function", "function": {**others, "parameters": tool["input_schema"]}}
    return {"type": "function", "function": tool} if is_function else tool


def checked_text(value: Any, name: str) -> str:
    """Return a text, empty if it is null; raise `BadRecord` if it is not a text, or one that cannot be used."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRecord(f"`{name}` is not text but {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRecord(f"`{name}` holds half of a surrogate pair") from None
    if MARK in value:
        raise BadRecord(f"`{name}` holds U+FDD0, which is no character")
    return value


def check_nested(value: Any, level: int = 0) -> None:
    """Raise `BadRecord` if a nested value is too deep, or holds a text that cannot be used."""
    for text in nested_texts(value, level):
        checked_text(text, "a text in a message")


def nested_texts(value: Any, level: int = 0) -> Iterator[str]:
    """Yield all texts in a nested value, keys included."""
    if level > MOST_NESTED:
        raise BadRecord(f"nests values more than {MOST_NESTED} deep")
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield str(key)
            yield from nested_texts(one, level + 1)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from nested_texts(one, level + 1)
