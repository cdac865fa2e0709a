"""Templates: write a conversation as the text that a model sees, in parts that are prompts and responses in turn.

    alpaca   Below is an instruction that ... ### Instruction: ... ### Input: ... ### Response:    (Taori et al. 2023)
    plain    the prompt, a line end, the response
    chat     the chat template of the tokenizer (`relora.data.finetuning.chat_template`)

The first two have no way to write a tool call or its result, so a conversation with one is refused.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from relora.data.finetuning.messages import BadRecord, Message

TemplateName = Literal["alpaca", "chat", "plain"]

ALPACA = "Below is an instruction that describes a task."
ALPACA_WITH_INPUT = "Below is an instruction that describes a task, paired with an input that provides further context."
ALPACA_TASK = "Write a response that appropriately completes the request."


class Part(NamedTuple):
    """A piece of an example's text."""

    text: str
    is_response: bool
    eos: bool = False
    """Whether the tokenizer's EOS is appended."""
    is_scored: bool = True
    """Whether it is scored, if it is a response."""


def completion(messages: Sequence[Message]) -> list[Part]:
    """Write the text of a completion followed by EOS."""
    return [Part(message.content, True, eos=True) for message in messages]


def plain(messages: Sequence[Message]) -> list[Part]:
    """Write each message that is not a response as its text, and the text it is about, each followed by a line end."""

    def section(message: Message) -> str:
        return "".join(f"{text}\n" for text in (message.content, message.input) if text)

    return _in_turns(messages, "", section, "")


def alpaca(messages: Sequence[Message]) -> list[Part]:
    """Write the published prompts of Alpaca.

    A system message replaces their first sentences. Later turns follow without these sentences.
    """
    opening = ALPACA_WITH_INPUT if any(message.input for message in messages) else ALPACA
    if messages[0].role in ("system", "developer"):
        opening, messages = messages[0].content, messages[1:]
    else:
        opening = f"{opening} {ALPACA_TASK}"

    def section(message: Message) -> str:
        about = f"\n\n### Input:\n{message.input}" if message.input else ""
        heading = "\n\n### Instruction:\n" if message.role == "user" else "\n\n"
        return f"{heading}{message.content}{about}"

    return _in_turns(messages, opening, section, "\n\n### Response:")


def _in_turns(messages: Sequence[Message], opening: str, section: Callable[[Message], str], closing: str) -> list[Part]:
    """Write messages as prompts and responses: each prompt has all messages since the last response.

    Args:
        messages: the messages, the last one a response.
        opening: text at the beginning of the first prompt.
        section: writes one message of a prompt.
        closing: text at the end of every prompt.
    """
    parts = []
    prompt = opening
    for message in messages:
        if message.role == "tool" or message.extra.get("tool_calls"):
            what = "a message from a tool" if message.role == "tool" else "a response that calls a tool"
            raise BadRecord(
                f"{what} needs a chat template that writes tool calls; set data.template: chat, and give the model's "
                "tokenizer one if it has none"
            )
        if message.role == "assistant":
            parts += [Part(prompt + closing, False), Part(message.content, True, True, message.is_scored)]
            prompt = ""
        else:
            prompt += section(message)
    return parts
