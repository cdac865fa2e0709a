"""Messages as other tools write them: roles, parts, tool calls, reasoning, and whether a response is scored."""

import json
from typing import Any

import pytest
from tests.data.tongues import TOOLS, gpt2_like, records

from relora.data.finetuning.instruct import InstructionForm, InstructionSet, encode, render_example
from relora.data.finetuning.layouts import find_layout
from relora.data.finetuning.messages import BadRecord, Message, read_messages, read_tools
from relora.errors import UserError

ASKED, ANSWERED = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}


def read(*entries: dict[str, Any]) -> list[Message]:
    return read_messages(list(entries), "messages")


def encoded(*rows: dict[str, Any], template: str = TOOLS, **form: Any) -> InstructionSet:
    return encode(records(*rows), gpt2_like(template), InstructionForm(**form), sequence_length=9999)


def shown(*rows: dict[str, Any], **form: Any) -> str:
    """The examples as `--show` prints them, without their places."""
    tokenizer = gpt2_like(TOOLS)
    return "\n".join(render_example(one, tokenizer).split("\n", 1)[1] for one in encoded(*rows, **form).examples)


@pytest.mark.parametrize(
    "flags", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}, {"trainable": False}]
)
@pytest.mark.parametrize("loss_on", ["response", "all"])
def test_a_response_may_say_that_it_is_not_scored(flags: dict[str, Any], loss_on: str) -> None:
    found = encoded({"messages": [ASKED, {**ANSWERED, "content": "BAD", **flags}, ASKED, ANSWERED]}, loss_on=loss_on)
    (example,) = found.examples
    tokenizer = gpt2_like(TOOLS)
    assert "BAD" in tokenizer.decode(example.input_ids)
    scored = tokenizer.decode(example.input_ids[example.scored])
    assert "BAD" not in scored and "So.<|im_end|>" in scored
    assert ("Why?" in scored) == (loss_on == "all")
    assert found.notes == (
        "responses seen and not scored, by their `weight`, `train` or `loss`, or since they stand in the prompt: 1, "
        "first in x.jsonl, line 1",
    )


def test_a_conversation_ends_with_its_last_scored_response() -> None:
    bad = {**ANSWERED, "weight": 0}
    found = encoded({"messages": [ASKED, ANSWERED, ASKED, bad]}, {"messages": [ASKED, bad]})
    assert str(found.counts) == "1 of 2 records used; 1 left out, with no response that is scored"
    assert found.notes == ("messages left out behind the last response that is scored: 2, first in x.jsonl, line 1",)
    blank = {"messages": [ASKED, ANSWERED, ASKED, {**ANSWERED, "content": " "}, ASKED, ANSWERED]}
    assert encoded(blank).notes == (
        "messages left out behind the last response that is scored: 1, first in x.jsonl, line 1",
        "messages left out because they are a blank response or stand behind one: 3, first in x.jsonl, line 1",
    )


@pytest.mark.parametrize("key", ["tool_calls", "function_call"])
@pytest.mark.parametrize("arguments", [{"city": "Rome"}, '{"city": "Rome"}'])
def test_a_tool_call_is_scored(key: str, arguments: Any) -> None:
    function = {"name": "weather", "arguments": arguments}
    told = {"tool_calls": [{"id": "1", "function": function}]} if key == "tool_calls" else {"function_call": function}
    answer = {"role": "tool" if key == "tool_calls" else "function", "name": "weather", "content": "17"}
    messages = [ASKED, {"role": "assistant", "content": None, **told}, answer, ANSWERED]
    assert shown({"messages": messages}) == (
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
        '⟦<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call><|im_end|>⟧\n'
        "<|im_start|>tool\n17<|im_end|>\n<|im_start|>assistant\n⟦So.<|im_end|>⟧"
    )


def test_the_roles_and_columns_of_sharegpt() -> None:
    said = [
        {"from": "human", "value": "Why?"},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "17"},
        {"from": "gpt", "value": "So."},
    ]
    tools = json.dumps([{"name": "weather"}])
    assert shown({"conversations": said, "system": "Be kind.", "tools": tools}) == (
        '<|im_start|>system\nTools: {"name": "weather"}<|im_end|>\n<|im_start|>system\nBe kind.<|im_end|>\n'
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
        '⟦<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call><|im_end|>⟧\n'
        "<|im_start|>tool\n17<|im_end|>\n<|im_start|>assistant\n⟦So.<|im_end|>⟧"
    )


