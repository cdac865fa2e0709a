"""What was said in a chat, and how much of it the model hears.

A model hears the system prompt, the latest turns and the new question. Where they leave too little of its context for
an answer, whole turns are left out, the oldest first; the system prompt and the question never are. What is left out
stays in the history, to be saved, and does not come back to the model: it would hear a conversation with a hole. Every
turn is read anew from its beginning, so the price of a turn grows with what was said before.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from transformers import PreTrainedTokenizerFast

from relora.data.finetuning.instruct import PartEncoder
from relora.data.finetuning.layouts import BadRecord, Layout
from relora.data.finetuning.layouts import Message as TrainingMessage
from relora.data.finetuning.templates import find_template
from relora.errors import UserError
from relora.messages import first_line

Message = dict[str, str]
"""`role` (system, user or assistant) and `content`, as chat templates take them."""

Encode = Callable[[list[Message]], list[int]]
"""Messages, of which the last is the user's -> the ids after which the answer comes."""


@dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    question: str
    answer: str


@dataclass
class Conversation:
    """The history of a chat."""

    system: str | None = None
    turns: list[Turn] = field(default_factory=list)
    forgotten: int = 0
    """How many of the oldest turns the model hears no more."""

    def reset(self) -> None:
        """Forget the turns; the system prompt stays."""
        self.turns.clear()
        self.forgotten = 0

    def messages(self, question: str | None = None, *, skip: int = 0) -> list[Message]:
        """The system prompt, the turns but the first `skip`, and the question, as far as there are any."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns[skip:]:
            messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
        return messages if question is None else [*messages, {"role": "user", "content": question}]

    def ask(self, question: str, encode: Encode, *, positions: int | None, answer_tokens: int) -> list[int]:
        """The prompt for an answer to `question`, with as much of the history as fits.

        Args:
            positions: the model's context in tokens; None where it has no end.
            answer_tokens: the most an answer may take. A quarter of the context is kept free for it, or all that it may
                take where that is less.

        Raises:
            UserError: system prompt and question leave no room for an answer; nothing was forgotten.
        """
        forgotten = self.forgotten
        ids = encode(self.messages(question, skip=forgotten))
        if positions is None:
            return ids
        free = min(answer_tokens, positions // 4)
        while len(ids) + free > positions and forgotten < len(self.turns):
            forgotten += 1
            ids = encode(self.messages(question, skip=forgotten))
        if len(ids) >= positions:
            raise UserError(
                f"system prompt and question take {len(ids):,} of the model's {positions:,} positions, which leaves no "
                "room for an answer; shorten them"
            )
        self.forgotten = forgotten
        return ids


_LAYOUT = Layout("chat", "messages")


_ANSWER = TrainingMessage("assistant", "x")
"""Stands where the answer will; the prompt is what comes before it."""


class ChatPrompt:
    """Turns messages into the ids after which the answer comes.

    Args:
        template: `data.template` of the run that fine-tuned the model; None for any other model.

    Raises:
        UserError: neither the tokenizer nor a run has a template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str | None) -> None:
        self._tokenizer = tokenizer
        self._template = None
        if template in ("alpaca", "plain") or (template == "auto" and not tokenizer.chat_template):
            self._template = find_template(template, _LAYOUT, tokenizer)  # type: ignore[arg-type]  # one of its names
            self._encoder = PartEncoder(tokenizer, is_chat=False)
        elif not tokenizer.chat_template:
            raise UserError(
                "the model's tokenizer has no chat template, and no run of ours fine-tuned it with one; "
                "`relora generate` (without --chat) continues plain text"
            )

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """The prompt, of which the last message is the user's; `UserError` where the template refuses it."""
        try:
            if self._template is None:
                ids: Any = self._tokenizer.apply_chat_template(
                    list(messages), add_generation_prompt=True, return_dict=False
                )
                return list(ids)
            conversation = tuple(TrainingMessage(message["role"], message["content"]) for message in messages)
            (parts,) = self._encoder.encode([self._template.parts((*conversation, _ANSWER))])
            return list(chain.from_iterable(part.ids for part in parts[:-1]))
        except UserError:
            raise
        except BadRecord as error:
            raise UserError(str(error)) from None
        except Exception as error:  # whatever somebody's template raises, such as for a system prompt it cannot take
            raise UserError(f"the chat template refuses this conversation: {first_line(str(error))}") from None
