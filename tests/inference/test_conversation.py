"""What a model hears of a chat: the system prompt, the last turns that fit, the question."""

import pytest

from relora.errors import UserError
from relora.inference.conversation import Conversation, Message, Turn


def words(messages: list[Message]) -> list[int]:
    """A token for each word, and one for each role."""
    return [hash(word) for message in messages for word in [message["role"], *message["content"].split()]]


def talk(turns: int, system: str | None = None) -> Conversation:
    return Conversation(system, [Turn(f"question {n}", f"answer {n}") for n in range(turns)])


def heard(conversation: Conversation, positions: int | None, answer_tokens: int = 4) -> list[Message]:
    """The messages behind the prompt for one more question."""
    seen: list[list[Message]] = []

    def encode(messages: list[Message]) -> list[int]:
        seen.append(messages)
        return words(messages)

    ids = conversation.ask("now what", encode, positions=positions, answer_tokens=answer_tokens)
    assert ids == words(seen[-1])
    return seen[-1]


def test_everything_is_heard_while_it_fits() -> None:
    messages = heard(talk(2, "be brief"), positions=100)
    assert [message["content"] for message in messages] == [
        *("be brief", "question 0", "answer 0", "question 1", "answer 1", "now what"),
    ]
    assert [message["role"] for message in messages] == ["system", *["user", "assistant"] * 2, "user"]
    assert heard(talk(50), positions=None)[0]["content"] == "question 0"


def test_the_oldest_turns_go_first_and_the_system_prompt_never() -> None:
    # 3 tokens of the system prompt, 6 of a turn, 3 of the question, 4 kept for the answer
    conversation = talk(5, "be brief")
    messages = heard(conversation, positions=3 + 2 * 6 + 3 + 4)
    assert [message["content"] for message in messages] == [
        *("be brief", "question 3", "answer 3", "question 4", "answer 4", "now what"),
    ]
    assert conversation.forgotten == 3
    assert len(conversation.turns) == 5  # to be saved


def test_what_is_forgotten_does_not_come_back() -> None:
    conversation = talk(5)
    heard(conversation, positions=13)
    assert conversation.forgotten == 4
    assert len(heard(conversation, positions=1000)) == 3
    conversation.reset()
    assert (conversation.turns, conversation.forgotten) == ([], 0)


def test_room_for_an_answer_is_a_quarter_at_most() -> None:
    conversation = talk(2)
    heard(conversation, positions=20, answer_tokens=1000)  # 6 + 6 + 3 = 15, and a quarter is 5
    assert conversation.forgotten == 0
    heard(conversation, positions=19, answer_tokens=1000)
    assert conversation.forgotten == 0
    heard(conversation, positions=18, answer_tokens=1000)
    assert conversation.forgotten == 1


def test_a_question_without_room_is_refused_and_nothing_forgotten() -> None:
    conversation = talk(2)
    with pytest.raises(UserError, match="take 9 of the model's 9 positions"):
        conversation.ask("1 2 3 4 5 6 7 8", words, positions=9, answer_tokens=4)
    assert conversation.forgotten == 0
    # less than was to be kept free is still an answer
    assert len(conversation.ask("1 2 3 4 5 6 7 8", words, positions=10, answer_tokens=4)) == 9
    assert conversation.forgotten == 2
