"""The next token is the one that transformers chooses with the same logits, settings and draws."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from relora.inference.choice import Choice, follows

IDS = torch.tensor([1, 2, 3])


def settings(**others) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=4, do_sample=True, eos_token_id=[1], pad_token_id=0, **others)


def kept_by_transformers(logits: torch.Tensor, chosen: GenerationConfig) -> torch.Tensor:
    steps = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(chosen.repetition_penalty)])
    steps += [TemperatureLogitsWarper(chosen.temperature)]
    steps += [TopKLogitsWarper(chosen.top_k)] if chosen.top_k else []
    steps += [TopPLogitsWarper(chosen.top_p)] if chosen.top_p < 1 else []
    return steps(IDS[None], logits.clone())


@given(
    numbers=st.lists(st.sampled_from([-3.0, 0.0, 0.1, 0.25, 1.0, 5.0]) | st.floats(-20, 20, width=32), min_size=4),
    top_p=st.sampled_from([0.05, 0.5, 0.75, 0.95, 1.0]),
    top_k=st.sampled_from([0, 1, 3]),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    penalty=st.sampled_from([1.0, 1.3]),
    seed=st.integers(0, 1000),
)
def test_the_draw_is_that_of_transformers(
    numbers: list[float], top_p: float, top_k: int, temperature: float, penalty: float, seed: int
) -> None:
    """Equal logits at the limits of top-p and top-k, too."""
    chosen = settings(top_p=top_p, top_k=top_k, temperature=temperature, repetition_penalty=penalty)
    logits = torch.tensor([numbers])
    shares = kept_by_transformers(logits, chosen).softmax(dim=-1)
    expected = torch.multinomial(shares, 1, generator=torch.Generator().manual_seed(seed))
    given_logits = logits.clone()
    found = Choice(chosen, [torch.Generator().manual_seed(seed)]).next_of([IDS], logits)
    assert found.tolist() == expected[0].tolist()
    assert torch.equal(logits, given_logits)


def test_each_text_has_its_own_draws_and_penalty() -> None:
    torch.manual_seed(0)
    logits, chosen = torch.randn(3, 50), settings(top_p=0.9, top_k=0, temperature=1.5, repetition_penalty=2.0)
    texts = [torch.tensor([row, 7]) for row in range(3)]

    def draws(rows) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(row) for row in rows]

    together = Choice(chosen, draws(range(3))).next_of(texts, logits)
    alone = [Choice(chosen, draws([row])).next_of(texts[row : row + 1], logits[row : row + 1]) for row in range(3)]
    assert torch.equal(together, torch.cat(alone))


def test_greedy_takes_the_likeliest() -> None:
    greedy = GenerationConfig(do_sample=False, repetition_penalty=4.0)
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]])
    assert Choice(greedy, [None]).next_of([torch.tensor([2])], logits).tolist() == [1]
    assert Choice(greedy, [None]).next_of([torch.tensor([1])], logits).tolist() == [2]


@pytest.mark.parametrize(
    "other",
    [{"num_beams": 2}, {"min_p": 0.1}, {"suppress_tokens": [3]}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 3}],
)
def test_other_settings_are_left_to_transformers(other: dict) -> None:
    assert follows(settings(top_k=0, top_p=0.9))
    assert not follows(settings(**other))
