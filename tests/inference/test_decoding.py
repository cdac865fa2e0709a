"""A text ends where it should and is streamed as it is returned, however it is split into tokens."""

import pytest
import torch
from tests.adapters.adapted import STORIES, needs_data

from relora.errors import UserError
from relora.inference.decoding import Continuation, Sampling, check_stop, continue_prompt
from relora.inference.loading import load_model_or_run

pytestmark = needs_data
PROMPT = "Once upon a time"
GREEDY = Sampling(max_new_tokens=40, do_sample=False)


@pytest.fixture(scope="module")
def loaded():
    return load_model_or_run(STORIES, device="cpu")


def continued(loaded, **settings) -> tuple[Continuation, list[str]]:
    pieces: list[str] = []
    model, tokenizer = loaded.model, loaded.tokenizer
    return continue_prompt(model, tokenizer, loaded.encode(PROMPT), GREEDY, 0, pieces.append, **settings), pieces


def test_a_stop_string_ends_the_text_and_is_not_part_of_it(loaded) -> None:
    plain, _ = continued(loaded)
    at = plain.text.index("girl")
    for stop in ("girl", "irl nam", plain.text[at : at + 12]):
        result, pieces = continued(loaded, stop=[stop, "never"])
        assert result.text == plain.text[: plain.text.index(stop)]
        assert "".join(pieces) == result.prompt + result.text
        assert result.tokens < plain.tokens
    assert continued(loaded, stop=["never"])[0].text == plain.text


def test_a_stop_string_in_the_prompt_does_not_count(loaded) -> None:
    plain, _ = continued(loaded)
    across = PROMPT[-4:] + plain.text[:2]
    assert across in PROMPT + plain.text
    assert continued(loaded, stop=["Once", across])[0].text == plain.text


def test_a_special_token_ends_by_its_id(loaded) -> None:
    plain, _ = continued(loaded, stop=["</s>"])
    assert plain.tokens == 40
    model, tokenizer = loaded.model, loaded.tokenizer
    # <unk> is left out of decoded texts, so it could never be found in one
    tokens = [tokenizer.convert_ids_to_tokens(number) for number in (0, 1, 2)]
    assert tokens == ["<unk>", "<s>", "</s>"]
    ids = loaded.encode(PROMPT)
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


def test_a_text_that_is_asked_to_end_ends_after_the_token(loaded) -> None:
    asked = iter([False, False, True])
    result, pieces = continued(loaded, asked_to_end=lambda: next(asked))
    assert result.tokens == 3
    assert "".join(pieces) == result.prompt + result.text


def test_without_echo_the_prompt_is_not_written(loaded) -> None:
    result, pieces = continued(loaded, echo=False)
    assert "".join(pieces) == result.text != ""
    assert result.prompt == PROMPT


def test_streaming_and_stop_strings_do_not_change_the_draws(loaded) -> None:
    model, tokenizer, ids = loaded.model, loaded.tokenizer, loaded.encode(PROMPT)
    sampled = Sampling(max_new_tokens=30, temperature=1.0)
    quiet = continue_prompt(model, tokenizer, ids, sampled, 3)
    watched = continue_prompt(model, tokenizer, ids, sampled, 3, lambda text: None, stop=["never to be"])
    assert (quiet.text, quiet.tokens) == (watched.text, watched.tokens)


@pytest.mark.parametrize("trains_afterwards", [False, True])
def test_inference_mode_is_used_unless_the_model_trains_afterwards(loaded, trains_afterwards: bool) -> None:
    """A tensor that a module keeps from a text in inference mode could not take part in a later training step."""
    model, kept = loaded.model, []
    handle = model.get_input_embeddings().register_forward_hook(lambda module, given, made: kept.append(made))
    try:
        text = continue_prompt(
            model, loaded.tokenizer, loaded.encode(PROMPT), GREEDY, 0, trains_afterwards=trains_afterwards
        ).text
    finally:
        handle.remove()
    assert {made.is_inference() for made in kept} == {not trains_afterwards}
    assert text == continued(loaded)[0].text


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UserError, match="stop: a stop string is empty"):
        check_stop(["a", ""])
    check_stop([])
