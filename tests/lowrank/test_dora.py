"""DoRA: equal to PEFT's, the same function in training and evaluation, and merged without changing the function."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.lowrank.peak_bytes import PeakBytes
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from relora.errors import RunStopped, UserError
from relora.lowrank import (
    LowRankConfig,
    LowRankLinear,
    exact_tensors,
    inject,
    load_exact_tensors,
    low_rank_layers,
    merge,
    restart,
)
from relora.lowrank.costs import NOMINAL_RATES


def layer_of(
    out_features: int = 12, in_features: int = 16, dtype: torch.dtype = torch.float64, **config: object
) -> LowRankLinear:
    """Build a layer in the middle of training: no factor and no magnitude has its initial value."""
    torch.manual_seed(0)
    settings = {"r": 3, "lora_alpha": 3.0, "dora": True, "rates": NOMINAL_RATES, **config}
    layer = LowRankLinear(nn.Linear(in_features, out_features, dtype=dtype), LowRankConfig(**settings), name="x")
    with torch.no_grad():
        nn.init.normal_(layer.lora_B, std=0.3)
        layer.magnitude.mul_(torch.empty_like(layer.magnitude).uniform_(0.5, 2))
    return layer


def merged_weight(layer: LowRankLinear) -> Tensor:
    """Compute W' by the formula, with a norm that is not constant for the gradient."""
    direction = layer.weight + layer.scaling * layer.lora_B @ layer.lora_A
    return layer.magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
def test_equals_peft(kind: str, rslora: bool) -> None:
    """Outputs and all gradients in float64, relative 1e-12."""
    torch.manual_seed(0)
    plain = Conv1D(17, 24).double() if kind == "conv1d" else nn.Linear(24, 17, bias=kind == "linear").double()
    models = [nn.Sequential(plain), nn.Sequential(Conv1D(17, 24) if kind == "conv1d" else nn.Linear(24, 17)).double()]
    if kind == "no bias":
        models[1] = nn.Sequential(nn.Linear(24, 17, bias=False)).double()
    models[1].load_state_dict(models[0].state_dict())
    inject(models[0], LowRankConfig(r=5, lora_alpha=7, rslora=rslora, dora=True))
    ours = low_rank_layers(models[0])["0"]
    config = LoraConfig(
        r=5, lora_alpha=7, target_modules=["0"], use_rslora=rslora, use_dora=True, fan_in_fan_out=kind == "conv1d"
    )
    theirs = get_peft_model(models[1], config, autocast_adapter_dtype=False).double()
    twin = theirs.base_model.model[0]
    pairs = [
        (ours.lora_A, twin.lora_A["default"].weight),
        (ours.lora_B, twin.lora_B["default"].weight),
        (ours.magnitude, twin.lora_magnitude_vector["default"].weight),
    ]
    torch.testing.assert_close(*pairs[2], rtol=1e-12, atol=0)  # they start as the row norms of W
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine.add_(0.1 * torch.randn_like(mine)))
    x = torch.randn(2, 3, 24, dtype=torch.float64, requires_grad=True)
    twin_x = x.detach().clone().requires_grad_()
    y, twin_y = models[0](x), theirs(twin_x)
    torch.testing.assert_close(y, twin_y, rtol=1e-12, atol=1e-12)
    (y**2).sum().backward()
    (twin_y**2).sum().backward()
    for mine, other in (*pairs, (x, twin_x)):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-12, atol=1e-12)
    merge(models[0])
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(models[0][0].weight, merged[0].weight, rtol=1e-12, atol=1e-12)


def test_computes_the_formula_in_training_and_evaluation() -> None:
    layer = layer_of()
    x = torch.randn(5, 16, dtype=torch.float64)
    expected = nn.functional.linear(x, merged_weight(layer), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(layer.eval()(x), layer.train()(x))


def test_the_norm_is_a_constant_for_the_gradient() -> None:
    """The factors' gradients are those of the formula with norms that are numbers, not functions of the factors."""
    layer = layer_of()
    x = torch.randn(5, 16, dtype=torch.float64)
    norms = (layer.weight + layer.scaling * layer.lora_B @ layer.lora_A).norm(dim=1).detach()
    direction = layer.weight + layer.scaling * layer.lora_B @ layer.lora_A
    constant = (nn.functional.linear(x, direction) * layer.magnitude / norms).square().sum()
    not_constant = nn.functional.linear(x, merged_weight(layer)).square().sum()
    mine = torch.autograd.grad((layer(x) - layer.bias).square().sum(), layer.lora_B)[0]
    torch.testing.assert_close(mine, torch.autograd.grad(constant, layer.lora_B)[0], rtol=1e-12, atol=1e-12)
    assert (mine - torch.autograd.grad(not_constant, layer.lora_B)[0]).norm() > 0.01 * mine.norm()


@pytest.mark.parametrize("base", ["auto", "bf16", "int8"])
def test_starts_as_the_layer_it_replaces_but_not_dead(base: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 16)
    plain, twin = nn.Linear(16, 12), nn.Linear(16, 12)
    twin.load_state_dict(plain.state_dict())
    layer = LowRankLinear(plain, LowRankConfig(r=2, dora=True, base=base), name="x")
    without = LowRankLinear(twin, LowRankConfig(r=2, base=base), name="x")
    torch.testing.assert_close(layer(x), without(x), rtol=1e-6, atol=1e-6)
    layer(x).square().sum().backward()
    assert layer.lora_B.grad.any() and layer.magnitude.grad.any() and layer.bias.grad.any()


def test_the_magnitude_is_a_factor() -> None:
    model = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 8))
    report = inject(model, LowRankConfig(r=2, dora=True))
    assert report.low_rank == 2 * (16 + 12) + 12 + 2 * (12 + 8) + 8
    assert set(low_rank_layers(model)["0"].factors) == {"lora_A", "lora_B", "magnitude"}
    assert set(low_rank_layers(model)["0"].state_dict()) == {"weight", "bias", "lora_A", "lora_B", "magnitude"}


