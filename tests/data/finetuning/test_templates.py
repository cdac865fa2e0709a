import pytest
from tests.data.tongues import CHATML, gpt2_like

from relora.data.finetuning.layouts import Conversation, Layout
from relora.data.finetuning.messages import BadRecord, Message
from relora.data.finetuning.templates import Part, alpaca, completion, plain
from relora.data.finetuning.writer import find_writer
from relora.errors import UserError

CHAT = Layout("chat", "messages")
TURN = (Message("user", "Why?"), Message("assistant", "So."))
TURNS = (Message("system", "Be kind."), *TURN, Message("user", "And?"), Message("assistant", "Yes."))


def test_alpaca_is_as_published() -> None:
    assert alpaca(TURN) == [
        Part(
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n### Instruction:\nWhy?\n\n### Response:",
            False,
        ),
        Part("So.", True, eos=True),
    ]
    assert alpaca((Message("user", "Add.", "1, 2"), Message("assistant", "3")))[0].text == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:"
    )


def test_alpaca_with_turns_and_a_system_prompt() -> None:
    assert alpaca(TURNS) == [
        Part("Be kind.\n\n### Instruction:\nWhy?\n\n### Response:", False),
        Part("So.", True, eos=True),
        Part("\n\n### Instruction:\nAnd?\n\n### Response:", False),
        Part("Yes.", True, eos=True),
    ]


def test_plain() -> None:
    assert plain(TURNS) == [
        Part("Be kind.\nWhy?\n", False),
        Part("So.", True, eos=True),
        Part("And?\n", False),
        Part("Yes.", True, eos=True),
    ]
    assert plain((Message("user", "Add.", "1, 2"), Message("assistant", "3")))[0].text == "Add.\n1, 2\n"


def test_a_completion_has_no_template() -> None:
    assert find_writer("auto", Layout("completion", "text"), gpt2_like(CHATML)).name == "none"
    assert completion((Message("assistant", "Once."),)) == [Part("Once.", True, eos=True)]


@pytest.mark.parametrize("write", [alpaca, plain])
def test_tools_need_a_chat_template(write) -> None:
    calls = Message("assistant", "", extra={"tool_calls": [{"function": {"name": "f", "arguments": {}}}]})
    told = (Message("user", "Why?"), Message("tool", "7"), Message("assistant", "So."))
    with pytest.raises(BadRecord, match=r"a message from a tool needs a chat template.*set data.template"):
        write(told)
    with pytest.raises(BadRecord, match="a response that calls a tool needs a chat template"):
        write((Message("user", "Why?"), calls))


def test_a_response_that_is_not_scored_is_written() -> None:
    assert plain((Message("user", "Q"), Message("assistant", "bad", is_scored=False), *TURN)) == [
        Part("Q\n", False),
        Part("bad", True, eos=True, is_scored=False),
        Part("Why?\n", False),
        Part("So.", True, eos=True),
    ]


def test_what_these_templates_cannot_write_is_named() -> None:
    thoughtful = Message("assistant", "So.", extra={"reasoning_content": "Hm.", "name": "Bob", "nothing": None})
    conversation = Conversation((Message("user", "Why?"), thoughtful), tools=({"name": "f"},))
    written = find_writer("plain", CHAT, gpt2_like()).write(conversation)
    assert written.unused == (
        "`reasoning_content` in messages",
        "`name` in messages",
        "the descriptions of tools, which need a chat template (plain is in use)",
    )
    assert written.response == "So."


def test_auto_is_the_tokenizers_own_template_else_alpaca() -> None:
    assert find_writer("auto", CHAT, gpt2_like(CHATML)).name == "chat"
    assert find_writer("auto", CHAT, gpt2_like()).name == "alpaca"
    with pytest.raises(UserError, match="has no chat template; choose the template `alpaca` or `plain`"):
        find_writer("chat", CHAT, gpt2_like())
