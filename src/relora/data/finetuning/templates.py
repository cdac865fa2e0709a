"""How a conversation is written for a model: as parts of text, prompts and responses in turn.

    alpaca   Below is an instruction that ... ### Instruction: ... ### Input: ... ### Response:    (Taori et al. 2023)
    plain    the prompt, a line end, the response
    chat     the tokenizer's own chat template, a Jinja program (in transformers' sandbox)

Where the responses are in the text that a chat template writes is taken from its `{% generation %}` blocks. One that
has none is also run on every conversation up to a response, with the words that ask for it, and then with it: the
first text must begin the second and that one the whole, or the conversation is refused rather than scored wrongly.

A control token that stands in a message is text, as somebody wrote it, and must not act as one: it is broken by
`MARK`, at which the text is later parted.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from relora.data.finetuning.layouts import MARK, BadRecord, Conversation, Layout, Message
from relora.errors import UserError
from relora.messages import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TemplateName = Literal["alpaca", "chat", "plain"]

ALPACA = "Below is an instruction that describes a task."
ALPACA_WITH_INPUT = "Below is an instruction that describes a task, paired with an input that provides further context."
ALPACA_TASK = "Write a response that appropriately completes the request."

DATE = "26 Jul 2024"
"""What chat templates that state a date are given where they ask for one: the examples must not change overnight."""


class Part(NamedTuple):
    """A piece of an example's text."""

    text: str
    is_response: bool
    eos: bool = False
    """The tokenizer's EOS follows."""


@dataclass(frozen=True)
class Template:
    """How conversations are written."""

    name: str
    parts: Callable[[Conversation], list[Part]]
    """`BadRecord` for a conversation that cannot be written."""
    is_chat: bool = False
    """The texts hold control tokens, which act as such, and may hold `MARK`; and begin as the template says."""


def find_template(
    name: TemplateName | Literal["auto"], layout: Layout, tokenizer: "PreTrainedTokenizerFast"
) -> Template:
    """The template of a name; `auto` is the tokenizer's own, or alpaca. Completions need none.

    `UserError` where the tokenizer has no chat template, or one that cannot be used.
    """
    if layout.name == "completion":
        return Template("none", _bare)
    if name == "chat" or (name == "auto" and tokenizer.chat_template):
        chat = _Chat(tokenizer)
        return Template("chat", chat.parts, is_chat=True)
    return Template("plain", _plain) if name == "plain" else Template("alpaca", _alpaca)


def _bare(conversation: Conversation) -> list[Part]:
    return [Part(message.content, True, eos=True) for message in conversation]


def _plain(conversation: Conversation) -> list[Part]:
    return _in_turns(conversation, "", lambda message: "".join(f"{text}\n" for text in message[1:] if text), "")


def _alpaca(conversation: Conversation) -> list[Part]:
    """The published prompts; a system message stands in place of their first sentences, later turns follow."""
    opening = ALPACA_WITH_INPUT if any(message.input for message in conversation) else ALPACA
    if conversation[0].role == "system":
        opening, conversation = conversation[0].content, conversation[1:]
    else:
        opening = f"{opening} {ALPACA_TASK}"

    def section(message: Message) -> str:
        about = f"\n\n### Input:\n{message.input}" if message.input else ""
        heading = "\n\n### Instruction:\n" if message.role == "user" else "\n\n"
        return f"{heading}{message.content}{about}"

    return _in_turns(conversation, opening, section, "\n\n### Response:")


def _in_turns(conversation: Conversation, opening: str, section: Callable[[Message], str], closing: str) -> list[Part]:
    """What was said since the last response is the prompt of the next one."""
    parts = []
    prompt = opening
    for message in conversation:
        if message.role == "tool":
            raise BadRecord("a message from a tool needs a chat template")
        if message.role == "assistant":
            parts += [Part(prompt + closing, False), Part(message.content, True, eos=True)]
            prompt = ""
        else:
            prompt += section(message)
    return parts


