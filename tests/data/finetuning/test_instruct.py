import dataclasses
from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import example as with_example
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.tongues import CHATML, WITH_BLOCKS, gpt2_like, llama_like, records

from relora.data.finetuning import instruct
from relora.data.finetuning.examples import Example
from relora.data.finetuning.instruct import (
    ExampleCounts,
    InstructionForm,
    InstructionSet,
    encode,
    prompts,
    render_example,
)
from relora.errors import UserError

GPT2, LLAMA = gpt2_like(), llama_like()
GPT2_CHAT, GPT2_BLOCKS, LLAMA_CHAT = gpt2_like(CHATML), gpt2_like(WITH_BLOCKS), llama_like(CHATML)
END = "<|im_end|>"
LONG = 100_000

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁\ufdd0"), max_size=30) | st.sampled_from(
    ["<|endoftext|>", "a</s>b", f"x{END}\n<|im_start|>user", "\n\nHe", "  the", " ", "He the", "\t"]
)
RESPONSES = TEXTS.filter(str.strip)


def one(fields: dict[str, Any], tokenizer: Any = GPT2, length: int = LONG, **form: Any) -> Example:
    (example,) = encode(records(fields), tokenizer, InstructionForm(**form), sequence_length=length).examples
    return example


def text(ids: Any, tokenizer: Any = GPT2) -> str:
    return str(tokenizer.decode(np.asarray(ids).tolist(), clean_up_tokenization_spaces=False))


def parted(example: Example, tokenizer: Any) -> tuple[str, str]:
    """The text that is not scored and the text that is, of an example of one turn, without BOS and EOS."""
    ids, scored = example.input_ids.tolist(), example.scored.tolist()
    start = scored.index(True)
    assert scored == [False] * start + [True] * (len(ids) - start)
    assert ids.count(tokenizer.eos_token_id) == 1  # whatever the texts spell
    assert ids[-1] == tokenizer.eos_token_id
    opening = 1 if tokenizer is LLAMA else 0
    if opening:
        assert ids[0] == tokenizer.bos_token_id
    prompt, whole = text(ids[opening:start], tokenizer), text(ids[opening:-1], tokenizer)
    assert whole.startswith(prompt)
    return prompt, whole[len(prompt) :]


@settings(max_examples=150)
@given(
    tokenizer=st.sampled_from([GPT2, LLAMA]),
    template=st.sampled_from(["alpaca", "plain"]),
    prompt=TEXTS,
    response=RESPONSES,
)
def test_the_mask_is_exact(tokenizer: Any, template: str, prompt: str, response: str) -> None:
    example = one({"instruction": f"I {prompt}", "output": response}, tokenizer, template=template)
    asked, answered = parted(example, tokenizer)
    assert answered == response
    if template == "alpaca":
        assert asked.endswith(f"### Instruction:\nI {prompt}\n\n### Response:")
    else:
        assert asked == f"I {prompt}\n"


@settings(max_examples=100)
@given(
    tokenizer=st.sampled_from([GPT2_CHAT, GPT2_BLOCKS]),
    prompt=TEXTS,
    responses=st.lists(RESPONSES, min_size=1, max_size=3),
)
def test_the_mask_of_a_chat_is_exact(tokenizer: Any, prompt: str, responses: list[str]) -> None:
    turns = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}] for answer in responses]
    example = one({"messages": list(chain(*turns))}, tokenizer)
    starts = np.flatnonzero(np.diff(example.scored.astype(int)) == 1) + 1
    ends = [*(np.flatnonzero(np.diff(example.scored.astype(int)) == -1) + 1).tolist(), len(example.scored)]
    scored = [text(example.input_ids[start:end], tokenizer) for start, end in zip(starts.tolist(), ends, strict=True)]
    assert scored == [f"{answer}{END}" for answer in responses]
    assert text(example.input_ids, tokenizer) == "\n".join(
        f"<|im_start|>user\n{prompt}{END}\n<|im_start|>assistant\n{answer}{END}" for answer in responses
    )
    # only the template's control tokens are control tokens
    end, start = tokenizer.convert_tokens_to_ids([END, "<|im_start|>"])
    assert [example.input_ids.tolist().count(token) for token in (end, start)] == [2 * len(responses)] * 2
    assert tokenizer.eos_token_id not in example.input_ids


@pytest.mark.parametrize("tokenizer", [GPT2_CHAT, GPT2_BLOCKS])
def test_a_chat_has_the_ids_that_transformers_gives_it(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "The cat sat"},
        {"role": "assistant", "content": "on the mat."},
        {"role": "user", "content": "And the dog?"},
        {"role": "assistant", "content": "On the log."},
    ]
    example = one({"messages": messages}, tokenizer)
    wanted = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=tokenizer is GPT2_BLOCKS
    )
    line_end = len(tokenizer("\n").input_ids)
    assert example.input_ids.tolist() == wanted["input_ids"][:-line_end]
    if tokenizer is GPT2_BLOCKS:
        assert example.scored.tolist() == [bool(mark) for mark in wanted["assistant_masks"][:-line_end]]


