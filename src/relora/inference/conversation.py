"""The history of a chat, and the token ids of the prompt that the model answers next.

`Conversation` keeps the system prompt and all turns, and decides how many of them go into the next prompt: the system
prompt, the latest turns and the new question. Where these leave too little of the model's context for an answer, whole
turns are left out of the prompt, the oldest first; the system prompt and the question never are. Turns that were left
out stay in the history, so that they are saved, but they never return to the prompt, even if they would fit again: the
answers given in the meantime were written without them.

`ChatPrompt` encodes the messages of such a prompt as token ids, by the code that encodes training examples: with the
tokenizer's chat template, or with the template of the run that fine-tuned the model. Control tokens that a user types
are ordinary text. A chat template that states the date is given that of today, in training a fixed one.

A prompt that leaves out no further turn begins with the tokens of the last prompt and, mostly, with those of its
answer: what a model has read of them it need not read again (`rows.Heard`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerFast

from relora.data.finetuning.layouts import Layout
from relora.data.finetuning.messages import BadRecord
from relora.data.finetuning.messages import Message as TrainingMessage
from relora.data.finetuning.writer import find_writer
from relora.errors import UserError

Message = dict[str, str]
"""A message in the form that chat templates take: `role` (system, user or assistant) and `content`."""

Encode = Callable[[list[Message]], list[int]]
"""Maps messages, the last of which is the user's, to the token ids of the prompt that the model answers."""

_LAYOUT = Layout("chat", "messages")


@dataclass(frozen=True)
class Turn:
    """A question of the user and the model's answer to it."""

    question: str
    answer: str


@dataclass
class Conversation:
    """The system prompt and the turns of a chat so far."""

    system: str | None = None
    turns: list[Turn] = field(default_factory=list)
    omitted_turns: int = 0
    """How many of the oldest turns are left out of every prompt from now on."""

    def reset(self) -> None:
        """Delete all turns; the system prompt stays."""
        self.turns.clear()
        self.omitted_turns = 0

    def messages(self, question: str | None = None, *, skip: int = 0) -> list[Message]:
        """List the system prompt (if there is one), all turns but the first `skip`, and `question` (if given)."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns[skip:]:
            messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
        return messages if question is None else [*messages, {"role": "user", "content": question}]

    def ask(self, question: str, encode: Encode, *, positions: int | None, answer_tokens: int) -> list[int]:
        """Build the prompt for an answer to `question`, with as much of the history as fits.

        Args:
            positions: length of the model's context in tokens; None if it is unlimited.
            answer_tokens: the most tokens that an answer may have. A quarter of the context is kept free for the
                answer, or `answer_tokens` if that is less.

        Returns:
            The token ids of the prompt. Turns that had to be left out are counted in `omitted_turns`; the question
            itself is not added to `turns`.

        Raises:
            UserError: the system prompt and the question alone fill the context; `omitted_turns` is unchanged.
        """
        omitted = self.omitted_turns
        ids = encode(self.messages(question, skip=omitted))
        if positions is None:
            return ids
        reserved = min(answer_tokens, positions // 4)
        while len(ids) + reserved > positions and omitted < len(self.turns):
            omitted += 1
            ids = encode(self.messages(question, skip=omitted))
        if len(ids) >= positions:
            raise UserError(
                f"system prompt and question take {len(ids):,} of the model's {positions:,} positions, which leaves no "
                "room for an answer; shorten them"
            )
        self.omitted_turns = omitted
        return ids


class ChatPrompt:
    """Encodes messages as the token ids of the prompt that the model answers.

    `auto` means the tokenizer's chat template where it has one and `alpaca` otherwise, as in training. For a model that
    no run of ours fine-tuned, the tokenizer's chat template is used.

    Args:
        template: `data.template` of the run that fine-tuned the model; None for any other model.

    Raises:
        UserError: neither the tokenizer nor the run has a template, or there are several without a default.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str | None) -> None:
        is_ours = template in ("alpaca", "plain") or (template == "auto" and not tokenizer.chat_template)
        if not is_ours and not tokenizer.chat_template:
            raise UserError(
                "the model's tokenizer has no chat template, and no run of ours fine-tuned it with one; "
                "`relora generate` (without --chat) continues plain text"
            )
        name = template if is_ours else "chat"
        self._writer = find_writer(name, _LAYOUT, tokenizer, today=True)  # type: ignore[arg-type]  # one of its names

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of the prompt that ends with the last message, which must be the user's.

        Raises:
            UserError: the template refuses the messages, for example a system prompt that it does not support.
        """
        try:
            return self._writer.prompt([TrainingMessage(one["role"], one["content"]) for one in messages])
        except BadRecord as error:
            raise UserError(str(error)) from None
