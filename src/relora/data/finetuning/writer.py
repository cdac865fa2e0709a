"""Write conversations by a template, and encode what was written: by a template of our own or the tokenizer's.

writer = find_writer("auto", layout, tokenizer)
written = writer.write(conversation)        # text
writer.encode([written])                    # ids, the examples of each conversation
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from relora.data.finetuning.chat_template import ChatTemplate, Rendered
from relora.data.finetuning.encoding import ChatEncoder, Encoded, PartEncoder
from relora.data.finetuning.layouts import Conversation, Layout
from relora.data.finetuning.messages import REASONING_KEYS, Message
from relora.data.finetuning.templates import Part, TemplateName, alpaca, completion, plain
from relora.messages import short_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Written:
    """A conversation as text."""

    text: list[Part] | Rendered
    response: str
    """The text of the last response, without control tokens."""
    chars: int
    """Number of characters to encode."""
    unused: tuple[str, ...] = ()
    """Names of parts of the conversation that are not written."""
    noticed: tuple[str, ...] = ()
    """Changes that the template made, one entry for each message."""


class Writer(Protocol):
    """A way to write conversations and to encode them."""

    @property
    def name(self) -> str:
        """Name of the template."""

    def write(self, conversation: Conversation) -> Written:
        """Write a conversation that ends in a response; raises `BadRecord` if it cannot be written."""

    def encode(self, written: Sequence[Written]) -> list[list[Encoded]]:
        """Return the examples of each conversation."""

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids by which a model is asked for the response to messages."""


def find_writer(
    name: TemplateName | Literal["auto"],
    layout: Layout,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    today: bool = False,
) -> Writer:
    """Return the writer for the template of the given name.

    Args:
        name: `auto` is the tokenizer's chat template if it has one, else alpaca.
        layout: completions are written without a template, whatever its name.
        tokenizer: has the chat template.
        today: give a chat template that states the date that of today, instead of a fixed one.

    Raises:
        UserError: the tokenizer has no chat template, or one that cannot be used.
    """
    if layout.name == "completion":
        return _PartWriter("none", completion, tokenizer)
    if name == "chat" or (name == "auto" and tokenizer.chat_template):
        return _ChatWriter(tokenizer, today=today)
    return _PartWriter("plain", plain, tokenizer) if name == "plain" else _PartWriter("alpaca", alpaca, tokenizer)


class _PartWriter:
    """A template of our own."""

    def __init__(
        self, name: str, parts: Callable[[Sequence[Message]], list[Part]], tokenizer: "PreTrainedTokenizerFast"
    ) -> None:
        self.name = name
        self._parts = parts
        self._encoder = PartEncoder(tokenizer)

    def write(self, conversation: Conversation) -> Written:
        """Write a conversation; only roles and texts can be written."""
        parts = self._parts(conversation.messages)
        keys = {key: None for message in conversation.messages for key, value in message.extra.items() if value}
        unused = [f"`{short_name(str(key))}` in messages" for key in keys]
        if conversation.tools:
            unused.append(f"the descriptions of tools, which need a chat template ({self.name} is in use)")
        return Written(parts, parts[-1].text, sum(len(part.text) for part in parts), tuple(unused))

    def encode(self, written: Sequence[Written]) -> list[list[Encoded]]:
        """Return the one example of each conversation."""
        return [[example] for example in self._encoder.encode([one.text for one in written])]  # type: ignore[misc]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids by which a model is asked: those before the response in an example."""
        (example,) = self._encoder.encode([self._parts([*messages, Message("assistant", "x")])])
        return example.ids[: example.asked]


class _ChatWriter:
    """The chat template of a tokenizer."""

    name = "chat"

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", *, today: bool) -> None:
        self._template = ChatTemplate(tokenizer, None) if today else ChatTemplate(tokenizer)
        self._encoder = ChatEncoder(tokenizer)

    def write(self, conversation: Conversation) -> Written:
        """Write a conversation by the chat template."""
        rendered = self._template.turns(conversation)
        last = conversation.messages[-1]
        response = last.content
        if last.extra.get("tool_calls") or last.extra.get(REASONING_KEYS[0]):
            response = self._template.without_control_tokens("".join(text for text, _ in rendered.turns[-1].pieces))
        chars = sum(len(turn.asked) for turn in rendered.turns) + len(response)
        return Written(rendered, response, chars, rendered.unused, rendered.noticed)

    def encode(self, written: Sequence[Written]) -> list[list[Encoded]]:
        """Return the examples of each conversation."""
        return self._encoder.encode([one.text.turns for one in written])  # type: ignore[union-attr]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids by which a model is asked, as `apply_chat_template` gives them."""
        return self._encoder.ids(self._template.asked(messages))
