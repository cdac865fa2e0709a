"""The layer computes the formula, starts as the layer it replaces, and merges without changing the function."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from relora.errors import RunStopped, UserError
from relora.lowrank import LowRankConfig, LowRankLinear


def layer_of(
    out_features: int, in_features: int, *, dtype: torch.dtype = torch.float64, **config: object
) -> LowRankLinear:
    torch.manual_seed(0)
    layer = LowRankLinear(nn.Linear(in_features, out_features, dtype=dtype), LowRankConfig(**config), name="layer")
    nn.init.normal_(layer.lora_B)
    return layer


@settings(max_examples=30)
@given(out_features=st.integers(1, 40), in_features=st.integers(1, 40), tokens=st.integers(1, 5), data=st.data())
def test_forward_and_gradients_equal_plain_pytorch(
    out_features: int, in_features: int, tokens: int, data: st.DataObject
) -> None:
    r = data.draw(st.integers(1, min(out_features, in_features)))
    layer = layer_of(out_features, in_features, r=r, lora_alpha=3.0)
    x = torch.randn(2, tokens, in_features, dtype=torch.float64, requires_grad=True)
    a, b = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    twin_x = x.detach().clone().requires_grad_()
    twin = twin_x @ (layer.weight + 3.0 / r * b @ a).T + layer.bias
    y = layer(x)
    torch.testing.assert_close(y, twin, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    twin.backward(upstream)
    for ours, theirs in ((x.grad, twin_x.grad), (layer.lora_A.grad, a.grad), (layer.lora_B.grad, b.grad)):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert layer.weight.grad is None


@pytest.mark.parametrize("rslora", [False, True])
def test_equals_peft(rslora: bool) -> None:
    """Outputs and gradients agree to 1e-12 in float64: the same sums, perhaps in another order."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(24, 17, dtype=torch.float64))
    config = LoraConfig(r=5, lora_alpha=7, target_modules=["0"], use_rslora=rslora)
    ours = LowRankLinear(
        nn.Linear(24, 17, dtype=torch.float64), LowRankConfig(r=5, lora_alpha=7, rslora=rslora), name="0"
    )
    with torch.no_grad():
        ours.weight.copy_(plain[0].weight)
        ours.bias.copy_(plain[0].bias)
        nn.init.normal_(ours.lora_B)
    theirs = get_peft_model(plain, config, autocast_adapter_dtype=False).double()
    peft_layer = theirs.base_model.model[0]
    with torch.no_grad():
        peft_layer.lora_A["default"].weight.copy_(ours.lora_A)
        peft_layer.lora_B["default"].weight.copy_(ours.lora_B)
    x = torch.randn(3, 24, dtype=torch.float64)
    y, twin = ours(x), theirs(x)
    torch.testing.assert_close(y, twin, rtol=1e-12, atol=1e-12)
    (y**2).sum().backward()
    (twin**2).sum().backward()
    torch.testing.assert_close(ours.lora_A.grad, peft_layer.lora_A["default"].weight.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.lora_B.grad, peft_layer.lora_B["default"].weight.grad, rtol=1e-12, atol=1e-12)


def test_starts_as_the_layer_it_replaces_but_not_dead() -> None:
    plain = nn.Linear(8, 6)
    layer = LowRankLinear(plain, LowRankConfig(r=2), name="x")
    x = torch.randn(4, 8)
    assert torch.equal(layer(x), plain(x))
    assert layer.lora_A.any() and not layer.lora_B.any()
    layer(x).square().sum().backward()
    assert layer.lora_B.grad is not None and layer.lora_B.grad.any()


def test_a_is_kaiming_uniform() -> None:
    layer = LowRankLinear(nn.Linear(400, 300), LowRankConfig(r=200), name="x")
    bound = 1 / math.sqrt(400)  # kaiming_uniform with a = sqrt(5)
    assert layer.lora_A.abs().max() <= bound
    assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_draws_depend_on_seed_cycle_and_name_only() -> None:
    def drawn(seed: int = 0, cycle: int = 0, name: str = "x") -> torch.Tensor:
        torch.rand(3)  # the global generator must not matter
        layer = LowRankLinear(nn.Linear(8, 6), LowRankConfig(r=2), name=name, seed=seed)
        layer.redraw_(cycle)
        return layer.lora_A.detach().clone()

    assert torch.equal(drawn(), drawn())
    for other in (drawn(seed=1), drawn(cycle=1), drawn(name="y")):
        assert not torch.equal(drawn(), other)


@pytest.mark.parametrize("trainable_scaling", [False, True])
def test_merge_moves_the_update_into_the_weight(trainable_scaling: bool) -> None:
    layer = layer_of(7, 9, r=3, trainable_scaling=trainable_scaling)
    x = torch.randn(5, 9, dtype=torch.float64)
    before, weight = layer(x), layer.weight.clone()
    delta = layer.merge_()
    torch.testing.assert_close(layer.weight - weight, delta, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x), before, rtol=1e-12, atol=1e-12)


@settings(max_examples=50)
@given(
    out_features=st.integers(2, 80),
    in_features=st.integers(2, 80),
    relative_update=st.sampled_from([0.002, 0.01, 0.05]),
    bias=st.booleans(),
    transposed=st.booleans(),
    data=st.data(),
)
def test_a_merge_in_fp32_loses_nothing_but_rounding(
    out_features: int, in_features: int, relative_update: float, bias: bool, transposed: bool, data: st.DataObject
) -> None:
    """For any shape the weight is half a unit in the last place from the float64 sum, and the function within 1e-5."""
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    plain = (
        nn.Linear(out_features, in_features, bias=False)
        if transposed
        else nn.Linear(in_features, out_features, bias=bias)
    )
    r = data.draw(st.integers(1, min(out_features, in_features)))
    layer = LowRankLinear(plain, LowRankConfig(r=r, lora_alpha=r), name="layer", fan_in_fan_out=transposed)
    nn.init.normal_(layer.lora_B)
    with torch.no_grad():
        layer.lora_B.mul_(relative_update * layer.weight.norm() / layer.delta().norm())
    before, delta, x = layer.weight.double(), layer.delta().double(), torch.randn(3, layer.in_features)
    outputs = layer(x)
    layer.merge_()
    assert (layer.weight.double() - before - delta).norm() <= 2**-24 * layer.weight.norm()
    torch.testing.assert_close(layer(x), outputs, rtol=1e-5, atol=1e-5)


def test_merge_refuses_what_is_not_finite() -> None:
    layer = layer_of(4, 4, r=2)
    weight = layer.weight.clone()
    with torch.no_grad():
        layer.lora_A[0, 0] = torch.inf
    with pytest.raises(RunStopped, match="layer"):
        layer.merge_()
    assert torch.equal(layer.weight, weight)


def test_dropout_acts_in_training_only_and_is_off_by_default() -> None:
    assert LowRankConfig().lora_dropout == 0.0
    layer = layer_of(6, 8, r=2, lora_dropout=0.5)
    x = torch.ones(4, 8, dtype=torch.float64)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_rank_larger_than_the_layer_is_refused() -> None:
    with pytest.raises(UserError, match=r"lowrank\.r \(5\).*at most 4"):
        LowRankLinear(nn.Linear(4, 6), LowRankConfig(r=5))
