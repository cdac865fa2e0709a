"""Texts that grow together get the tokens that each gets alone, and a kept prefix changes none of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.inference.test_decoder import FORMS, generated, model_of
from transformers import GenerationConfig

from relora.inference.decoder import Decoder, decoder_of
from relora.inference.decoding import generate_ids
from relora.inference.rows import Heard, grow

PROMPTS = [[3, 14, 15, 92, 65], [35], [89, 79, 32], [38, 46, 26, 43, 38, 32, 79, 50]]
GREEDY = GenerationConfig(max_new_tokens=14, do_sample=False, pad_token_id=0)


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def model(request: pytest.FixtureRequest):
    return model_of(FORMS[request.param])


@pytest.fixture(scope="module")
def decoder(model) -> Decoder:
    found = decoder_of(model)
    assert found is not None
    return found


@torch.inference_mode()
def texts(decoder: Decoder, prompts: list[list[int]], settings: GenerationConfig = GREEDY, **others) -> list[list[int]]:
    found = dict(grow(decoder, prompts, settings, **others))
    return [found[row] for row in range(len(prompts))]


def test_each_text_is_that_of_its_prompt_alone(model, decoder: Decoder) -> None:
    assert texts(decoder, PROMPTS) == [generated(model, ids, 14) for ids in PROMPTS]
    assert texts(decoder, PROMPTS[::-1]) == texts(decoder, PROMPTS)[::-1]


def test_draws_are_those_of_the_text(decoder: Decoder) -> None:
    sampled = GenerationConfig(max_new_tokens=14, do_sample=True, temperature=2.0, top_p=0.9, top_k=0)

    def draws(rows) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(row) for row in rows]

    together = texts(decoder, PROMPTS, sampled, draws=draws(range(4)))
    assert together == [texts(decoder, [ids], sampled, draws=draws([row]))[0] for row, ids in enumerate(PROMPTS)]


def test_a_text_ends_alone(decoder: Decoder) -> None:
    plain = texts(decoder, PROMPTS)
    ends = GenerationConfig(max_new_tokens=14, do_sample=False, eos_token_id=[plain[0][3]])
    expected = [text[: text.index(plain[0][3]) + 1] if plain[0][3] in text else text for text in plain]
    with torch.inference_mode():
        order = list(grow(decoder, PROMPTS, ends, ends=[None, lambda ids: len(ids) == 3, None, None]))
    assert dict(order) == {**dict(enumerate(expected)), 1: plain[1][:2]}
    assert order[0][0] == 1  # a text is given back as soon as it has ended


def test_padded_prompts_are_continued_as_transformers_does(model) -> None:
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    stop = generated(model, PROMPTS[2], 14)[5]
    settings = GenerationConfig(max_new_tokens=14, do_sample=False, pad_token_id=0, eos_token_id=[stop])
    expected = model.generate(ids, attention_mask=mask, generation_config=settings)
    assert torch.equal(generate_ids(model, ids, mask, settings), expected)


class Counted:
    """Counts the tokens that a decoder reads."""

    def __init__(self, decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: list[int] = []
        plain = decoder.read

        def counting(ids, *others):
            self.read.append(len(ids))
            return plain(ids, *others)

        monkeypatch.setattr(decoder, "read", counting)


def test_what_was_heard_is_not_read_again(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, heard = [3, 14, 15, 92, 65, 35], Heard()
    (first,) = texts(decoder, [prompt])
    counted = Counted(decoder, monkeypatch)
    assert texts(decoder, [prompt], heard=heard) == [first]
    longer = [*prompt, *first, 8, 9]
    (second,) = texts(decoder, [longer], heard=heard)
    assert texts(decoder, [longer], heard=heard) == [second]
    heard.forget()
    assert texts(decoder, [longer], heard=heard) == texts(decoder, [longer]) == [second]
    # the last token of an answer has not been read, nor is the last of a known prompt known
    assert counted.read == [6, 3, 1, len(longer), len(longer)]


@given(
    turns=st.lists(
        st.tuples(st.integers(0, 12), st.lists(st.integers(0, 95), min_size=1, max_size=6), st.integers(1, 6)),
        min_size=1,
        max_size=4,
    )
)
def test_answers_are_those_without_a_kept_prefix(decoder: Decoder, turns: list[tuple[int, list[int], int]]) -> None:
    """Whatever of the last text a prompt begins with, and however long the answers are."""
    heard, text = Heard(), []
    for kept, question, answer in turns:
        prompt = [*text[:kept], *question]
        settings = GenerationConfig(max_new_tokens=answer, do_sample=False)
        (found,) = texts(decoder, [prompt], settings, heard=heard)
        assert [found] == texts(decoder, [prompt], settings)
        text = [*prompt, *found]


def test_an_answer_that_was_broken_off_leaves_no_false_prefix(decoder: Decoder) -> None:
    heard = Heard()
    texts(decoder, [[3, 14, 15, 92]], heard=heard)

    def breaks(ids: torch.Tensor) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        texts(decoder, [[3, 14, 7, 8, 9]], ends=[breaks], heard=heard)
    again = [3, 14, 15, 92, 1]
    assert texts(decoder, [again], heard=heard) == texts(decoder, [again])
