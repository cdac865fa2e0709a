"""The same seed gives the same text, streamed or not, and the model and the random streams are left as they were."""

import shutil
from pathlib import Path

import pytest
import torch
from tests.adapters.adapted import STORIES, lora, needs_data, prompts, run_with_adapter, with_template

from relora.data.tokenizer import load_tokenizer
from relora.errors import UserError
from relora.inference.decoding import Sampling
from relora.inference.generate import describe, generate, sample_texts
from relora.inference.loading import load_model_or_run
from relora.model import open_model

pytestmark = needs_data

PROMPT = "Once upon a time"
GREEDY = Sampling(max_new_tokens=12, do_sample=False)


@pytest.fixture(scope="module")
def parts():
    return open_model(STORIES), load_tokenizer(str(STORIES))


def sample(parts, seed: int, prompts=(PROMPT,), **changes) -> list[str]:
    settings = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 0.95} | changes
    return sample_texts(*parts, prompts, seed=seed, **settings)


def test_what_is_streamed_is_what_is_returned(capfd: pytest.CaptureFixture[str]) -> None:
    pieces: list[str] = []
    result = generate(STORIES, [PROMPT, "Lily"], GREEDY, write=pieces.append)
    assert "".join(pieces) == "".join(text + "\n" for text in result.texts)
    assert len(pieces) > 2  # a tiny model generates several tokens per piece
    assert result.texts[0].startswith("Once upon a time, there was a little")
    assert result.tokens == 24
    assert result.tokens_per_second == pytest.approx(result.tokens / result.seconds)
    assert result.peak_memory_bytes > 10 * 2**20
    assert "24 tokens in" in describe(result)
    assert capfd.readouterr() == ("", "")


def test_greedy_text_is_that_of_transformers(parts) -> None:
    model, tokenizer = parts
    ids = tokenizer(PROMPT, return_tensors="pt")
    expected = model.eval().generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert generate(STORIES, [PROMPT], GREEDY).texts == [tokenizer.decode(expected[0], skip_special_tokens=True)]
    assert generate(STORIES, [PROMPT], Sampling(max_new_tokens=12, temperature=0)).texts == [
        tokenizer.decode(expected[0], skip_special_tokens=True)
    ]


def test_a_seed_gives_the_same_text_whatever_came_before(parts) -> None:
    first = sample(parts, seed=1)
    torch.rand(5)
    assert sample(parts, seed=1) == first
    assert sample(parts, seed=1, prompts=["Lily", PROMPT])[1:] == first
    assert sample(parts, seed=2, max_new_tokens=40) != sample(parts, seed=1, max_new_tokens=40)
    sampled = Sampling(max_new_tokens=12, temperature=1.0, top_p=0.95)
    assert generate(STORIES, [PROMPT], sampled, seed=1).texts == first


def test_sampling_leaves_model_and_streams_alone(parts) -> None:
    model, _ = parts
    model.train()
    model.model.norm.eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    sample(parts, seed=1)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_options_change_the_text(parts) -> None:
    plain = generate(STORIES, [PROMPT], Sampling(max_new_tokens=40, temperature=1.5, top_p=1.0)).texts
    assert generate(STORIES, [PROMPT], Sampling(max_new_tokens=40, temperature=1.5, top_p=1.0, top_k=1)).texts != plain
    greedy = generate(STORIES, [PROMPT], Sampling(max_new_tokens=40, do_sample=False)).texts
    assert generate(STORIES, [PROMPT], Sampling(max_new_tokens=40, temperature=1.5, top_k=1)).texts == greedy
    penalised = Sampling(max_new_tokens=40, do_sample=False, repetition_penalty=1.5)
    assert generate(STORIES, [PROMPT], penalised).texts != greedy


def test_an_empty_prompt_begins_a_document() -> None:
    assert len(generate(STORIES, [""], GREEDY).texts[0]) > 10


def test_a_prompt_that_is_too_long_for_the_model(parts) -> None:
    with pytest.raises(UserError, match=r"max_new_tokens \(600\).*512 positions; at most \d+ fit"):
        generate(STORIES, [PROMPT], Sampling(max_new_tokens=600))
    with pytest.raises(UserError, match="512 positions; shorten it"):
        generate(STORIES, [PROMPT * 300], GREEDY)
    prompt = "Lily " * 200
    room = 512 - len(load_model_or_run(STORIES).encode(prompt))
    (text,) = sample(parts, 0, prompts=[prompt], max_new_tokens=room + 50, temperature=0)
    assert text.startswith("Lily Lily")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -1),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("repetition_penalty", 0),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"{name} is {value}; it must be"):
        Sampling(**{name: value})


def test_the_error_for_a_run_without_a_model_names_export(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        "output_dir: x\nmodel: {preset: llama-9m}\ndata: {train: a, validation: b, sequence_length: 64}\n"
        "schedule: {total_steps: 10000}\n"
    )
    with pytest.raises(UserError, match=f"relora export {tmp_path}"):
        generate(tmp_path, [PROMPT])
    shutil.copytree(STORIES, tmp_path / "model")
    assert load_model_or_run(tmp_path).sequence_length == 64
    assert load_model_or_run(STORIES).sequence_length == 512


def test_the_dtype_is_checked_and_used() -> None:
    with pytest.raises(UserError, match="dtype: `int3` is none of"):
        load_model_or_run(STORIES, dtype="int3")
    assert load_model_or_run(STORIES, dtype="bf16").model.dtype == torch.bfloat16


