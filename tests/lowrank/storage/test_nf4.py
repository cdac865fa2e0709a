"""Frozen weights in NF4, with and without a master: codes, products, merges, and what is saved."""

import importlib.util
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from relora.errors import UserError
from relora.lowrank import (
    LowRankConfig,
    LowRankLinear,
    exact_tensors,
    inject,
    load_exact_tensors,
    low_rank_layers,
    merge,
    strip,
)
from relora.lowrank.costs import NOMINAL_RATES
from relora.lowrank.gradient_init import gradient_svd_, weight_gradients
from relora.lowrank.storage.int8 import dequantize_int8, quantize_rows
from relora.lowrank.storage.nf4 import dequantize_nf4, quantize_nf4

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
IDS = torch.arange(24).view(2, 12)


def layer_of(
    in_features: int = 64, out_features: int = 48, transposed: bool = False, **config: object
) -> LowRankLinear:
    torch.manual_seed(0)
    plain = nn.Linear(out_features, in_features, bias=False) if transposed else nn.Linear(in_features, out_features)
    settings_ = LowRankConfig(**{"r": 4, "lora_alpha": 4.0, "base": "nf4", "rates": NOMINAL_RATES, **config})
    return LowRankLinear(plain, settings_, name="x", fan_in_fan_out=transposed)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=48, bos_token_id=0, eos_token_id=0)).eval()


def trained(layer: LowRankLinear, size: float = 0.05) -> LowRankLinear:
    """Draw lora_B at random, in the place of training."""
    nn.init.normal_(layer.lora_B, std=size)
    return layer


