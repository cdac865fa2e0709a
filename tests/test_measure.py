"""The loss is the textbook's, an evaluation sums it exactly, and evaluating does not change training."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, LlamaForCausalLM, PhiConfig

from relora import measure
from relora.errors import UserError
from relora.measure import Evaluation, evaluate, head_loss, token_loss
from relora.model.head import IGNORED, whole_logits_reason

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
    """Reference loss, token by token in fp64: -ln softmax(logits)[label]."""
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
    model.model.layers[0].eval()  # a module that is kept in eval mode
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
    loss_sum.backward()  # tensors cached during the evaluation must not break training
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


Head = tuple[Tensor, Tensor, Tensor | None, Tensor]
"""Hidden states [T, d], weight [V, d], bias [V] or None, labels [T]."""


def head(
    tokens: int, vocab: int = 31, width: int = 7, *, bias: bool = True, dtype: torch.dtype = torch.float64
) -> Head:
    """Random head and its inputs; every third token is not scored."""
    draw = torch.Generator().manual_seed(tokens)
    hidden, weight, offsets = (
        torch.randn(shape, generator=draw, dtype=dtype).requires_grad_()
        for shape in ((tokens, width), (vocab, width), (vocab,))
    )
    labels = torch.randint(vocab, (tokens,), generator=draw)
    labels[::3] = IGNORED
    return hidden, weight, offsets if bias else None, labels


def plain_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


def with_gradients(loss: Callable[..., Tensor], given: Head) -> list[Tensor]:
    """Loss, and gradients of a multiple of it with respect to every tensor that requires one."""
    value = loss(*given)
    wanted = [tensor for tensor in given[:3] if tensor is not None and tensor.requires_grad]
    return [value.detach(), *torch.autograd.grad(value / 3, wanted)]


def compare(ours: list[Tensor], plain: list[Tensor], **tolerance: float) -> None:
    for one, other in zip(ours, plain, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, **tolerance)


@pytest.fixture
def chunk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda tokens: monkeypatch.setitem(measure.CHUNK_TOKENS, "cpu", tokens)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("tokens", [0, 1, 3, 4, 5, 8, 13])
def test_the_head_loss_is_the_plain_one(chunk: Callable[[int], None], tokens: int, bias: bool) -> None:
    """For several numbers of chunks, with and without a shorter last one."""
    chunk(4)
    given = head(tokens, bias=bias)
    compare(with_gradients(head_loss, given), with_gradients(plain_loss, given), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (1, 2), (0, 1), (0, 2)])
def test_what_is_frozen_costs_no_gradient(frozen: tuple[int, ...]) -> None:
    given = head(9)
    for index in frozen:
        given[index].requires_grad_(False)
    compare(with_gradients(head_loss, given), with_gradients(plain_loss, given), rtol=1e-10, atol=1e-10)


def test_fp32_gradients_differ_by_rounding_alone(chunk: Callable[[int], None]) -> None:
    """The two sum over 101 classes or 64 tokens in another order: a few times 2**-24 of the largest term."""
    chunk(16)
    given = head(64, vocab=101, width=32, dtype=torch.float32)
    compare(with_gradients(head_loss, given), with_gradients(plain_loss, given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=["autocast", "bf16 weights"])
def test_bf16_products_are_scored_and_summed_in_fp32(chunk: Callable[[int], None], weight_dtype: torch.dtype) -> None:
    """The loss equals the plain one to fp32, and gradients are as close to the exact ones as the plain path's."""
    chunk(16)
    given = head(300, vocab=101, width=32, dtype=weight_dtype)
    exact = with_gradients(
        plain_loss, tuple(t.detach().double().requires_grad_() if t.is_floating_point() else t for t in given)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=weight_dtype is torch.float32):
        ours, plain = with_gradients(head_loss, given), with_gradients(plain_loss, given)
    assert ours[0].dtype == torch.float32
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-3, atol=0.0)
    for one, other, truth in zip(ours[1:], plain[1:], exact[1:], strict=True):
        assert one.dtype == other.dtype == weight_dtype
        assert (one - truth).norm() <= 1.2 * (other - truth).norm()


def test_runs_agree_to_the_bit(chunk: Callable[[int], None]) -> None:
    chunk(4)
    first, second = (with_gradients(head_loss, head(13, dtype=torch.float32)) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_second_backward_pass_is_refused() -> None:
    loss = head_loss(*head(5))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="taken before"):
        loss.backward()


def test_the_gradient_of_a_head_is_handed_over_without_a_copy() -> None:
    given = head(5)
    loss = head_loss(*given)
    made = loss.grad_fn.gradients[1].data_ptr()
    loss.backward()
    assert given[1].grad.data_ptr() == made


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        given = func(*args, **(kwargs or {}))
        for tensor in given if isinstance(given, tuple | list) else [given]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return given


SHAPE = {"vocab_size": 4000, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
WIDE = SHAPE | {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
MODELS = {
    "untied": LlamaConfig(**WIDE, tie_word_embeddings=False),
    "tied": GPT2Config(**SHAPE, n_embd=8, n_layer=1, n_head=2, n_positions=64),
    "bias": PhiConfig(**WIDE),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "evaluate"])
@pytest.mark.parametrize("kind", MODELS)
def test_no_tensor_is_as_large_as_the_logits(chunk: Callable[[int], None], kind: str, training: bool) -> None:
    chunk(8)
    model = AutoModelForCausalLM.from_config(MODELS[kind]).train(training)
    ids = torch.zeros(2, 50, dtype=torch.long)
    token_loss(model, ids, ids)
    with Largest() as largest, torch.set_grad_enabled(training):
        loss_sum, _ = token_loss(model, ids, ids)
        if training:
            loss_sum.backward()
    assert largest.elements <= 4000 * 8  # the logits of a chunk and the head have the same size here


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_models_gradients_are_those_of_its_logits(
    chunk: Callable[[int], None], kind: str, checkpointing: bool
) -> None:
    """With dropout, with tied weights or not, over two micro-batches."""
    chunk(7)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[kind]).double().train()
    if checkpointing:
        model.activation_checkpointing_enable()
    batches = [tuple(ids.clone() for ids in windows(2, 12, seed)) for seed in range(2)]
    for _, labels in batches:
        labels[1, 3:] = IGNORED

    def gradients(loss: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(5)
        values = []
        for input_ids, labels in batches:
            values.append(loss(input_ids, labels))
            (values[-1] / 7).backward()
        return [*(value.detach() for value in values), *(parameter.grad.clone() for parameter in model.parameters())]

    def plain(input_ids: Tensor, labels: Tensor) -> Tensor:
        logits = model(input_ids=input_ids, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")

    expected = gradients(plain)
    compare(gradients(lambda *batch: token_loss(model, *batch)[0]), expected, rtol=1e-10, atol=1e-10)


def test_a_model_that_caps_its_logits_is_scored_by_them() -> None:
    """The dropout is also that of a plain forward pass, from the first batch on."""
    torch.manual_seed(0)
    config = Gemma2Config(**WIDE, num_key_value_heads=2, head_dim=4, attention_dropout=0.5, final_logit_softcapping=0.1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
    input_ids, labels = windows(2, 9)
    torch.manual_seed(1)
    ours, _ = token_loss(model, input_ids, labels)
    assert whole_logits_reason(model) is not None
    torch.manual_seed(1)
    logits = model(input_ids=input_ids, use_cache=False).logits
    assert torch.equal(ours, F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