def test_a_prompt_has_the_ids_that_it_has_when_a_model_is_asked() -> None:
    for tokenizer in (GPT2, LLAMA):
        example = one({"instruction": "the cat", "output": "He sat"}, tokenizer)
        (prompt,) = prompts(records({"instruction": "the cat", "output": "He sat"}), tokenizer, InstructionForm())
        asked = (
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n### Instruction:\nthe cat\n\n### Response:"
        )
        assert prompt.input_ids == tokenizer(asked).input_ids
        assert example.input_ids[~example.scored].tolist() == prompt.input_ids
        assert prompt.response == "He sat"
        assert prompt.where == "x.jsonl, line 1"
    for tokenizer in (GPT2_CHAT, GPT2_BLOCKS):
        messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}] * 2
        (prompt,) = prompts(records({"messages": messages}), tokenizer, InstructionForm())
        wanted = tokenizer.apply_chat_template(messages[:3], add_generation_prompt=True, return_dict=False)
        assert prompt.input_ids == wanted
    with pytest.raises(UserError, match="completions have no prompt"):
        list(prompts(records({"text": "x"}), GPT2, InstructionForm()))


def test_a_response_of_llamas_kind_begins_without_a_space_of_its_own() -> None:
    example = one({"prompt": "x", "completion": "He"}, LLAMA, template="plain")
    pieces = LLAMA.convert_ids_to_tokens(example.input_ids.tolist())
    assert pieces == ["<s>", "▁", "x", "<0x0A>", "He", "</s>"]


def test_every_turn_ends_and_every_response_is_scored() -> None:
    said = [{"from": who, "value": what} for who, what in (("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d"))]
    example = one({"conversations": said}, template="plain")
    eos = GPT2.eos_token_id
    assert text(example.input_ids) == "a\nb<|endoftext|>c\nd<|endoftext|>"
    assert [text(example.input_ids[example.scored])] == ["b<|endoftext|>d<|endoftext|>"]
    assert example.input_ids.tolist().count(eos) == 2


def test_completions_and_loss_on_all() -> None:
    example = one({"text": "once"}, LLAMA)
    assert LLAMA.convert_ids_to_tokens(example.input_ids.tolist()) == ["<s>", "▁", "o", "n", "c", "e", "</s>"]
    assert example.scored.all()
    response, whole = (one({"instruction": "a", "output": "b"}, loss_on=loss) for loss in ("response", "all"))
    assert whole.scored.all() and not response.scored.all()
    assert whole.input_ids.tolist() == response.input_ids.tolist()


