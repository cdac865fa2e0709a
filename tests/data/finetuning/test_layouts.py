from typing import Any

import pytest
from tests.data.tongues import records

from relora.data.finetuning.layouts import LONGEST_TEXT, Conversation, find_layout
from relora.data.finetuning.messages import MOST_MESSAGES, BadRecord
from relora.errors import UserError

ASKED = {"role": "user", "content": "Why?"}
ANSWERED = {"role": "assistant", "content": "So."}


def conversation_of(fields: dict[str, Any], **options: Any) -> Conversation:
    return find_layout(records(fields)[0], **options).conversation(fields)


def read(fields: dict[str, Any], **options: Any) -> list[tuple[str, str, str]]:
    messages = conversation_of(fields, **options).messages
    return [(message.role, message.content, message.input) for message in messages]


@pytest.mark.parametrize(
    ("fields", "name", "conversation"),
    [
        ({"instruction": "a", "input": "b", "output": "c"}, "alpaca", [("user", "a", "b"), ("assistant", "c", "")]),
        ({"instruction": "a", "input": " ", "output": "c"}, "alpaca", [("user", "a", ""), ("assistant", "c", "")]),
        ({"instruction": "a", "output": "c", "id": 3}, "alpaca", [("user", "a", ""), ("assistant", "c", "")]),
        ({"instruction": "a", "context": None, "response": "c"}, "dolly", [("user", "a", ""), ("assistant", "c", "")]),
        ({"messages": [ASKED, ANSWERED]}, "chat", [("user", "Why?", ""), ("assistant", "So.", "")]),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "id": "x"},
            "chat",
            [("user", "a", ""), ("assistant", "b", "")],
        ),
        ({"prompt": "a", "completion": "b"}, "columns", [("user", "a", ""), ("assistant", "b", "")]),
        ({"question": "a", "answer": "b"}, "columns", [("user", "a", ""), ("assistant", "b", "")]),
        ({"text": "a", "label": 1}, "completion", [("assistant", "a", "")]),
        ({"prompt": "p", "messages": [ASKED, ANSWERED]}, "chat", [("user", "Why?", ""), ("assistant", "So.", "")]),
        ({"input": [ASKED], "output": "So."}, "columns", [("user", "Why?", ""), ("assistant", "So.", "")]),
        (
            {"id": "0", "data": ["a", "b", "c", "d"]},
            "chat",
            [("user", "a", ""), ("assistant", "b", ""), ("user", "c", ""), ("assistant", "d", "")],
        ),
        ({"text": "a", "data": ["b", "c"]}, "completion", [("assistant", "a", "")]),
    ],
)
def test_the_columns_tell_the_layout(fields: dict[str, Any], name: str, conversation: list[tuple[str, ...]]) -> None:
    assert find_layout(records(fields)[0]).name == name
    assert read(fields) == read(fields, name=name) == conversation


def test_a_list_of_turns_with_a_question_at_its_end_loses_the_question_and_says_so() -> None:
    found = conversation_of({"data": ["a", "b", "c"]})
    assert [message.content for message in found.messages] == ["a", "b"]
    assert found.noticed == ("messages left out behind the last response that is scored",)