@settings(max_examples=40)
@given(rows=st.integers(1, 9), pairs=st.integers(1, 70), power=st.integers(-30, 30), seed=st.integers(0, 100))
def test_quantizing_dequantized_numbers_gives_the_same_codes(rows: int, pairs: int, power: int, seed: int) -> None:
    """Therefore a checkpoint may hold the numbers in the place of the codes, also where the last block is short."""
    x = torch.randn(rows, 2 * pairs, generator=torch.Generator().manual_seed(seed)) * 10.0**power
    codes, absmax = quantize_nf4(x)
    assert codes.shape == (rows, pairs) and codes.dtype == torch.uint8 and absmax.shape == (-(-rows * pairs // 32),)
    numbers = dequantize_nf4(codes, absmax, torch.float32)
    again, absmax_again = quantize_nf4(numbers)
    assert torch.equal(codes, again) and torch.equal(absmax, absmax_again)
    assert torch.equal(numbers, dequantize_nf4(again, absmax_again, torch.float32))


@pytest.mark.parametrize("shape", [(5, 16), (48, 32), (32, 48), (5, 96), (7, 100), (3, 66), (1, 2), (4, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_number_is_its_level_times_the_scale_of_its_block(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """The same if rows end inside a block. The levels are those of QLoRA's table (arXiv 2305.14314, appendix E)."""
    negative = [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0]
    positive = [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
    codes, absmax = quantize_nf4(torch.randn(*shape, generator=torch.Generator().manual_seed(0)))
    pairs = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], 1).flatten().long()
    expected = torch.tensor([*negative, *positive])[pairs] * absmax.repeat_interleave(64)[: pairs.numel()]
    numbers = dequantize_nf4(codes, absmax, dtype)
    assert numbers.dtype == dtype and numbers.shape == shape
    tolerance = 4e-3 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(numbers.float(), expected.view(shape), rtol=tolerance, atol=1e-7)


@settings(max_examples=40)
@given(rows=st.integers(1, 200), power=st.integers(-30, 30), seed=st.integers(0, 1000))
def test_int8_codes_round_to_themselves(rows: int, power: int, seed: int) -> None:
    """In fp32, 127 · (largest / 127) is the largest number again, or gives the same scale."""
    x = torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed)) * 10.0**power
    numbers = dequantize_int8(*quantize_rows(x), torch.float32)
    assert torch.equal(numbers, dequantize_int8(*quantize_rows(numbers), torch.float32))


def test_rounding_of_a_normal_weight() -> None:
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    error = (dequantize_nf4(*quantize_nf4(weight), torch.float32) - weight).norm() / weight.norm()
    assert 0.08 < error < 0.1


def test_zeros_stay_zero() -> None:
    assert not dequantize_nf4(*quantize_nf4(torch.zeros(3, 8)), torch.float32).any()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_equals_the_plain_formula_with_the_dequantized_weight(transposed: bool, training: bool) -> None:
    """Sums are in float64; gradients of the factors are rounded to the factors' fp32."""
    layer = trained(layer_of(transposed=transposed)).train(training)
    numbers = layer.base.dense(torch.float32).double()
    x = torch.randn(2, 20, 64, dtype=torch.float64, requires_grad=True)
    a, b = (factor.detach().double().requires_grad_() for factor in (layer.lora_A, layer.lora_B))
    twin_x = x.detach().clone().requires_grad_()
    bias = None if layer.bias is None else layer.bias.detach().double()
    twin = nn.functional.linear(twin_x, numbers + layer.scaling * b @ a, bias)
    y = layer(x)
    torch.testing.assert_close(y, twin, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    twin.backward(upstream)
    torch.testing.assert_close(x.grad, twin_x.grad, rtol=1e-12, atol=1e-12)
    for mine, other in ((layer.lora_A.grad, a.grad), (layer.lora_B.grad, b.grad)):
        torch.testing.assert_close(mine.double(), other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("arithmetic", ["native", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_half_precision_and_dropout(arithmetic: str, dropout: float) -> None:
    """With B = 0 dropout has no effect; bf16 is within 1%."""
    layer = layer_of(frozen=arithmetic, lora_dropout=dropout)
    x = torch.randn(20, 64)
    twin = nn.functional.linear(x, layer.base.dense(torch.float32), layer.bias)
    assert (layer(x) - twin).norm() <= 0.01 * twin.norm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (layer(x) - twin).norm() <= 0.01 * twin.norm()


def test_memory_is_four_and_a_half_bits_per_parameter() -> None:
    layer = layer_of(out_features=512, in_features=512)
    on_device = [t for t in (layer.weight, layer.frozen_scale, layer.frozen_copy) if t is not None]
    assert sum(t.nbytes for t in on_device) == 512 * 512 * 4.5 / 8
    assert layer.base.exact.dtype == torch.float32
    assert layer_of(master=False).base.master is None


def test_no_dequantized_weight_is_kept_for_the_backward_pass() -> None:
    layer = layer_of(out_features=256, in_features=256)
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    x, kept = torch.randn(8, 256, requires_grad=True), []

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = layer(x)
    assert set(kept) == {x.untyped_storage().data_ptr()}
    y.sum().backward()


def test_the_master_is_the_weight_before_injection() -> None:
    layer, plain = layer_of(), layer_of(base="fp32")
    assert torch.equal(layer.base.exact, plain.weight)
    assert torch.equal(layer.unwrap().weight, plain.weight)


def test_twenty_small_merges_arrive() -> None:
    """Updates of 0.2% of the weight's norm, forty times smaller than the rounding error of the stored weight."""
    layer = layer_of()
    start = layer.base.exact.double().clone()
    total = torch.zeros_like(start)
    for cycle in range(20):
        layer.redraw_(cycle)
        nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(cycle))
        with torch.no_grad():
            layer.lora_B.mul_(0.002 * layer.base.exact.norm() / layer.delta().norm())
        total += layer.delta().double()
        layer.merge_()
    assert (layer.base.exact.double() - start - total).norm() / total.norm() < 2e-5
    codes, absmax = quantize_nf4(layer.base.exact)
    assert torch.equal(layer.weight, codes) and torch.equal(layer.frozen_scale, absmax)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("base", ["nf4", "int8", "bf16"])
def test_without_a_master_the_stored_weight_is_exact_and_a_merge_is_not_rounded(base: str, transposed: bool) -> None:
    layer = trained(layer_of(base=base, master=False, transposed=transposed), size=1e-4)
    stored, shape = layer.base.reorient(layer.base.dense(torch.float32)), layer.base.shape
    assert layer.base.master is None and torch.equal(layer.base.exact.float(), stored) and stored.shape == shape
    delta = layer.merge_()
    assert torch.equal(layer.unwrap().weight, stored + delta) and delta.any()


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("base", ["nf4", "int8", "bf16"])
def test_round_trip_through_exact_tensors(base: str, master: bool, merged: bool) -> None:
    """Equal bit for bit; no master is created where there was none."""
    config = LowRankConfig(r=4, base=base, master=master, rest="frozen", rates=NOMINAL_RATES)
    model, other = llama(), LlamaForCausalLM(llama().config).eval()
    inject(model, config)
    for layer in low_rank_layers(model).values():
        trained(layer)
        if merged:
            layer.merge_()
            trained(layer)
    saved = {name: tensor.clone() for name, tensor in exact_tensors(model).items()}
    inject(other, config, seed=3)
    load_exact_tensors(other, saved)
    assert torch.equal(model(IDS).logits, other(IDS).logits)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in exact_tensors(other).items())
    assert all((layer.base.master is None) == (not master and not merged) for layer in low_rank_layers(other).values())
    for own, theirs in zip(low_rank_layers(model).values(), low_rank_layers(other).values(), strict=True):
        assert torch.equal(own.weight, theirs.weight)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_state_dict_saves_and_loads_the_exact_weight(base: str, master: bool, transposed: bool) -> None:
    """`state_dict` has the weight in its own shape, not that of the codes."""
    source, target = (layer_of(base=base, master=master, transposed=transposed) for _ in range(2))
    with torch.no_grad():
        source.base.add_(torch.randn(source.base.shape))
    source.base.release_master()
    state = source.state_dict()
    assert state["weight"].shape == source.base.shape and state["weight"].dtype == torch.float32
    assert not torch.equal(source.base.exact, target.base.exact)
    target.load_state_dict(state)
    assert torch.equal(source.base.exact, target.base.exact) and torch.equal(source.weight, target.weight)
    assert (target.base.master is None) == (not master)


def test_a_loaded_weight_is_not_rounded() -> None:
    """Also without a master: a weight that codes cannot represent gets one when it is loaded."""
    layer = layer_of(master=False)
    weight = torch.randn(48, 64)
    layer.load_state_dict(layer.state_dict() | {"weight": weight})
    assert torch.equal(layer.base.exact, weight)


def test_other_shapes_are_refused() -> None:
    layer, state = layer_of(), layer_of().state_dict()
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer.load_state_dict(state | {"weight": torch.zeros(48, 32)})
    model = llama()
    inject(model, LowRankConfig(r=4, base="nf4", rates=NOMINAL_RATES))
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(UserError, match=r"up_proj\.weight is float32 \[48, 32\] here, float32 \[48, 16\] there"):
        load_exact_tensors(model, exact_tensors(model) | {name: torch.zeros(48, 16)})


@pytest.mark.parametrize("leave", [merge, strip])
def test_merge_and_strip_restore_the_plain_model(leave: type) -> None:
    model, plain = llama(), llama()
    report = inject(model, LowRankConfig(r=4, base="nf4", rest="frozen"))
    assert report.frozen == sum(parameter.numel() for parameter in plain.parameters())
    leave(model)
    for name, parameter in plain.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter) and model.get_parameter(name).requires_grad


def test_dora_measures_the_stored_weight() -> None:
    """The layer starts with the function of the stored weight, as in PEFT."""
    layer = layer_of(dora=True, master=False)
    stored = layer.base.dense(torch.float32)
    torch.testing.assert_close(layer.magnitude, stored.norm(dim=1))
    trained(layer)
    x = torch.randn(5, 64)
    direction = stored + layer.scaling * layer.lora_B @ layer.lora_A
    weight = layer.magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, layer.bias), rtol=1e-5, atol=1e-5)


def test_pissa_rounds_only_the_residual_of_the_weight() -> None:
    """The principal part is kept in fp32, so the layer is closer to the weight than its codes (PiSSA, section 4)."""
    torch.manual_seed(0)
    plain = nn.Linear(64, 48, bias=False)
    with torch.no_grad():
        plain.weight.add_(torch.randn(48, 4) @ torch.randn(4, 64))
    weight = plain.weight.detach().clone()
    rounding = (dequantize_nf4(*quantize_nf4(weight), torch.float32) - weight).norm()
    config = LowRankConfig(r=4, lora_alpha=4, base="nf4", init="pissa", master=False)
    layer = LowRankLinear(plain, config, name="x")
    assert layer.base.master is None
    assert (layer.base.exact + layer.delta() - weight).norm() < 0.5 * rounding


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 7), nn.Linear(7, 4))
    with pytest.raises(UserError, match=r"lowrank\.base: nf4 .* 2 has 7 inputs"):
        inject(model, LowRankConfig(r=2, base="nf4"))
    with pytest.raises(UserError, match=r"precision\.frozen: int8 .*nf4"):
        LowRankConfig(base="nf4", frozen="int8")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # makes its import fail, as if it were not installed
    with pytest.raises(UserError, match=r"lowrank\.base: nf4 needs bitsandbytes.*relora\[quant\]"):
        inject(model, LowRankConfig(r=2, base="nf4", target_modules=("0", "1")))
    assert not low_rank_layers(model) and all(parameter.requires_grad for parameter in model.parameters())


def test_gradient_svd_rounds_the_residual_and_makes_no_master() -> None:
    """The layer's function changes by a rounding of the weight, about as much as the storage itself causes."""
    model = llama()
    inject(model, LowRankConfig(r=4, lora_alpha=4, base="nf4", init="gradient-svd", master=False, rest="frozen"))
    layers = low_rank_layers(model)
    before = {name: layer.base.exact for name, layer in layers.items()}
    gradient_svd_(model, weight_gradients(model, [lambda model: model(IDS, labels=IDS).loss]), stable_gamma=64.0)
    for name, layer in layers.items():
        assert layer.base.master is None and layer.lora_B.any()
        assert (layer.base.exact + layer.delta() - before[name]).norm() < 0.2 * before[name].norm()
