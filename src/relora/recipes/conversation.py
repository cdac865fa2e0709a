"""What was said in a chat, and how much of it the model hears.

A model hears the system prompt, the latest turns and the new question. Where they leave too little of its context for
an answer, whole turns are left out, the oldest first; the system prompt and the question never are. What is left out
stays in the history, to be saved, and does not come back to the model: it would hear a conversation with a hole. Every
turn is read anew from its beginning, so the price of a turn grows with what was said before.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from relora.errors import UserError

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