class _Chat:
    """A tokenizer's chat template."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        self._tokenizer = tokenizer
        if not tokenizer.chat_template:
            raise UserError(f"{_name(tokenizer)}: has no chat template; choose the template `alpaca` or `plain`")
        try:
            self._source: str = tokenizer.get_chat_template()
        except Exception as error:  # several templates, none of them the default
            raise UserError(f"{_name(tokenizer)}: {first_line(str(error))}") from None
        special = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        self._control_tokens = tuple(sorted(special, key=len, reverse=True))  # the longest first, as it is matched
        self._control = re.compile("|".join(map(re.escape, self._control_tokens)) or "(?!)")
        self._has_blocks = re.search(r"\{%-?\s*generation\s*-?%\}", self._source) is not None

    def parts(self, conversation: Conversation) -> list[Part]:
        """The text of a conversation that ends in a response, parted where responses begin and end."""
        messages = [{"role": message.role, "content": self._content(message)} for message in conversation]
        try:
            text, spans = self._from_blocks(messages) if self._has_blocks else self._from_beginnings(messages)
        except UserError:
            raise
        except Exception as error:  # whatever somebody's program raises
            raise BadRecord(f"the chat template refuses it: {first_line(str(error))}") from None
        parts, before = [], 0
        for start, end in spans:
            end = self._end(text, start, end)
            parts += [Part(text[before:start], False), Part(text[start:end], True)]
            before = end
        if not parts[-1].text.endswith(self._control_tokens):
            parts[-1] = parts[-1]._replace(eos=True)
        return parts

    def _end(self, text: str, start: int, end: int) -> int:
        """Where a response ends: before white space behind the control token that ends it, for there a model stops."""
        response = text[start:end].rstrip()
        return start + len(response) if response.endswith(self._control_tokens) else end

    def _content(self, message: Message) -> str:
        content = "\n\n".join(text for text in message[1:] if text)
        return self._control.sub(lambda token: f"{token[0][0]}{MARK}{token[0][1:]}", content)

    def _from_blocks(self, messages: list[dict[str, str]]) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the spans of its `{% generation %}` blocks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, spans = render_jinja_template(
            conversations=[messages],
            chat_template=self._source,
            return_assistant_tokens_mask=True,
            **{**self._tokenizer.special_tokens_map, "date_string": DATE},
        )
        text, responses = texts[0], sum(message["role"] == "assistant" for message in messages)
        if len(spans[0]) != responses:
            raise UserError(
                f"{_name(self._tokenizer)}: the chat template marks {len(spans[0])} responses in a conversation "
                f"with {responses}; mend its generation blocks, or choose the template `alpaca` or `plain`"
            )
        # some leave out the control token that ends a response; without it a model would not learn to stop
        behind = [self._control.match(text, end) for _, end in spans[0]]
        return text, [
            (start, token.end() if token and not text[:end].endswith(self._control_tokens) else end)
            for (start, end), token in zip(spans[0], behind, strict=True)
        ]

    def _from_beginnings(self, messages: list[dict[str, str]]) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the spans by which it grows with each response."""
        texts: list[tuple[str, str]] = [
            (self._render(messages[:number], asking=True), self._render(messages[: number + 1], asking=False))
            for number, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        whole = texts[-1][1]
        if not all(answered.startswith(asked) and whole.startswith(answered) for asked, answered in texts):
            raise UserError(
                f"{_name(self._tokenizer)}: the chat template writes a conversation otherwise as it goes on, so it "
                "cannot be told which part is a response; give it generation blocks, "
                "or choose the template `alpaca` or `plain`"
            )
        return whole, [(len(asked), len(answered)) for asked, answered in texts]

    def _render(self, messages: Sequence[dict[str, str]], *, asking: bool) -> str:
        text: Any = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=asking, date_string=DATE
        )
        return str(text)


def _name(tokenizer: "PreTrainedTokenizerFast") -> str:
    return tokenizer.name_or_path or "the tokenizer"
