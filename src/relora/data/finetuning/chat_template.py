"""The chat template of a tokenizer, a Jinja program, which writes a conversation as text.

For every response two texts are written: the conversation before it with the generation prompt, which is what a model
is asked, and the conversation that ends with it. The first is the beginning of the second, and what follows in the
second is the response; if the template has `{% generation %}` blocks in it, they say which parts of it are scored.
(Where the first is not the beginning of the second, the response begins with its first block; without one it is
refused.) A template may write the same turn otherwise when it has become history, without its reasoning, say;
therefore nothing is concluded from one response's texts about another's.

A control token that occurs in a message is ordinary text, and must not act as a control token. It is interrupted by
`MARK`; later the text is split there, and the pieces are encoded separately.

A template is free to leave out and to change what it is given. What it does not write of a response's tool calls is
refused; what else it does not write as it stands is counted.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import date
from typing import TYPE_CHECKING, Any, NamedTuple

from relora.data.finetuning.layouts import Conversation
from relora.data.finetuning.messages import MARK, REASONING_KEYS, BadRecord, Message, nested_texts
from relora.data.readers import column_names
from relora.errors import UserError
from relora.messages import first_line, short_name, short_repr

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DATE = date(2024, 7, 26)
"""The date that is given to chat templates which state one. It is fixed, so that examples are the same every day."""

MOST_KEYS = 16
"""Most further keys of the messages of one record that are tried on the template; more are taken as not written."""

PROBE = {"type": "function", "id": "probe0000", "function": {"name": "probe", "arguments": {"key": "value"}}}
"""A tool call by which it is found out in what form a template takes arguments."""


class Turn(NamedTuple):
    """A response, and what a model is asked for it."""

    asked: str
    """The text of the conversation before the response, with the generation prompt."""
    pieces: tuple[tuple[str, bool], ...]
    """The response, in pieces of text, and whether each is scored: one, unless the template has generation blocks."""
    eos: bool
    """Whether EOS is appended where the response is the end of an example: it does not end with a control token."""


class Rendered(NamedTuple):
    """The turns of a conversation, and what the template made of it."""

    turns: list[Turn]
    unused: tuple[str, ...]
    """Names of parts that the template does not write: the tools, keys of messages."""
    noticed: tuple[str, ...]
    """Changes that the template made, one entry for each turn."""


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: has the template.
        day: the date that templates are given which state one; that of today if it is None.

    Raises:
        UserError: it has none, or several without a default. While writing, that it is no valid program.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", day: date | None = DATE) -> None:
        self._tokenizer, self._day = tokenizer, day
        if not tokenizer.chat_template:
            raise UserError(f"{_name(tokenizer)}: has no chat template; choose the template `alpaca` or `plain`")
        if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
            raise UserError(
                f"{_name(tokenizer)}: none of its chat templates ({column_names(tokenizer.chat_template)}) is the "
                "default; save the one to use as chat_template.jinja in its folder"
            )
        self._sources = {tools: self._source(tools) for tools in (False, True)}
        special = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        # A regular expression takes the first alternative that fits, so the longest token comes first.
        self._control_tokens = tuple(sorted(special, key=len, reverse=True))
        matches_nothing = "(?!)"
        self._control = re.compile("|".join(map(re.escape, self._control_tokens)) or matches_nothing)
        self._knows_developer = "developer" in self._sources[False]
        self._argument_form: tuple[bool, bool] | None = None
        self._written_keys: set[str] = set()
        self._writes_tools = False

    def asked(self, messages: Sequence[Message]) -> str:
        """Return the text by which a model is asked for the response to messages."""
        return self._render(self._plain(messages), (), asks=True)[0]

    def turns(self, conversation: Conversation) -> Rendered:
        """Write a conversation that ends in a response.

        Raises:
            BadRecord: the template refuses it, does not write a tool call, or writes a response otherwise than it asks
                for it, without generation blocks.
        """
        messages, tools = self._plain(conversation.messages), self._marked(list(conversation.tools))
        turns, noticed, written = [], [], 0
        for number, message in enumerate(conversation.messages):
            if message.role != "assistant":
                continue
            asked, _ = self._render(messages[:number], tools, asks=True)
            answered, blocks = self._render(messages[: number + 1], tools, asks=False)
            if not answered.startswith(asked):
                asked = self._asked_otherwise(messages[:number], tools, asked, answered, blocks, message)
                noticed.append("responses behind another text than the chat template asks with")
            turns.append(self._turn(asked, answered, blocks, message.is_scored))
            self._check_calls(message, answered[len(asked) :])
            start = len(turns[-2].asked) if len(turns) > 1 and asked.startswith(turns[-2].asked) else 0
            noticed += _changes(messages[written:number], asked[start:])
            noticed += _changes(messages[number : number + 1], answered[len(asked) :])
            written = number + 1
        noticed += [
            "responses without a control token at their end, in the midst of a conversation: ending them is not trained"
        ] * sum(turn.eos and turn.pieces[-1][1] for turn in turns[:-1])
        self._check_marks(conversation, answered)
        return Rendered(turns, self._unused(messages, tools, answered), tuple(noticed))

    def without_control_tokens(self, text: str) -> str:
        """Return a text as a reader sees it: without control tokens, and without `MARK`."""
        return self._control.sub("", text).replace(MARK, "").strip()

    def _turn(self, asked: str, answered: str, blocks: list[tuple[int, int]], is_scored: bool) -> Turn:
        """Part the text of a conversation that ends with a response into what is asked and what is scored."""
        spans = [(max(start, len(asked)), end) for start, end in blocks if end > len(asked)]
        if spans:
            spans[-1] = spans[-1][0], self._end_with_control_token(answered, spans[-1][1])
        else:
            spans = [(len(asked), len(answered))]
        # In generation a model stops at the control token, so white space behind it is part of the next prompt.
        start, end = spans[-1]
        response = answered[start:end].rstrip()
        ends_with_control_token = response.endswith(self._control_tokens)
        if ends_with_control_token:
            spans[-1] = start, start + len(response)
        pieces, written = [], len(asked)
        for start, end in spans:
            pieces += [(answered[written:start], False), (answered[start:end], is_scored)]
            written = end
        if not any(text for text, _ in pieces):
            raise BadRecord("the chat template writes nothing for a response; mend the template")
        return Turn(asked, tuple(piece for piece in pieces if piece[0]), not ends_with_control_token)

    def _asked_otherwise(
        self,
        before: list[dict[str, Any]],
        tools: Sequence[Any],
        asked: str,
        answered: str,
        blocks: list[tuple[int, int]],
        message: Message,
    ) -> str:
        """Return the text before a response that a template writes behind another text than it asks with.

        Its first generation block begins there; without one, `BadRecord` is raised.
        """
        in_history = len(self._render(before, tools, asks=False)[1]) if before and blocks else 0
        if len(blocks) > in_history:
            return answered[: blocks[in_history][0]]
        shorter = min(len(asked), len(answered))
        border = next((at for at in range(shorter) if asked[at] != answered[at]), shorter)
        reasoning = ", or take the reasoning out" if message.reasoning else ""
        raise BadRecord(
            f"the chat template asks for a response with {short_repr(asked[border:])} and writes it without, so it "
            f"cannot be told where the response begins; mend the template{reasoning}"
        )

    def _end_with_control_token(self, text: str, end: int) -> int:
        """Return the end of a generation block, extended by the control token behind it if the block has none.

        Some templates leave the control token that ends a response out of the block. It belongs to the response, since
        a model that is not trained on it does not learn to stop.
        """
        following = self._control.match(text, end)
        if following is None or text[:end].rstrip().endswith(self._control_tokens):
            return end
        return following.end()

    def _check_calls(self, message: Message, response: str) -> None:
        """Raise `BadRecord` if the template does not write the tool calls of a response."""
        for call in message.extra.get("tool_calls", ()):
            if (name := self._marked(call["function"]["name"])) not in response:
                raise BadRecord(
                    f"a response calls `{short_name(name)}`, and the chat template does not write tool calls; give the "
                    "tokenizer one that does, or take `tool_calls` out"
                )

    def _check_marks(self, conversation: Conversation, answered: str) -> None:
        """Raise `BadRecord` if the template changes texts in which control tokens are interrupted by `MARK`."""
        texts = (text for message in conversation.messages for text in (message.content, message.input))
        nested = nested_texts([[message.extra for message in conversation.messages], conversation.tools], -4)
        token = next((found for text in (*texts, *nested) if (found := self._control.search(text))), None)
        if token is None:
            return
        unmarked = self._plain(conversation.messages, marked=False)
        if answered.replace(MARK, "") != self._render(unmarked, conversation.tools, asks=False)[0]:
            raise BadRecord(
                f"holds the control token {short_repr(token[0])} in a text that the chat template rewrites, so it "
                "cannot be kept from acting as one; take it out"
            )

    def _unused(self, messages: list[dict[str, Any]], tools: Sequence[Any], answered: str) -> tuple[str, ...]:
        """Return what the template does not write, since its text is the same without: tools, and keys of messages."""
        unused = []
        keys = dict.fromkeys(key for message in messages for key in message)
        tried = [key for key in keys if key not in ("role", "content", "tool_calls", *REASONING_KEYS)]
        for key in tried:
            if key in self._written_keys:
                continue
            without = [{name: value for name, value in message.items() if name != key} for message in messages]
            if tried.index(key) < MOST_KEYS and self._differs(without, tools, answered):
                self._written_keys.add(key)
            else:
                unused.append(f"`{short_name(str(key))}` in messages")
        if tools and not self._writes_tools:
            self._writes_tools = self._differs(messages, (), answered)
            if not self._writes_tools:
                unused.append("the descriptions of tools")
        return tuple(unused)

    def _differs(self, messages: list[dict[str, Any]], tools: Sequence[Any], answered: str) -> bool:
        """Return whether the template writes other messages than those that gave a text, or refuses them."""
        try:
            return self._render(messages, tools, asks=False)[0] != answered
        except BadRecord:
            return True

    def _plain(self, messages: Sequence[Message], *, marked: bool = True) -> list[dict[str, Any]]:
        """Return messages as chat templates take them, with `MARK` in control tokens, in the form for arguments."""
        plain = []
        for message in messages:
            content = "\n\n".join(text for text in (message.content, message.input) if text)
            role = "system" if message.role == "developer" and not self._knows_developer else message.role
            extra = dict(message.extra)
            if calls := extra.get("tool_calls"):
                as_text, with_content = self._form_of_calls()
                extra["tool_calls"] = [_call_with_text(call) for call in calls] if as_text else calls
                if with_content and "content" in extra:
                    del extra["content"]
            one = {"role": role, "content": content, **extra}
            one = {key: value for key, value in one.items() if value is not None}
            plain.append(self._marked(one) if marked else one)
        return plain

    def _form_of_calls(self) -> tuple[bool, bool]:
        """Return whether the template takes the arguments of a tool call as text in JSON, and needs a content.

        Most take an object and write it as JSON; some paste a text, so they fail on an object or write it as Python.
        """
        if self._argument_form is None:
            forms = [(as_text, with_content) for with_content in (False, True) for as_text in (False, True)]
            found = {form: self._writes_probe(*form) for form in forms}
            taken = [form for form in forms if found[form]] or [form for form in forms if found[form] is not None]
            self._argument_form = (taken or forms)[0]
        return self._argument_form

    def _writes_probe(self, as_text: bool, with_content: bool) -> bool | None:
        """Return whether the template writes a tool call in one of the forms, and not as Python writes an object.

        The answer is None if the template fails on it.
        """
        call = _call_with_text(PROBE) if as_text else PROBE
        response = {"role": "assistant", "tool_calls": [call]} | ({"content": ""} if with_content else {})
        try:
            text, _ = self._render([{"role": "user", "content": "probe"}, response], (), asks=False)
        except BadRecord:
            return None
        return '"key"' in text or ("key" in text and "'key'" not in text and '\\"key' not in text)

    def _marked(self, value: Any) -> Any:
        """Return a nested value with `MARK` behind the first character of every control token in its texts."""
        if isinstance(value, str):
            return self._control.sub(lambda token: f"{token[0][0]}{MARK}{token[0][1:]}", value)
        if isinstance(value, Mapping):
            return {self._marked(key): self._marked(one) for key, one in value.items()}
        return [self._marked(one) for one in value] if isinstance(value, list | tuple) else value

    def _source(self, tools: bool) -> str:
        """Return the template for conversations with tools, or without, in which a fixed date is written out."""
        source: str = self._tokenizer.get_chat_template(tools=[] if tools else None)
        if self._day is None:
            return source
        day = self._day
        asks_date = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
        return asks_date.sub(lambda call: json.dumps(day.strftime(call[2])), source)

    def _render(
        self, messages: list[dict[str, Any]], tools: Sequence[Any], *, asks: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """Write messages as `apply_chat_template` does; `asks` adds the text that asks for the next response.

        Returns:
            The text, and (start, end) of its generation blocks.
        """
        from jinja2 import TemplateError, TemplateSyntaxError
        from transformers.utils.chat_template_utils import render_jinja_template

        source = self._sources[bool(tools)]
        tracks = not asks and re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
        dated = {} if self._day is None else {"date_string": self._day.strftime("%d %b %Y")}
        try:
            texts, blocks = render_jinja_template(
                conversations=[messages],
                tools=list(tools) or None,
                chat_template=source,
                return_assistant_tokens_mask=tracks,
                add_generation_prompt=asks,
                **{**self._tokenizer.special_tokens_map, **dated},
            )
        except TemplateSyntaxError as error:
            raise UserError(
                f"{_name(self._tokenizer)}: its chat template is damaged (line {error.lineno}: "
                f"{first_line(str(error))}); mend it in chat_template.jinja or tokenizer_config.json"
            ) from None
        except Exception as error:  # of any type: the template is a program
            verb = "refuses" if type(error) is TemplateError else "fails on"  # what its `raise_exception` raises
            raise BadRecord(f"the chat template {verb} this conversation: {first_line(str(error))}") from None
        return texts[0], blocks[0] if tracks else []


def _call_with_text(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool call with its arguments as a text in JSON."""
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def _changes(messages: list[dict[str, Any]], text: str) -> list[str]:
    """Return what of messages is not found in the text that a template made of them."""
    changes = []
    for message in messages:
        reasoning = message.get(REASONING_KEYS[0], "")
        if reasoning.strip() and reasoning not in text:
            changes.append("turns whose reasoning the chat template changed or left out")
        if message.get("content", "") not in text:
            changes.append("turns whose text the chat template changed or left out")
        elif not _all_written(message.get("tool_calls", ()), text):
            changes.append("turns whose tool calls the chat template changed")
    return changes


def _all_written(calls: Sequence[Any], text: str) -> bool:
    """Return whether every text in the arguments of tool calls is found in a text, as it is or as JSON spells it."""
    for call in calls:
        arguments = call["function"]["arguments"]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        spelled = ((one, json.dumps(one, ensure_ascii=False)[1:-1]) for one in nested_texts(arguments))
        if not all(one in text or escaped in text for one, escaped in spelled):
            return False
    return True


def _name(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Return the folder or hub id of a tokenizer, for messages."""
    return tokenizer.name_or_path or "the tokenizer"