@pytest.mark.parametrize("transposed", [False, True])
def test_merge_gives_the_weight_that_the_layer_multiplies_by(transposed: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(12, 16, bias=False) if transposed else nn.Linear(16, 12)
    config = LowRankConfig(r=3, lora_alpha=3, dora=True)
    layer = LowRankLinear(plain.double(), config, name="x", fan_in_fan_out=transposed)
    with torch.no_grad():
        nn.init.normal_(layer.lora_B, std=0.3)
        layer.magnitude[0] *= -2  # a magnitude may be negative
    x = torch.randn(5, 16, dtype=torch.float64)
    outputs, start = layer(x), layer.weight.clone()
    delta = layer.merge_()
    torch.testing.assert_close(layer.weight - start, delta, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x), outputs, rtol=1e-12, atol=1e-12)
    weight = layer.unwrap().weight.T if transposed else layer.unwrap().weight
    torch.testing.assert_close(nn.functional.linear(x, weight, layer.bias), outputs, rtol=1e-12, atol=1e-12)


def test_merge_refuses_what_is_not_finite() -> None:
    layer = layer_of()
    weight = layer.weight.clone()
    with torch.no_grad():
        layer.magnitude[1] = torch.inf
    with pytest.raises(RunStopped, match="x"):
        layer.merge_()
    assert torch.equal(layer.weight, weight)


def test_a_row_of_zeros_stays_finite() -> None:
    plain = nn.Linear(8, 6)
    with torch.no_grad():
        plain.weight[2] = 0
    layer = LowRankLinear(plain, LowRankConfig(r=2, dora=True), name="x")
    x = torch.randn(4, 8)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-6, atol=1e-6)
    nn.init.normal_(layer.lora_B)
    layer(x).sum().backward()
    assert all(factor.grad.isfinite().all() for factor in layer.factors.values())


def test_forms_one_matrix_of_the_size_of_the_weight_and_keeps_none() -> None:
    layer = LowRankLinear(nn.Linear(512, 512, bias=False), LowRankConfig(r=2, dora=True, rates=NOMINAL_RATES), name="x")
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept = []
    x = torch.randn(2, 512, requires_grad=True)

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tensor.numel())
        return tensor

    with PeakBytes() as bytes_, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = layer(x)
    assert layer.weight.nbytes <= bytes_.peak <= 1.05 * layer.weight.nbytes
    assert kept and max(kept) == y.numel()


def test_dropout_leaves_the_frozen_product_alone() -> None:
    """With B = 0, dropout on the input of the factors has no effect."""
    torch.manual_seed(0)
    layer = LowRankLinear(nn.Linear(16, 12), LowRankConfig(r=2, dora=True, lora_dropout=0.5), name="x")
    x = torch.randn(4, 16)
    torch.testing.assert_close(layer(x), layer.eval()(x))
    nn.init.normal_(layer.lora_B)
    layer.train()
    assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast(dtype: torch.dtype) -> None:
    """Output within 1% of the formula, since bf16 has 8 bits; the norms are computed in fp32."""
    layer = layer_of(48, 64, torch.float32)
    x = torch.randn(40, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x.to(dtype))
    assert y.dtype == torch.bfloat16
    twin = nn.functional.linear(x, merged_weight(layer), layer.bias)
    assert (y - twin).norm() <= 0.01 * twin.norm()
    y.float().square().sum().backward()
    assert layer.magnitude.grad.dtype == torch.float32


def test_small_changes_of_the_magnitude_are_not_rounded_away_in_half_precision() -> None:
    """1.003 rounds to 1 in bf16. Applied in fp32, it changes some of the products, by 0.3% on average."""
    torch.manual_seed(0)
    layer = LowRankLinear(
        nn.Linear(64, 48, bias=False).bfloat16(), LowRankConfig(r=4, dora=True, rates=NOMINAL_RATES), name="x"
    )
    x = torch.randn(4096, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        before = layer(x).float()
        layer.magnitude.mul_(1.003)
        moved = layer(x).float() - before
    assert ((moved * before).sum() / before.square().sum()).item() == pytest.approx(3e-3, rel=0.5)


def test_round_trip_through_exact_tensors() -> None:
    model, other = (nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 8)) for _ in range(2))
    for each in (model, other):
        inject(each, LowRankConfig(r=2, dora=True))
    with torch.no_grad():
        for layer in low_rank_layers(model).values():
            nn.init.normal_(layer.lora_B)
            layer.magnitude.mul_(1.5)
    load_exact_tensors(other, {name: tensor.clone() for name, tensor in exact_tensors(model).items()})
    x = torch.randn(4, 16)
    assert torch.equal(model(x), other(x))


def test_a_restart_is_refused() -> None:
    model = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 8))
    inject(model, LowRankConfig(r=2, dora=True))
    with pytest.raises(UserError, match=r"lowrank\.dora: a restart .* row lengths .*dora: false"):
        restart(model, torch.optim.SGD(model.parameters(), lr=0.1), cycle=1)
