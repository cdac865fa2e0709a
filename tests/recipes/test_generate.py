"""Text comes streamed and quiet, the same for the same seed, and leaves model and random streams as they were."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from relora.data.tokenizer import load_tokenizer
from relora.errors import UserError
from relora.model import open_model
from relora.recipes.finished import open_finished
from relora.recipes.generate import Sampling, describe, generate, sample_texts

DATA = Path(os.environ.get("RELORA_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
STORIES = DATA / "models" / "stories260K-llama-hf"
pytestmark = pytest.mark.skipif(not STORIES.is_dir(), reason="the shared test data is not here")

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
    assert len(pieces) > 2  # of a tiny model a few at a time
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


def test_a_seed_writes_one_text_whatever_came_before(parts) -> None:
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


def test_too_long_for_the_model(parts) -> None:
    with pytest.raises(UserError, match=r"max_new_tokens \(600\).*512 positions; at most \d+ fit"):
        generate(STORIES, [PROMPT], Sampling(max_new_tokens=600))
    with pytest.raises(UserError, match="512 positions; shorten it"):
        generate(STORIES, [PROMPT * 300], GREEDY)
    prompt = "Lily " * 200
    room = 512 - len(open_finished(STORIES).encode(prompt))
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
def test_settings_out_of_range(name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"{name} is {value}; it must be"):
        Sampling(**{name: value})


def test_a_run_without_model_names_the_verb(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        "output_dir: x\nmodel: {preset: llama-9m}\ndata: {train: a, validation: b, sequence_length: 64}\n"
        "schedule: {total_steps: 10000}\n"
    )
    with pytest.raises(UserError, match=f"relora export {tmp_path}"):
        generate(tmp_path, [PROMPT])
    shutil.copytree(STORIES, tmp_path / "model")
    assert open_finished(tmp_path).sequence_length == 64
    assert open_finished(STORIES).sequence_length == 512


def test_a_wrong_dtype_or_device() -> None:
    with pytest.raises(UserError, match="dtype: `int3` is none of"):
        open_finished(STORIES, dtype="int3")
    assert open_finished(STORIES, dtype="bf16").model.dtype == torch.bfloat16
