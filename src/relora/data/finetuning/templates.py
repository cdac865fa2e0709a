"""Templates: write a conversation as the text that a model sees, in parts that are prompts and responses in turn.

    alpaca   Below is an instruction that ... ### Instruction: ... ### Input: ... ### Response:    (Taori et al. 2023)
    plain    the prompt, a line end, the response
    chat     the chat template of the tokenizer, a Jinja program, which runs in transformers' sandbox

Positions of the responses in the text of a chat template are taken from its `{% generation %}` blocks. For a template
without such blocks they are found by rendering: for every response, the conversation up to it is rendered twice, with
the generation prompt in place of the response, and with the response. The first text must be the beginning of the
second, and the second the beginning of the text of the whole conversation; otherwise the conversation is refused,
because the wrong tokens would be scored.

A control token that occurs in the content of a message is ordinary text, and must not act as a control token. It is
interrupted by `MARK`; later the text is split there, and the pieces are encoded separately.
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
"""The date that is given to chat templates which state one. It is fixed, so that examples are the same every day."""


class Part(NamedTuple):
    """A piece of an example's text."""

    text: str
    is_response: bool
    eos: bool = False
    """Whether the tokenizer's EOS is appended."""


@dataclass(frozen=True)
class Template:
    """A way to write conversations as text."""

    name: str
    parts: Callable[[Conversation], list[Part]]
    """Write a conversation that ends in a response; raises `BadRecord` if it cannot be written."""
    is_chat: bool = False
    """Whether the parts contain control tokens, which act as such, and may contain `MARK`. The template itself then
    writes how a text begins (BOS)."""


def find_template(
    name: TemplateName | Literal["auto"], layout: Layout, tokenizer: "PreTrainedTokenizerFast"
) -> Template:
    """Return the template of the given name.

    Args:
        name: `auto` is the tokenizer's chat template if it has one, else alpaca.
        layout: completions are written without a template, whatever its name.
        tokenizer: has the chat template.

    Raises:
        UserError: the tokenizer has no chat template, or one that cannot be used.
    """
    if layout.name == "completion":
        return Template("none", _completion)
    if name == "chat" or (name == "auto" and tokenizer.chat_template):
        chat = _ChatTemplate(tokenizer)
        return Template("chat", chat.parts, is_chat=True)
    return Template("plain", _plain) if name == "plain" else Template("alpaca", _alpaca)


def _completion(conversation: Conversation) -> list[Part]:
    """Write the text of a completion followed by EOS."""
    return [Part(message.content, True, eos=True) for message in conversation]


def _plain(conversation: Conversation) -> list[Part]:
    """Write each message that is not a response as its text, and the text it is about, each followed by a line end."""

    def section(message: Message) -> str:
        return "".join(f"{text}\n" for text in (message.content, message.input) if text)

    return _in_turns(conversation, "", section, "")


def _alpaca(conversation: Conversation) -> list[Part]:
    """Write the published prompts of Alpaca.

    A system message replaces their first sentences. Later turns follow without these sentences.
    """
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
    """Write messages as prompts and responses: each prompt has all messages since the last response.

    Args:
        conversation: messages, the last one a response.
        opening: text at the beginning of the first prompt.
        section: writes one message of a prompt.
        closing: text at the end of every prompt.
    """
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