def test_openais_older_functions_are_tools() -> None:
    fields = {"messages": [ASKED, ANSWERED], "functions": [{"name": "weather"}]}
    tools = ({"type": "function", "function": {"name": "weather"}},)
    assert find_layout(records(fields)[0]).conversation(fields).tools == tools


def test_a_content_may_be_a_list_of_parts() -> None:
    parts = [{"type": "text", "text": "Wh"}, "y", {"type": "text", "text": "?"}]
    assert read({"role": "user", "content": parts})[0].content == "Why?"
    thinking = [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}, {"type": "text", "text": "So."}]
    (message,) = read({"role": "assistant", "content": thinking})
    assert (message.content, message.reasoning) == ("So.", "Hm.")


def test_messages_may_be_text_in_json_as_in_a_table() -> None:
    assert shown({"messages": json.dumps([ASKED, ANSWERED])}) == shown({"messages": [ASKED, ANSWERED]})


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_has_several_names(key: str) -> None:
    assert read({**ANSWERED, key: "Hm."})[0].extra == {"reasoning_content": "Hm."}
    assert not read({"role": "assistant", "content": "", key: "Hm."})[0].is_blank


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {**ANSWERED, "weight": 0.5},
            r"message 1 of `messages` has 0\.5 as `weight`; a message is scored \(1, true\) or",
        ),
        ({**ANSWERED, "train": "no"}, r"message 1 of `messages` has 'no' as `train`"),
        ({**ANSWERED, "train_detail": []}, r"has `train_detail`: a message is scored as a whole or not at all; use"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
            r"message 1 of `messages` has a part of the type 'image_url' \(part 1 of `content`\); only text can be",
        ),
        ({"role": "user", "content": [{"type": "text", "text": 7}]}, "`content, part 1` is not text but int"),
        ({"role": "user", "content": [{"type": "text", "text": "x", "train": False}]}, "has a part with `train`"),
        ({"role": "assistant", "tool_calls": [{"id": 1}]}, "calls a tool by {'id': 1}, which has no name"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "x"}}]},
            "has 'x' as `arguments`, which is not valid JSON",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]},
            "calls `f` with arguments that are no object",
        ),
        ({"role": "function_call", "content": "weather(Rome)"}, "has 'weather.Rome.' as `value`, which is not valid"),
        ({**ANSWERED, "note": ["\ud800"]}, "holds half of a surrogate pair"),
        ({**ANSWERED, "note": json.loads("[" * 60 + "]" * 60)}, "nests values more than 50 deep"),
    ],
)
def test_what_is_wrong_with_a_message_is_said(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRecord, match=message):
        read(entry)


def test_prompt_and_completion_may_be_messages() -> None:
    shot = {"role": "assistant", "content": "shot"}
    fields = {"prompt": [ASKED, shot, ASKED], "completion": [ANSWERED]}
    text = shown(fields)
    assert text.count("⟦") == 1 and text.endswith("⟦So.<|im_end|>⟧") and "shot" in text
    assert shown({"prompt": "Why?", "completion": [ANSWERED]}) == shown({"prompt": "Why?", "completion": "So."})


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"chosen": [ASKED, ANSWERED], "rejected": [ASKED, ANSWERED]},
        {"prompt": "a", "completion": "b", "label": True},
        {"input": {}, "preferred_output": [], "non_preferred_output": []},
    ],
)
def test_preference_data_is_refused_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"x\.jsonl, line 1: the columns .* are preference data \(DPO, KTO, reward mod"):
        encoded(fields)


def test_one_side_of_preference_data_can_be_named() -> None:
    wanted = shown({"messages": [ASKED, ANSWERED]})
    pair = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    assert shown(pair, prompt_column="prompt", response_column="chosen") == wanted
    pair = {"chosen": [ASKED, ANSWERED], "rejected": [ASKED]}
    assert shown(pair, response_column="chosen") == wanted


