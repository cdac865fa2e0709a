"""Storage of frozen weights: merges into a weight of low precision lose nothing, and its exact weight is saved."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers.pytorch_utils import Conv1D

from relora.lowrank import LowRankConfig, LowRankLinear
from relora.lowrank.costs import NOMINAL_RATES


def bf16_layer(base: str, dtype: torch.dtype) -> LowRankLinear:
    torch.manual_seed(0)
    return LowRankLinear(nn.Linear(64, 48, dtype=dtype), LowRankConfig(r=4, lora_alpha=4, base=base), name="x")


@pytest.mark.parametrize(
    ("base", "dtype"), [("bf16", torch.float32), ("auto", torch.bfloat16), ("auto", torch.float32)]
)
def test_twenty_small_merges_arrive(base: str, dtype: torch.dtype) -> None:
    """Updates of 0.2% of the weight's norm would be rounded away in bf16; their sum in float64 must arrive in full."""
    layer = bf16_layer(base, dtype)
    start = layer.base.exact.double().clone()
    total = torch.zeros_like(start)
    for cycle in range(20):
        layer.redraw_(cycle)
        nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(cycle))
        with torch.no_grad():
            layer.lora_B.mul_(0.002 * layer.base.exact.norm() / layer.delta().norm())
        total += layer.delta().double()
        layer.merge_()
    error = (layer.base.exact.double() - start - total).norm() / total.norm()
    assert error < 2e-5  # fp32 accumulation at this size of update
    assert torch.equal(layer.weight, layer.base.exact.to(layer.weight.dtype))


def test_storage() -> None:
    narrowed = bf16_layer("bf16", torch.float32)
    assert narrowed.weight.dtype == torch.bfloat16 and narrowed.base.exact.dtype == torch.float32
    assert narrowed.lora_A.dtype == torch.float32  # small updates live in the factors
    assert bf16_layer("fp32", torch.bfloat16).weight.dtype == torch.float32
    assert bf16_layer("auto", torch.bfloat16).weight.dtype == torch.bfloat16


def test_bf16_weight_under_fp32_arithmetic() -> None:
    layer = bf16_layer("bf16", torch.float32)
    x = torch.randn(3, 64)
    twin = nn.functional.linear(x, layer.weight.float(), layer.bias)
    torch.testing.assert_close(layer(x), twin)


def test_unwrap_returns_the_replaced_layer_with_the_exact_weight() -> None:
    plain = nn.Linear(64, 48)
    weight = plain.weight.detach().clone()
    layer = LowRankLinear(plain, LowRankConfig(r=4, base="bf16"), name="x")
    layer.merge_()
    assert layer.unwrap() is plain and torch.equal(plain.weight, weight) and plain.weight.requires_grad


@pytest.mark.parametrize("config", [{"base": "bf16"}, {"base": "int8"}, {"frozen": "int8"}, {"frozen": "bf16"}])
def test_state_dict_saves_and_loads_the_exact_weight(config: dict[str, str]) -> None:
    """After `load_state_dict`, products must use the weight that was loaded."""
    torch.manual_seed(0)
    source, target = (LowRankLinear(nn.Linear(64, 48), LowRankConfig(r=4, **config), name="x") for _ in range(2))
    assert not torch.equal(source.base.exact, target.base.exact)
    target.load_state_dict(source.state_dict())
    assert torch.equal(source.base.exact, target.base.exact)
    x = torch.randn(20, 64)
    assert torch.equal(source(x), target(x))
    assert torch.equal(target.unwrap().weight, source.base.exact)


@pytest.mark.parametrize("transposed", [False, True])
def test_under_autocast_a_frozen_weight_is_cast_once_per_merge_and_not_in_every_pass(transposed: bool) -> None:
    """The kept cast gives the bits of autocast's own, before and after a merge, and without autocast plays no part."""

    def casts_of_the_weight(seen: profile) -> int:
        return sum(event.name == "aten::_to_copy" and event.input_shapes[0] == [48, 40] for event in seen.events())

    found = []
    for cast in (None, torch.bfloat16):
        generator = torch.Generator().manual_seed(0)
        module = Conv1D(48, 40) if transposed else nn.Linear(40, 48)
        module.weight.data = torch.randn(module.weight.shape, generator=generator)
        module.bias.data.zero_()
        config = LowRankConfig(r=4, cast=cast, rates=NOMINAL_RATES)
        layer = LowRankLinear(module, config, fan_in_fan_out=transposed)
        layer.lora_B.data.copy_(torch.randn(48, 4, generator=generator))
        x = torch.randn(7, 40, generator=generator, requires_grad=True)
        results, counts = [], []
        for _ in range(2):
            with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    y = layer(x)
                results += [y, *torch.autograd.grad(y.float().square().sum(), (x, layer.lora_A, layer.lora_B))]
            counts.append(casts_of_the_weight(seen))
            results.append(layer(x))
            layer.merge_()
        found.append((results, counts))
    (plain, cast_anew), (kept, cast_once) = found
    assert cast_anew == [2, 2] and cast_once == [0, 0]
    assert all(torch.equal(one, other) for one, other in zip(plain, kept, strict=True))