def test_several_adapters_continue_each_prompt_in_turn(tmp_path: Path) -> None:
    red, blue = lora(tmp_path / "red", seed=1), prompts(tmp_path / "blue")
    pieces: list[str] = []
    places = [str(red), str(blue)]
    result = generate(STORIES, [PROMPT, "Lily"], GREEDY, adapters=places, compare=True, write=pieces.append)
    assert result.adapters == ["base", "red", "blue"] * 2
    alone = {
        "base": generate(STORIES, [PROMPT, "Lily"], GREEDY),
        "red": generate(red, [PROMPT, "Lily"], GREEDY),
        "blue": generate(STORIES, [PROMPT, "Lily"], GREEDY, adapters=[str(blue)]),
    }
    for name, one in alone.items():
        assert one.adapters == [name] * 2
        assert [text for text, who in zip(result.texts, result.adapters, strict=True) if who == name] == one.texts
    assert len(set(result.texts)) == 6
    assert "".join(pieces) == "".join(
        f"== {name}\n{text}\n" for name, text in zip(result.adapters, result.texts, strict=True)
    )
    assert {name: speed.tokens for name, speed in result.by_adapter.items()} == {"base": 24, "red": 24, "blue": 24}
    assert result.tokens == 72
    assert result.seconds == pytest.approx(sum(speed.seconds for speed in result.by_adapter.values()))
    lines = describe(result).splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["base", "red", "blue"]
    assert lines[3].startswith("72 tokens in") and "peak memory" in lines[3]


def test_the_base_can_be_given_by_its_name(tmp_path: Path) -> None:
    red = lora(tmp_path / "red", seed=1)
    assert generate(red, [PROMPT], GREEDY, adapters=["base"]).adapters == ["base", "red"]
    assert generate(red, [PROMPT], GREEDY, compare=True).adapters == ["base", "red"]
    assert generate(STORIES, [PROMPT], GREEDY, adapters=["base"]).adapters == ["base"]
    with pytest.raises(UserError, match="compare: there is no adapter beside the base; give --adapter"):
        generate(STORIES, [PROMPT], GREEDY, compare=True)


def test_adapters_are_compared_with_the_same_seed(tmp_path: Path) -> None:
    same = [str(lora(tmp_path / name, seed=1)) for name in ("one", "two")]
    sampled = Sampling(max_new_tokens=20, temperature=1.0)
    texts = generate(STORIES, [PROMPT], sampled, adapters=same, seed=5).texts
    assert texts[0] == texts[1] == generate(STORIES, ["Lily", PROMPT], sampled, adapters=same[1:], seed=5).texts[1]


def test_a_chat_gives_only_the_answers(tmp_path: Path) -> None:
    model = with_template(tmp_path / "model")
    pieces: list[str] = []
    result = generate(model, ["Hello", "Who?"], GREEDY, chat=True, system="Be kind.", write=pieces.append)
    asked = [f"<s>system: Be kind.\nuser: {text}\nassistant:" for text in ("Hello", "Who?")]
    tokenizer = load_tokenizer(str(model))
    for prompt, answer in zip(asked, result.texts, strict=True):
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        whole = open_model(model).generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=0)
        text = tokenizer.decode(whole[0], skip_special_tokens=True)
        assert text.endswith(f"assistant:{answer}")
    assert "".join(pieces) == "".join(f"{answer}\n" for answer in result.texts)


def test_the_prompt_of_a_run_is_written_by_its_template(tmp_path: Path) -> None:
    run = run_with_adapter(tmp_path / "tuned")
    (answer,) = generate(run, ["Hello"], GREEDY, chat=True).texts
    # training encodes prompt and response separately, so the prompt encoded as one text would have other ids
    (whole,) = generate(run, ["Hello"], GREEDY).texts
    assert answer and whole.startswith("Hello")
    with pytest.raises(UserError, match="no chat template"):
        generate(STORIES, ["Hello"], GREEDY, chat=True)


def test_stop_strings_and_system_prompts_are_checked() -> None:
    plain = generate(STORIES, [PROMPT], GREEDY).texts[0]
    (text,) = generate(STORIES, [PROMPT], GREEDY, stop=["little"]).texts
    assert text == plain[: plain.index("little")]
    with pytest.raises(UserError, match="stop string is empty"):
        generate(STORIES, [PROMPT], stop=[""])
    with pytest.raises(UserError, match="system: a system prompt is part of a chat; add --chat"):
        generate(STORIES, [PROMPT], system="Be kind.")


def test_errors_are_raised_before_the_first_token(tmp_path: Path) -> None:
    pieces: list[str] = []
    with pytest.raises(UserError, match="positions; shorten it"):
        generate(STORIES, [PROMPT, PROMPT * 300], GREEDY, write=pieces.append)
    with pytest.raises(UserError, match="nowhere: no such folder"):
        generate(tmp_path / "no-model-either", [PROMPT], adapters=[str(tmp_path / "nowhere")], write=pieces.append)
    assert pieces == []


@pytest.mark.parametrize("stop", [(), ("a", "</s>")])
def test_prompts_that_grow_together_get_the_texts_that_each_gets_alone(stop: tuple[str, ...]) -> None:
    """More of them than grow at a time; streamed one after another."""
    prompts = [f"{name} {verb}" for name in ("Once", "Lily and Tom", "The") for verb in ("was", "had a big", "upon")]
    sampling = Sampling(max_new_tokens=16, temperature=1.2, repetition_penalty=1.1)
    pieces: list[str] = []
    together = generate(STORIES, prompts, sampling, seed=3, stop=stop, device="cpu", write=pieces.append)
    alone = [generate(STORIES, [prompt], sampling, seed=3, stop=stop, device="cpu") for prompt in prompts]
    assert together.texts == [each.texts[0] for each in alone]
    assert together.tokens == sum(each.tokens for each in alone)
    assert "".join(pieces) == "".join(text + "\n" for text in together.texts)
