"""Storage of frozen weights: merges into a weight of low precision lose nothing, and its exact weight is saved."""

import pytest
import torch
from torch import nn

from relora.lowrank import LowRankConfig, LowRankLinear


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