def test_earlier_responses_in_a_list_of_the_prompt_are_seen_and_not_scored() -> None:
    found = conversation_of({"input": [ASKED, ANSWERED, ASKED], "output": "Yes.", "system_prompt": "Think."})
    assert [message.role for message in found.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [message.is_scored for message in found.messages if message.role == "assistant"] == [False, True]


@pytest.mark.parametrize("fields", [{"input": "a", "output": "b"}, {"data": "a b"}, {"data": {"a": "b"}}])
def test_columns_whose_names_are_of_much_else_tell_a_layout_by_lists_only(fields: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"which is no known layout; name the prompt's and the response's column"):
        read(fields)


def test_a_column_that_holds_lists_elsewhere_may_be_named_for_texts() -> None:
    fields = {"input": "a", "output": "b"}
    assert read(fields, prompt="input", response="output") == [("user", "a", ""), ("assistant", "b", "")]


def test_columns_by_name() -> None:
    fields = {"q": "a", "a": "b", "text": "c"}
    assert read(fields, prompt="q", response="a") == [("user", "a", ""), ("assistant", "b", "")]
    assert read(fields, name="columns", response="q") == [("assistant", "a", "")]
    assert str(find_layout(records(fields)[0], prompt="q", response="a")) == "layout columns (q, a)"


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_system_prompt_is_kept(column: str) -> None:
    system = ("system", "Be kind.", "")
    for fields in ({"instruction": "a", "output": "b"}, {"prompt": "a", "response": "b"}, {"messages": [ANSWERED]}):
        assert read({column: "Be kind.", **fields})[0] == system
        assert read({column: None, **fields}) == read({column: "", **fields}) == read(fields)
    own = {"role": "system", "content": "Mine."}
    with_own = {column: "Be kind.", "messages": [own, ANSWERED]}
    assert read(with_own) == [("system", "Mine.", ""), ("assistant", "So.", "")]


def test_a_conversation_ends_with_its_last_usable_response() -> None:
    blank = {"role": "assistant", "content": " \n"}
    assert len(read({"messages": [ASKED, ANSWERED, ASKED]})) == 2
    assert len(read({"messages": [ASKED, ANSWERED, ASKED, blank, ASKED, ANSWERED]})) == 2
    assert read({"messages": [ASKED, blank]}) == read({"messages": [ASKED]}) == read({"messages": []}) == []
    assert read({"instruction": "a", "output": ""}) == read({"instruction": "a", "output": None}) == []
    assert read({"text": " "}) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"x\.jsonl, line 1: there are the columns `a`, `b`, which is no known layout; name the prompt's and"),
        ({"name": "alpaca"}, r"there are the columns `a`, `b`; layout alpaca also needs `instruction`, `output`"),
        ({"name": "chat"}, r"layout chat needs `messages` or `conversations`"),
        ({"name": "columns"}, r"layout columns needs `completion`, `prompt` or .* or columns named by you"),
        ({"prompt": "a", "response": "c"}, r"layout columns also needs `c`"),
        ({"prompt": "a"}, r"column `a` holds the prompts; name the responses' column, too"),
        ({"prompt": "a", "response": "b", "name": "dolly"}, r"layout dolly has columns of its own"),
    ],
)
def test_columns_that_do_not_fit_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_layout(records({"a": "x", "b": "y"})[0], **options)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"instruction": "a", "output": 3}, "`output` is not text but int"),
        ({"instruction": "a", "input": ["b"], "output": "c"}, "`input` is not text but list"),
        ({"text": [ASKED, ANSWERED]}, "`text` is not text but list"),
        ({"instruction": "a", "output": "\ud800"}, "`output` holds half of a surrogate pair"),
        ({"instruction": "a", "output": "\ufdd0"}, r"`output` holds U\+FDD0, which is no character"),
        ({"instruction": "a", "output": "b" * (LONGEST_TEXT + 1)}, "has 1,048,578 characters; one example has at most"),
        ({"messages": "hello"}, "`messages` is not a list of messages but str"),
        ({"messages": ["hello"]}, "message 1 of `messages` is not an object"),
        ({"messages": [{"role": "user"}]}, "message 1 of `messages` has neither role and content nor from and value"),
        ({"messages": [ASKED, {"role": "judge", "content": "x"}]}, "message 2 of `messages` is from 'judge'; known"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, r"message 1 of `messages` is from \['user'\]"),
        ({"messages": [{"role": "user", "content": 7}]}, "message 1 of `messages`: `content` is not text but int"),
        ({"messages": [ASKED] * (MOST_MESSAGES + 1)}, "has 1,001 messages; one example has at most 1,000"),
    ],
)
def test_what_is_wrong_with_a_record_is_said(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRecord, match=message):
        read(fields)


def test_a_later_record_without_a_column() -> None:
    layout = find_layout(records({"instruction": "a", "output": "b"})[0])
    with pytest.raises(BadRecord, match="no column `output`; there are `instruction`, `x`"):
        layout.conversation({"instruction": "a", "x": 1})


def test_an_answer_to_a_question_about_a_text_is_read_with_the_text() -> None:
    fields = {"question": "How many?", "context": "CREATE TABLE t (x INT)", "answer": "SELECT COUNT(*) FROM t"}
    assert read(fields) == [("user", fields["question"], fields["context"]), ("assistant", fields["answer"], "")]
    assert str(find_layout(records(fields)[0])) == "layout columns (question, context, answer)"


def test_a_system_message_may_be_in_text_parts() -> None:
    found = conversation_of({"system": [{"type": "text", "text": "Be kind."}], "messages": [ASKED, ANSWERED]})
    assert (found.messages[0].role, found.messages[0].content, found.unused) == ("system", "Be kind.", ())