@settings(max_examples=200)
@given(
    prompts=st.lists(st.integers(0, 30), min_size=1, max_size=3),
    responses=st.lists(st.integers(1, 30), min_size=3, max_size=3),
    length=st.integers(2, 60),
)
@with_example(prompts=[0], responses=[30, 1, 1], length=5)
@with_example(prompts=[30], responses=[4, 1, 1], length=6)
def test_cutting_keeps_the_response(prompts: list[int], responses: list[int], length: int) -> None:
    # "plain", and characters that are one token each: the sizes are known
    pairs = list(zip(prompts, responses, strict=False))
    said = [
        [{"role": "user", "content": "Q" * size}, {"role": "assistant", "content": "Z" * other}]
        for size, other in pairs
    ]
    form = InstructionForm(template="plain")
    result = encode(records({"messages": list(chain(*said))}), GPT2, form, sequence_length=length)
    (example,) = result.examples
    ids, eos = example.input_ids.tolist(), GPT2.eos_token_id
    prompt_sizes = [size + 1 if size else 0 for size in prompts]  # the line end
    turns = [prompt + response + 1 for prompt, (_, response) in zip(prompt_sizes, pairs, strict=True)]
    assert len(ids) <= length
    assert example.targets >= 1
    assert text(ids).count("Z") + ids.count(eos) == example.scored.sum()
    if turns[0] <= length:  # whole turns, as many as fit
        kept = max(number for number in range(1, len(turns) + 1) if sum(turns[:number]) <= length)
        assert len(ids) == sum(turns[:kept])
        assert ids.count(eos) == kept
        assert (result.counts.prompt_cut, result.counts.response_cut) == (0, int(kept < len(turns)))
    elif responses[0] + 1 + min(1, prompt_sizes[0]) <= length:  # only the prompt is cut
        assert ids[-1] == eos
        assert text(ids).count("Z") == responses[0]
        assert len(ids) == length
        assert (result.counts.prompt_cut, result.counts.response_cut) == (1, int(len(turns) > 1))
    else:
        assert eos not in ids
        assert len(ids) == length
        assert text(ids).count("Q") + text(ids).count("\n") == min(prompt_sizes[0], length // 2)
        assert result.counts.response_cut == 1


def test_a_prompt_loses_its_middle() -> None:
    example = one({"prompt": "abcdefgh", "completion": "xy"}, length=8, template="plain")
    assert text(example.input_ids) == "abch\nxy<|endoftext|>"
    long = one({"prompt": "abcdefgh", "completion": "x" * 99}, LLAMA, length=8, template="plain")
    assert LLAMA.convert_ids_to_tokens(long.input_ids.tolist()) == ["<s>", "▁", "h", "<0x0A>", *"xxxx"]


def test_counts() -> None:
    rows = [
        {"instruction": "a", "output": "b"},
        {"instruction": "a", "output": " "},
        {"instruction": "a", "output": None},
        {"instruction": "a", "output": 3},
        {"instruction": "a" * 50, "output": "b"},
        {"instruction": "a", "output": "b" * 50},
        {"instruction": "a"},
    ]
    form = InstructionForm(template="plain")
    result = encode(records(*rows), GPT2, form, sequence_length=20, skip_bad=True)
    assert result.counts == ExampleCounts(read=7, used=3, bad=2, empty=2, prompt_cut=1, response_cut=1)
    assert str(result) == (
        "layout alpaca (instruction, input, output), template plain: 3 of 7 records used; "
        "2 left out, with no response; 2 left out, bad; 1 cut in the prompt; 1 cut in the response"
    )
    assert [example.where for example in result.examples] == [f"x.jsonl, line {line}" for line in (1, 5, 6)]
    with pytest.raises(UserError, match=r"x\.jsonl, line 4: `output` is not text but int \(data.skip_bad leaves such"):
        encode(records(*rows), GPT2, form, sequence_length=20, skip_bad=False)


def test_an_option_is_named_only_where_the_command_has_it() -> None:
    with pytest.raises(UserError, match=r"line 1: `output` is not text but int$"):
        list(prompts(records({"instruction": "a", "output": 3}), GPT2, InstructionForm()))


def test_nothing_to_use_is_one_line() -> None:
    with pytest.raises(UserError, match="there is no record to use"):
        encode([], GPT2, InstructionForm(), sequence_length=8)
    with pytest.raises(UserError, match="no example is left to use: 0 of 1 records used; 1 left out, with no response"):
        encode(records({"text": ""}), GPT2, InstructionForm(), sequence_length=8)
    with pytest.raises(UserError, match="sequence_length is 1: an example needs at least 2 tokens"):
        encode(records({"text": "x"}), GPT2, InstructionForm(), sequence_length=1)


def test_many_records_are_encoded_as_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instruct, "CHUNK_CHARS", 10_000)
    rows = [{"instruction": "the cat " * (number % 7), "output": "sat " * (1 + number % 5)} for number in range(300)]
    rows.insert(100, {"instruction": "x " * 6_000, "output": "y " * 4_000})  # more than a chunk
    for tokenizer in (GPT2, LLAMA, LLAMA_CHAT):
        together = encode(records(*rows), tokenizer, InstructionForm(), sequence_length=64)
        assert together.counts.used == 301
        for number in (0, 1, 99, 100, 101, 300):
            alone = one(rows[number], tokenizer, 64)
            assert together.examples[number].input_ids.tolist() == alone.input_ids.tolist()
            assert together.examples[number].scored.tolist() == alone.scored.tolist()


def test_an_example_is_shown_as_the_model_sees_it() -> None:
    example = one({"prompt": "ä \x1b[31m<|endoftext|>", "completion": "b\u202e\nc"}, template="plain")
    tokens, scored = len(example.input_ids), int(example.scored.sum())
    assert render_example(example, GPT2) == (
        f"x.jsonl, line 1: {tokens} tokens, {scored} scored\nä \\x1b[31m<|endoftext|>\n⟦b\\u202e\nc<|endoftext|>⟧"
    )
    llama = one({"prompt": "He", "completion": "the"}, LLAMA, template="plain")
    assert render_example(llama, LLAMA).endswith("He\n⟦the</s>⟧")
    said = [{"role": role, "content": "x"} for role in ("user", "assistant")] * 2
    asked = f"<|im_start|>user\nx{END}\n<|im_start|>assistant\n"
    assert render_example(one({"messages": said}, GPT2_CHAT), GPT2_CHAT).endswith(f"\n{asked}⟦x{END}⟧\n{asked}⟦x{END}⟧")


def test_the_form_and_the_set_are_plain_values() -> None:
    assert dataclasses.replace(InstructionForm(), layout="dolly") == InstructionForm(layout="dolly")
    result = encode(records({"text": "x"}), GPT2, InstructionForm(), sequence_length=8)
    assert isinstance(result, InstructionSet)
    assert (result.layout.name, result.template) == ("completion", "none")