def test_the_history_of_an_alpaca_record_is_used() -> None:
    fields = {"instruction": "And?", "output": "Yes.", "history": [["Why?", "So."]]}
    text = shown(fields)
    assert text.index("Why?") < text.index("⟦So.") < text.index("And?") < text.index("⟦Yes.")
    with pytest.raises(UserError, match="`history` is not a list of pairs of a prompt and a response"):
        encoded({**fields, "history": ["Why?"]})


def test_what_is_not_used_is_named_once_with_its_count() -> None:
    row = {
        "messages": [{**ASKED, "weight": 1}, {**ANSWERED, "refusal": None, "audio": {"id": 7}}],
        "id": 3,
        "source": "",
    }
    found = encoded(row, row, {**row, "system": "Be kind."})
    assert found.notes == (
        "not used: column `id` (3 records), `weight` in messages (3 records), `audio` in messages (3 records)",
    )
    own = {"messages": [{"role": "system", "content": "Mine."}, ASKED, ANSWERED], "system": "Be kind."}
    assert encoded(own).notes == ("not used: column `system` (1 record)",)
    many = {"text": "x", **{f"column {number}": 1 for number in range(20)}}
    assert encoded(many).notes[0].endswith("column `column 7` (1 record), 12 more")


def test_descriptions_of_tools_with_an_input_schema_are_given_as_functions() -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    fields = {"tools": [{"name": "weather", "description": "d", "input_schema": schema}, {"name": "bare"}]}
    function = {"name": "weather", "description": "d", "parameters": schema}
    assert read_tools(fields) == ({"type": "function", "function": function}, {"name": "bare"})


def test_tools_that_are_no_descriptions_are_refused() -> None:
    with pytest.raises(
        UserError, match="`tools` is not a list of descriptions of tools; rename the column if it is som"
    ):
        encoded({"instruction": "a", "output": "b", "tools": "a hammer"})


def test_parts_that_call_tools_and_their_results_are_read_as_tool_calls_and_tool_messages() -> None:
    use = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Rome"}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "21 C"}]}
    messages = read_messages(
        [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": [{"type": "text", "text": "Let me look."}, use]},
            {"role": "user", "content": [result, {"type": "text", "text": "And?"}]},
            {"role": "assistant", "content": [use]},
            {"role": "user", "content": [result]},
            {"role": "assistant", "content": "21 C."},
        ],
        "messages",
    )
    call = {"type": "function", "id": "t1", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    assert [(one.role, one.content) for one in messages] == [
        ("user", "Weather?"),
        ("assistant", "Let me look."),
        ("tool", "21 C"),
        ("user", "And?"),
        ("assistant", ""),
        ("tool", "21 C"),
        ("assistant", "21 C."),
    ]
    assert [messages[place].extra["tool_calls"] for place in (1, 4)] == [[call], [call]]
    assert [messages[place].extra["tool_call_id"] for place in (2, 5)] == ["t1", "t1"]
    for role, part in (("user", use), ("assistant", result)):
        with pytest.raises(BadRecord, match=f"part of the type '{part['type']}'"):
            read_messages([{"role": role, "content": [part]}], "messages")


@pytest.mark.parametrize("content", [None, ""])
def test_a_refusal_is_the_text_of_a_response_without_another(content: str | None) -> None:
    entry = {"role": "assistant", "refusal": "I cannot help."}
    [message] = read_messages([entry | {"content": content}], "messages")
    assert message.content == "I cannot help." and not message.extra
    [message] = read_messages([entry | {"content": [{"type": "refusal", "refusal": "No."}], "refusal": None}], "m")
    assert message.content == "No."
    [message] = read_messages([entry | {"content": "Yes."}], "messages")
    assert message.content == "Yes." and message.extra == {"refusal": "I cannot help."}  # named as not used


@pytest.mark.parametrize(
    ("role", "meant"),
    [("model", "assistant"), ("GPT", "assistant"), ("User", "user"), ("ipython", "tool"), ("tool_response", "tool")],
)
def test_roles_have_several_names(role: str, meant: str) -> None:
    [message] = read_messages([{"role": role, "content": "x"}], "messages")
    assert message.role == meant


def test_the_text_of_a_role_that_calls_tools_is_read_as_its_calls() -> None:
    [message] = read_messages([{"from": "tool_call", "value": '{"name": "f", "arguments": {"x": 1}}'}], "messages")
    assert message.role == "assistant"
    assert message.extra["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
