"""A question reaches a model as its training wrote questions."""

import pytest
from tests.adapters.adapted import CHAT_TEMPLATE, NO_SYSTEM, STORIES, needs_data
from transformers import AutoTokenizer

from relora.data.finetuning.instruct import InstructionForm, prompts
from relora.data.finetuning.records import Record
from relora.errors import UserError
from relora.inference.conversation import ChatPrompt

pytestmark = needs_data
MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "Lily."},
    {"role": "user", "content": "How old?"},
]


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(STORIES)


def trained(tokenizer, template: str, messages: list[dict[str, str]]) -> list[int]:
    """The prompt of an example in training."""
    fields = {"messages": [*messages, {"role": "assistant", "content": "Six."}]}
    (prompt,) = prompts([Record("here", fields)], tokenizer, InstructionForm("chat", template))
    return prompt.input_ids


@pytest.mark.parametrize("template", ["alpaca", "plain", "auto"])
@pytest.mark.parametrize("count", [2, 4])
def test_our_templates_as_in_training(tokenizer, template: str, count: int) -> None:
    messages = MESSAGES[:count]
    assert ChatPrompt(tokenizer, template).ids(messages) == trained(tokenizer, template, messages)


@pytest.mark.parametrize("template", [None, "chat", "auto"])
def test_the_chat_template(tokenizer, template: str | None) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE
    ids = ChatPrompt(tokenizer, template).ids(MESSAGES)
    assert ids == tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids) == (
        "<s> system: Be kind.\nuser: Who are you?\nassistant: Lily.\nuser: How old?\nassistant:"
    )


def test_alpaca_reads_as_published(tokenizer) -> None:
    text = tokenizer.decode(ChatPrompt(tokenizer, "alpaca").ids(MESSAGES[1:2]), skip_special_tokens=True)
    assert text == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nWho are you?\n\n### Response:"
    )


def test_without_any_template_the_verb_is_named(tokenizer) -> None:
    for template in (None, "chat"):
        with pytest.raises(UserError, match=r"has no chat template.*`relora generate` \(without --chat\)"):
            ChatPrompt(tokenizer, template)


def test_a_template_that_refuses_is_quoted_in_a_line(tokenizer) -> None:
    tokenizer.chat_template = NO_SYSTEM
    prompt = ChatPrompt(tokenizer, None)
    assert prompt.ids(MESSAGES[1:])
    with pytest.raises(UserError, match="refuses this conversation: no system here"):
        prompt.ids(MESSAGES)
    tokenizer.chat_template = "{{ messages[0]['content'] | nothing }}"
    with pytest.raises(UserError, match="refuses this conversation: "):
        ChatPrompt(tokenizer, None).ids(MESSAGES)