class _ChatTemplate:
    """The chat template of a tokenizer.

    Raises:
        UserError: it has none, or several without a default.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        self._tokenizer = tokenizer
        if not tokenizer.chat_template:
            raise UserError(f"{_name(tokenizer)}: has no chat template; choose the template `alpaca` or `plain`")
        try:
            self._source: str = tokenizer.get_chat_template()
        except Exception as error:  # there are several templates, none of which is the default
            raise UserError(f"{_name(tokenizer)}: {first_line(str(error))}") from None
        special = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        # A regular expression takes the first alternative that fits, so the longest token comes first.
        self._control_tokens = tuple(sorted(special, key=len, reverse=True))
        matches_nothing = "(?!)"
        self._control = re.compile("|".join(map(re.escape, self._control_tokens)) or matches_nothing)
        self._has_blocks = re.search(r"\{%-?\s*generation\s*-?%\}", self._source) is not None

    def parts(self, conversation: Conversation) -> list[Part]:
        """Render a conversation that ends in a response, and split the text where responses begin and end."""
        messages = [{"role": message.role, "content": self._content(message)} for message in conversation]
        try:
            text, spans = self._spans_of_blocks(messages) if self._has_blocks else self._spans_of_growth(messages)
        except UserError:
            raise
        except Exception as error:  # of any type: the template is a program, and may refuse a conversation
            raise BadRecord(f"the chat template refuses it: {first_line(str(error))}") from None
        parts, previous_end = [], 0
        for start, span_end in spans:
            end = self._end_of_response(text, start, span_end)
            parts += [Part(text[previous_end:start], False), Part(text[start:end], True)]
            previous_end = end
        if not parts[-1].text.endswith(self._control_tokens):
            parts[-1] = parts[-1]._replace(eos=True)
        return parts

    def _end_of_response(self, text: str, start: int, end: int) -> int:
        """Return the end of a response without white space behind its last control token.

        In generation a model stops at this control token, so the white space is part of the next prompt.
        """
        response = text[start:end].rstrip()
        return start + len(response) if response.endswith(self._control_tokens) else end

    def _content(self, message: Message) -> str:
        """Return the text of a message, in which `MARK` follows the first character of every control token."""
        content = "\n\n".join(text for text in (message.content, message.input) if text)
        return self._control.sub(lambda token: f"{token[0][0]}{MARK}{token[0][1:]}", content)

    def _spans_of_blocks(self, messages: list[dict[str, str]]) -> tuple[str, list[tuple[int, int]]]:
        """Render messages with a template that has generation blocks.

        Returns:
            The text, and (start, end) of each response in it.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, spans = render_jinja_template(
            conversations=[messages],
            chat_template=self._source,
            return_assistant_tokens_mask=True,
            **{**self._tokenizer.special_tokens_map, "date_string": DATE},
        )
        text, blocks = texts[0], spans[0]
        responses = sum(message["role"] == "assistant" for message in messages)
        if len(blocks) != responses:
            raise UserError(
                f"{_name(self._tokenizer)}: the chat template marks {len(blocks)} responses in a conversation "
                f"with {responses}; mend its generation blocks, or choose the template `alpaca` or `plain`"
            )
        return text, [(start, self._end_with_control_token(text, end)) for start, end in blocks]

    def _end_with_control_token(self, text: str, end: int) -> int:
        """Return the end of a generation block, extended by the control token behind it if the block has none.

        Some templates leave the control token that ends a response out of the block. It belongs to the response, since
        a model that is not trained on it does not learn to stop.
        """
        following = self._control.match(text, end)
        if following is None or text[:end].endswith(self._control_tokens):
            return end
        return following.end()

    def _spans_of_growth(self, messages: list[dict[str, str]]) -> tuple[str, list[tuple[int, int]]]:
        """Render messages with a template that has no generation blocks.

        Returns:
            The text, and (start, end) of each response: the part by which the response makes the text longer.
        """
        texts = []  # for each response: the text that asks for it, and the text that ends with it
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                asking = self._render(messages[:number], generation_prompt=True)
                texts.append((asking, self._render(messages[: number + 1], generation_prompt=False)))
        whole = texts[-1][1]
        if not all(answered.startswith(asked) and whole.startswith(answered) for asked, answered in texts):
            raise UserError(
                f"{_name(self._tokenizer)}: the chat template writes a conversation otherwise as it goes on, so it "
                "cannot be told which part is a response; give it generation blocks, "
                "or choose the template `alpaca` or `plain`"
            )
        return whole, [(len(asked), len(answered)) for asked, answered in texts]

    def _render(self, messages: Sequence[dict[str, str]], *, generation_prompt: bool) -> str:
        """Return the text of messages; `generation_prompt` adds the text that asks for the next response."""
        text: Any = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation_prompt, date_string=DATE
        )
        return str(text)


def _name(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Return the folder or hub id of a tokenizer, for messages."""
    return tokenizer.name_or_path or "the tokenizer"
