"""The prompt holds the system prompt, the latest turns that fit and the question, encoded as in training."""

import pytest
from tests.adapters.adapted import CHAT_TEMPLATE, NO_SYSTEM, STORIES, needs_data
from transformers import AutoTokenizer

from relora.data.finetuning.instruct import InstructionForm, prompts
from relora.data.finetuning.records import Record
from relora.errors import UserError
from relora.inference.conversation import ChatPrompt, Conversation, Message, Turn

MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "Lily."},
    {"role": "user", "content": "How old?"},
]


def words(messages: list[Message]) -> list[int]:
    """Encode messages with one token for each word and one for each role."""
    return [hash(word) for message in messages for word in [message["role"], *message["content"].split()]]


def conversation_of(turns: int, system: str | None = None) -> Conversation:
    return Conversation(system, [Turn(f"question {n}", f"answer {n}") for n in range(turns)])


def prompt_messages(conversation: Conversation, positions: int | None, answer_tokens: int = 4) -> list[Message]:
    """Ask one more question and return the messages that the prompt was made of."""
    seen: list[list[Message]] = []

    def encode(messages: list[Message]) -> list[int]:
        seen.append(messages)
        return words(messages)

    ids = conversation.ask("now what", encode, positions=positions, answer_tokens=answer_tokens)
    assert ids == words(seen[-1])
    return seen[-1]


def test_the_prompt_holds_everything_that_fits() -> None:
    messages = prompt_messages(conversation_of(2, "be brief"), positions=100)
    assert [message["content"] for message in messages] == [
        *("be brief", "question 0", "answer 0", "question 1", "answer 1", "now what"),
    ]
    assert [message["role"] for message in messages] == ["system", *["user", "assistant"] * 2, "user"]
    assert prompt_messages(conversation_of(50), positions=None)[0]["content"] == "question 0"


def test_the_oldest_turns_are_left_out_first_and_the_system_prompt_never() -> None:
    # 3 tokens of the system prompt, 6 of a turn, 3 of the question, 4 kept for the answer
    conversation = conversation_of(5, "be brief")
    messages = prompt_messages(conversation, positions=3 + 2 * 6 + 3 + 4)
    assert [message["content"] for message in messages] == [
        *("be brief", "question 3", "answer 3", "question 4", "answer 4", "now what"),
    ]
    assert conversation.omitted_turns == 3
    assert len(conversation.turns) == 5  # the history still has them, for /save


def test_omitted_turns_do_not_return() -> None:
    conversation = conversation_of(5)
    prompt_messages(conversation, positions=13)
    assert conversation.omitted_turns == 4
    assert len(prompt_messages(conversation, positions=1000)) == 3
    conversation.reset()
    assert (conversation.turns, conversation.omitted_turns) == ([], 0)


def test_at_most_a_quarter_of_the_context_is_kept_free_for_the_answer() -> None:
    conversation = conversation_of(2)
    prompt_messages(conversation, positions=20, answer_tokens=1000)  # 6 + 6 + 3 = 15, and a quarter is 5
    assert conversation.omitted_turns == 0
    prompt_messages(conversation, positions=19, answer_tokens=1000)
    assert conversation.omitted_turns == 0
    prompt_messages(conversation, positions=18, answer_tokens=1000)
    assert conversation.omitted_turns == 1


def test_a_question_without_room_is_refused_and_no_turn_is_omitted() -> None:
    conversation = conversation_of(2)
    with pytest.raises(UserError, match="take 9 of the model's 9 positions"):
        conversation.ask("1 2 3 4 5 6 7 8", words, positions=9, answer_tokens=4)
    assert conversation.omitted_turns == 0
    # one free position is less than should be kept free, but enough for an answer
    assert len(conversation.ask("1 2 3 4 5 6 7 8", words, positions=10, answer_tokens=4)) == 9
    assert conversation.omitted_turns == 2


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(STORIES)


def training_prompt(tokenizer, template: str, messages: list[dict[str, str]]) -> list[int]:
    """Encode the messages and an answer as a training example; return the ids before the answer."""
    fields = {"messages": [*messages, {"role": "assistant", "content": "Six."}]}
    (prompt,) = prompts([Record("here", fields)], tokenizer, InstructionForm("chat", template))
    return prompt.input_ids


@needs_data
@pytest.mark.parametrize("template", ["alpaca", "plain", "auto"])
@pytest.mark.parametrize("count", [2, 4])
def test_our_templates_are_encoded_as_in_training(tokenizer, template: str, count: int) -> None:
    messages = MESSAGES[:count]
    assert ChatPrompt(tokenizer, template).ids(messages) == training_prompt(tokenizer, template, messages)


@needs_data
@pytest.mark.parametrize("template", [None, "chat", "auto"])
def test_the_chat_template_is_that_of_the_tokenizer(tokenizer, template: str | None) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE
    ids = ChatPrompt(tokenizer, template).ids(MESSAGES)
    assert ids == tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids) == (
        "<s> system: Be kind.\nuser: Who are you?\nassistant: Lily.\nuser: How old?\nassistant:"
    )


@needs_data
def test_the_alpaca_prompt_is_the_published_text(tokenizer) -> None:
    text = tokenizer.decode(ChatPrompt(tokenizer, "alpaca").ids(MESSAGES[1:2]), skip_special_tokens=True)
    assert text == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nWho are you?\n\n### Response:"
    )


@needs_data
def test_without_any_template_the_error_names_generate(tokenizer) -> None:
    for template in (None, "chat"):
        with pytest.raises(UserError, match=r"has no chat template.*`relora generate` \(without --chat\)"):
            ChatPrompt(tokenizer, template)


@needs_data
def test_the_error_of_a_template_is_quoted_in_one_line(tokenizer) -> None:
    tokenizer.chat_template = NO_SYSTEM
    prompt = ChatPrompt(tokenizer, None)
    assert prompt.ids(MESSAGES[1:])
    with pytest.raises(UserError, match="refuses this conversation: no system here"):
        prompt.ids(MESSAGES)
    tokenizer.chat_template = "{{ messages[0]['content'] | nothing }}"
    with pytest.raises(UserError, match=r"its chat template is damaged \(line 1: No filter named 'nothing'"):
        ChatPrompt(tokenizer, None).ids(MESSAGES)
