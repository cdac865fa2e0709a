"""A text ends where it should, and what is streamed of it is what it is, however its tokens fall."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.adapters.adapted import DATA, STORIES, needs_data
from transformers import AutoTokenizer

from relora.errors import UserError
from relora.inference.decoding import Continuation, GrowingText, Sampling, check_stop, continue_prompt, held_back
from relora.inference.loading import load_model_or_run

pytestmark = needs_data
PROMPT = "Once upon a time"
GREEDY = Sampling(max_new_tokens=40, do_sample=False)


@pytest.fixture(scope="module")
def finished():
    return load_model_or_run(STORIES, device="cpu")


@pytest.fixture(scope="module", params=["gpt2", "mistral-v1-32k", "STORIES"])
def tokenizer(request: pytest.FixtureRequest):
    return AutoTokenizer.from_pretrained(STORIES if request.param == "STORIES" else DATA / "tokenizers" / request.param)


def written(finished, **settings) -> tuple[Continuation, list[str]]:
    pieces: list[str] = []
    model, tokenizer = finished.model, finished.tokenizer
    return continue_prompt(model, tokenizer, finished.encode(PROMPT), GREEDY, 0, pieces.append, **settings), pieces


@pytest.mark.parametrize(
    ("text", "stop", "held"),
    [
        ("a EN", ["END"], 2),
        ("a END", ["END"], 0),  # it is there: nothing to wait for
        ("a", ["END"], 0),
        ("ababa", ["abac", "bab"], 3),
        ("\n", ["\n\n"], 1),
        ("x", [], 0),
    ],
)
def test_what_may_become_a_stop_string_waits(text: str, stop: list[str], held: int) -> None:
    assert held_back(text, stop) == held


@given(
    text=st.text("ab \n", max_size=30) | st.text(st.characters(codec="utf-8", exclude_characters="�"), max_size=12),
    stop=st.lists(st.text("ab \n", min_size=1, max_size=4), max_size=2),
    stream_seconds=st.sampled_from([0.0, 60.0]),
)
def test_text_is_streamed_as_it_reads(tokenizer, text: str, stop: list[str], stream_seconds: float) -> None:
    """Token after token: the pieces make up the text, which ends at the token that completes a stop string."""
    prompt = tokenizer("x\n", add_special_tokens=False).input_ids
    ids = tokenizer(text, add_special_tokens=False).input_ids

    def read(tokens: list[int]) -> str:
        before, whole = (tokenizer.decode(each, skip_special_tokens=True) for each in (prompt, prompt + tokens))
        return whole[len(before) :]

    pieces: list[str] = []
    growing = GrowingText(tokenizer, prompt, stop, pieces.append, stream_seconds=stream_seconds)
    ends = (end for end in range(1, len(ids) + 1) if growing(torch.tensor([prompt + ids[:end]]), None).item())
    taken = ids[: next(ends, len(ids))]
    starts = [at for each in stop if (at := read(taken).find(each)) >= 0]
    assert not any(each in read(taken[:-1]) for each in stop)
    assert starts or taken == ids
    assert growing.close(prompt + taken) == "".join(pieces) == read(taken)[: min(starts, default=None)]


def test_a_stop_string_ends_the_text_and_is_no_part_of_it(finished) -> None:
    plain, _ = written(finished)
    at = plain.text.index("girl")
    for stop in ("girl", "irl nam", plain.text[at : at + 12]):
        result, pieces = written(finished, stop=[stop, "never"])
        assert result.text == plain.text[: plain.text.index(stop)]
        assert "".join(pieces) == result.prompt + result.text
        assert result.tokens < plain.tokens
    assert written(finished, stop=["never"])[0].text == plain.text


def test_a_stop_string_in_the_prompt_does_not_count(finished) -> None:
    plain, _ = written(finished)
    across = PROMPT[-4:] + plain.text[:2]
    assert across in PROMPT + plain.text
    assert written(finished, stop=["Once", across])[0].text == plain.text


def test_a_special_token_ends_by_its_id(finished) -> None:
    plain, _ = written(finished, stop=["</s>"])
    assert plain.tokens == 40
    model, tokenizer = finished.model, finished.tokenizer
    # <unk> is left out of decoded texts, so it could never be found in one
    tokens = [tokenizer.convert_ids_to_tokens(number) for number in (0, 1, 2)]
    assert tokens == ["<unk>", "<s>", "</s>"]
    ids = finished.encode(PROMPT)
    bias = torch.zeros(512)
    bias[0] = 1e4

    def prefer_unknown(module, arguments, output):
        output.logits = output.logits + bias
        return output

    handle = model.register_forward_hook(prefer_unknown)
    try:
        assert continue_prompt(model, tokenizer, ids, GREEDY, 0, stop=["<unk>"]).tokens == 1
        assert continue_prompt(model, tokenizer, ids, GREEDY, 0, stop=["unk"]).tokens == 40
    finally:
        handle.remove()


def test_asked_to_end_it_ends_after_the_token(finished) -> None:
    asked = iter([False, False, True])
    result, pieces = written(finished, asked_to_end=lambda: next(asked))
    assert result.tokens == 3
    assert "".join(pieces) == result.prompt + result.text


def test_without_echo_the_prompt_is_not_written(finished) -> None:
    result, pieces = written(finished, echo=False)
    assert "".join(pieces) == result.text != ""
    assert result.prompt == PROMPT


def test_watching_changes_nothing(finished) -> None:
    model, tokenizer, ids = finished.model, finished.tokenizer, finished.encode(PROMPT)
    sampled = Sampling(max_new_tokens=30, temperature=1.0)
    quiet = continue_prompt(model, tokenizer, ids, sampled, 3)
    watched = continue_prompt(model, tokenizer, ids, sampled, 3, lambda text: None, stop=["never to be"])
    assert (quiet.text, quiet.tokens) == (watched.text, watched.tokens)


@pytest.mark.parametrize("trains_on", [False, True])
def test_autograd_keeps_account_only_where_the_model_trains_on(finished, trains_on: bool) -> None:
    """What a module keeps of a text in inference mode could not be part of a later step."""
    model, kept = finished.model, []
    handle = model.get_input_embeddings().register_forward_hook(lambda module, given, made: kept.append(made))
    try:
        text = continue_prompt(model, finished.tokenizer, finished.encode(PROMPT), GREEDY, 0, trains_on=trains_on).text
    finally:
        handle.remove()
    assert {made.is_inference() for made in kept} == {not trains_on}
    assert text == written(finished)[0].text


def test_an_empty_stop_string() -> None:
    with pytest.raises(UserError, match="stop: a stop string is empty"):
        check_stop(["a", ""])
    check_stop([])


def test_a_space_at_the_start_of_a_line_stays(tmp_path: Path) -> None:
    """transformers' own streamer decodes every line from its start, and SentencePiece loses the space there."""
    tokenizer = AutoTokenizer.from_pretrained(DATA / "tokenizers" / "mistral-v1-32k")
    ids = tokenizer("def f():\n  return 1\n", add_special_tokens=False).input_ids
    pieces: list[str] = []
    growing = GrowingText(tokenizer, ids[:1], [], pieces.append, stream_seconds=0.0)
    for end in range(2, len(ids) + 1):
        growing(torch.tensor([ids[:end]]), None)
    growing.close(ids)
    assert growing.prompt + "".join(pieces) == "def f():\n  return 1\n"
    assert len(pieces) > 5
