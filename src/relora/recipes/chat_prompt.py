"""The prompt after which a model answers in a chat, as its training wrote it.

A model of others' making is asked in the words of its tokenizer's chat template. One that a run of ours fine-tuned is
asked by the template of that run (`data.template`), encoded part by part as its examples were.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

from transformers import PreTrainedTokenizerFast

from relora.data.instruct import PartEncoder
from relora.data.layouts import BadRecord, Layout
from relora.data.layouts import Message as TrainingMessage
from relora.data.templates import find_template
from relora.errors import UserError
from relora.mistakes import shown_line
from relora.recipes.conversation import Message

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
            raise UserError(f"the chat template refuses this conversation: {shown_line(str(error))}") from None
