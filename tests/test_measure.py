"""The loss is the textbook's, an evaluation adds it up exactly, and measuring leaves no trace on training."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from relora.errors import UserError
from relora.measure import IGNORED, Evaluation, evaluate, token_loss

VOCAB = 50


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_dropout=0.5,
    )
    return LlamaForCausalLM(config)


def windows(count: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`count` windows of `length` + 1 random ids, as inputs and labels."""
    ids = torch.randint(VOCAB, (count, length + 1), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


def slow_loss(model: LlamaForCausalLM, input_ids: Tensor, labels: Tensor) -> tuple[float, int]:
    """Token by token in fp64: -ln softmax(logits)[label]."""
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        logits = model(input_ids=input_ids).logits.double()
    for row, row_labels in zip(logits, labels.tolist(), strict=True):
        for scores, label in zip(row, row_labels, strict=True):
            if label != IGNORED:
                total += (torch.logsumexp(scores, 0) - scores[label]).item()
                count += 1
    return total, count


def test_token_loss_is_the_sum_over_scored_tokens(model: LlamaForCausalLM) -> None:
    input_ids, labels = windows(3, 11)
    labels = labels.clone()
    labels[0, :4] = IGNORED
    labels[2] = IGNORED
    expected, count = slow_loss(model, input_ids, labels)
    loss_sum, tokens = token_loss(model.eval(), input_ids, labels)
    assert loss_sum.dtype == torch.float32
    assert loss_sum.item() == pytest.approx(expected, rel=1e-6)
    assert tokens.item() == count == 18


def test_token_loss_agrees_with_transformers(model: LlamaForCausalLM) -> None:
    input_ids, labels = windows(2, 9)
    ids = torch.cat([input_ids, labels[:, -1:]], dim=1)
    loss_sum, tokens = token_loss(model.eval(), input_ids, labels)
    assert (loss_sum / tokens).item() == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-6)


def test_half_precision_logits_are_summed_in_fp32(model: LlamaForCausalLM) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_sum, _ = token_loss(model.eval(), *windows(2, 9))
    assert loss_sum.dtype == torch.float32
    assert math.isfinite(loss_sum.item())


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4), ignored=st.integers(0, 6))
def test_evaluation_does_not_depend_on_the_batching(model: LlamaForCausalLM, sizes: list[int], ignored: int) -> None:
    input_ids, labels = windows(sum(sizes), 6)
    labels = labels.clone()
    labels[-1, :ignored] = IGNORED
    expected, count = slow_loss(model, input_ids, labels)
    if count == 0:
        return
    batches = zip(input_ids.split(sizes), labels.split(sizes), strict=True)
    result = evaluate(model, batches, bytes_per_token=3.5)
    assert result.tokens == count
    assert result.loss == pytest.approx(expected / count, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(expected / count), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(expected / count / math.log(2) / 3.5, rel=1e-6)


def test_evaluate_leaves_modes_gradients_and_random_streams_alone(model: LlamaForCausalLM) -> None:
    model.train()
    model.model.layers[0].eval()  # a part that its owner keeps in eval mode
    modes = [module.training for module in model.modules()]
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first, second = (evaluate(model, [windows(2, 8)]) for _ in range(2))
    assert first == second  # dropout was off
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    model.train()
    loss_sum, _ = token_loss(model, *windows(2, 8))
    loss_sum.backward()  # tensors cached while measuring may not break training
    model.zero_grad()


def test_modes_come_back_after_an_error(model: LlamaForCausalLM) -> None:
    model.train()
    with pytest.raises(IndexError):
        evaluate(model, [(torch.full((1, 2), VOCAB), torch.zeros(1, 2, dtype=torch.long))])
    assert all(module.training for module in model.modules())


def test_nothing_to_score_is_the_users_mistake(model: LlamaForCausalLM) -> None:
    input_ids, labels = windows(1, 4)
    with pytest.raises(UserError, match="no token to score"):
        evaluate(model, [(input_ids, torch.full_like(labels, IGNORED))])


def test_a_loss_beyond_floats_gives_infinite_perplexity() -> None:
    result = Evaluation.of(loss_sum=8000.0, tokens=10, byte_count=None)
    assert result == Evaluation(loss=800.0, perplexity=math.inf, bits_per_byte=None, tokens=10)
