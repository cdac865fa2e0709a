"""Every order of a low-rank layer's products gives the results of plain PyTorch."""

from itertools import product
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.gpu import needs_gpu
from torch import Tensor, nn

from relora.lowrank import LowRankConfig, LowRankLinear, kernel
from relora.lowrank.costs import NOMINAL_RATES, ProductOrder
from relora.lowrank.kernel import low_rank_linear

ORDERS = [ProductOrder(*choice) for choice in product((False, True), repeat=3)]


def drawn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(y: Tensor, *leaves: Tensor) -> list[Tensor]:
    """Compute the gradients of a sum in which every entry of y has another weight."""
    return list(torch.autograd.grad((y * drawn(*y.shape, dtype=y.dtype, seed=9)).sum(), leaves))


@settings(max_examples=60)
@given(
    order=st.sampled_from(ORDERS),
    tokens=st.integers(1, 40),
    out_features=st.integers(1, 30),
    in_features=st.integers(1, 30),
    bias=st.booleans(),
    trained_scaling=st.booleans(),
    transposed=st.booleans(),
    weight_gradient=st.booleans(),
    data=st.data(),
)
def test_every_order_equals_plain_pytorch(
    order: ProductOrder,
    tokens: int,
    out_features: int,
    in_features: int,
    bias: bool,
    trained_scaling: bool,
    transposed: bool,
    weight_gradient: bool,
    data: st.DataObject,
) -> None:
    """Outputs and all gradients agree to 1e-10 in float64: the same sums in another order."""
    r = data.draw(st.integers(1, min(out_features, in_features)))
    x, a, b = (
        t.requires_grad_()
        for t in (drawn(2, tokens, in_features), drawn(r, in_features, seed=1), drawn(out_features, r, seed=2))
    )
    stored = drawn(in_features, out_features, seed=3) if transposed else drawn(out_features, in_features, seed=3)
    weight = stored.requires_grad_(weight_gradient).T if transposed else stored.requires_grad_(weight_gradient)
    beta = drawn(out_features, seed=4).requires_grad_() if bias else None
    s = torch.tensor(0.7, dtype=torch.float64, requires_grad=trained_scaling)
    leaves = [t for t in (x, a, b, beta, s, stored) if t is not None and t.requires_grad]
    with mock.patch.object(kernel, "_choose_order", return_value=order):
        y = low_rank_linear(x, weight, beta, a, b, s if trained_scaling else 0.7, rates=NOMINAL_RATES)
        ours = gradients(y, *leaves)
    twin = F.linear(x, weight + s * b @ a, beta)
    torch.testing.assert_close(y, twin, rtol=1e-10, atol=1e-10)
    for mine, theirs in zip(ours, gradients(twin, *leaves), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@needs_gpu
@pytest.mark.parametrize("order", ORDERS)
def test_every_order_on_a_gpu(order: ProductOrder) -> None:
    """Equal to plain PyTorch in float64; in bf16 within bf16's precision of that."""
    x, weight, a, b = drawn(70, 48), drawn(56, 48, seed=3), drawn(8, 48, seed=1), drawn(56, 8, seed=2)
    for dtype, rtol in ((torch.float64, 1e-10), (torch.bfloat16, 2e-2)):
        leaves = [t.to("cuda", dtype).requires_grad_() for t in (x, a, b)]
        frozen = weight.to("cuda", dtype)
        with mock.patch.object(kernel, "_choose_order", return_value=order):
            y = low_rank_linear(leaves[0], frozen, None, *leaves[1:], 0.7, rates=NOMINAL_RATES)
        exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
        twin = F.linear(exact[0], frozen.double() + 0.7 * exact[2] @ exact[1])
        weights = torch.randn(y.shape, device="cuda", dtype=torch.float64)
        ours = torch.autograd.grad((y * weights).sum(), leaves)
        theirs = torch.autograd.grad((twin * weights).sum(), exact)
        for mine, other in zip((y, *ours), (twin, *theirs), strict=True):
            assert (mine.double() - other).norm() < rtol * other.norm()


@pytest.mark.parametrize("weight_gradient", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_gradcheck(order: ProductOrder, weight_gradient: bool) -> None:
    """Compared with finite differences, to find an error that the reference of the test above would share."""
    x, a, b, s = drawn(4, 6), drawn(2, 6, seed=1), drawn(5, 2, seed=2), torch.tensor(0.3, dtype=torch.float64)
    weight, beta = drawn(5, 6, seed=3), drawn(5, seed=4)
    leaves = [t.requires_grad_(t is not weight or weight_gradient) for t in (x, weight, beta, a, b, s)]
    with mock.patch.object(kernel, "_choose_order", return_value=order):
        assert torch.autograd.gradcheck(
            lambda x, weight, beta, a, b, s: low_rank_linear(x, weight, beta, a, b, s, rates=NOMINAL_RATES), leaves
        )


@pytest.mark.parametrize("order", [order for order in ORDERS if order.dense or not order.merged_backward])
def test_computes_only_the_gradients_that_are_needed(order: ProductOrder) -> None:
    """The first layer's input needs no gradient, nor do frozen factors."""
    x, weight, a, b = drawn(3, 6), drawn(5, 6, seed=3), drawn(2, 6, seed=1), drawn(5, 2, seed=2)
    with mock.patch.object(kernel, "_choose_order", return_value=order):
        a.requires_grad_(), b.requires_grad_()
        low_rank_linear(x, weight, None, a, b, 1.0, rates=NOMINAL_RATES).sum().backward()
        assert x.grad is None and a.grad is not None and b.grad is not None
        x.requires_grad_(), a.requires_grad_(False), b.requires_grad_(False)
        low_rank_linear(x, weight, None, a, b, 1.0, rates=NOMINAL_RATES).sum().backward()
        torch.testing.assert_close(x.grad, (weight + b @ a).sum(0).expand(3, 6))
        weight.requires_grad_(), x.requires_grad_(False)
        low_rank_linear(x, weight, None, a, b, 1.0, rates=NOMINAL_RATES).sum().backward()
        torch.testing.assert_close(weight.grad, x.detach().sum(0).expand(5, 6))


def test_keeps_its_input_and_nothing_else() -> None:
    """Three layers with the same input keep it once, by reference, and no tensor of [tokens, r] or [out, in]."""
    kept: dict[int, int] = {}
    layers = [LowRankLinear(nn.Linear(32, 24), LowRankConfig(r=4, rates=NOMINAL_RATES), name=str(i)) for i in range(3)]
    own = {p.untyped_storage().data_ptr() for layer in layers for p in layer.parameters()}
    x = torch.randn(64, 32, requires_grad=True)

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = torch.stack([layer(x) for layer in layers]).sum()
    assert kept == {x.untyped_storage().data_ptr(): x.numel()}
    y.backward()


def test_a_weight_that_needs_its_gradient_costs_only_the_memory_of_that() -> None:
    """x is kept once, and dW becomes the `.grad` without a copy."""
    layer = LowRankLinear(nn.Linear(32, 24), LowRankConfig(r=4, rates=NOMINAL_RATES), name="x")
    layer.weight.requires_grad_(True)
    formed: list[int] = []
    layer.weight.register_hook(lambda gradient: formed.append(gradient.data_ptr()))
    layer(torch.randn(64, 32)).sum().backward()
    assert layer.weight.grad is not None and formed == [layer.weight.grad.data_ptr()]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_of_weights_add_up_over_calls(dropout: float) -> None:
    """Gradients of micro-batches are summed. Dropout does not affect the frozen product's input, so nor dW."""
    layer = LowRankLinear(
        nn.Linear(8, 6).double(), LowRankConfig(r=2, rates=NOMINAL_RATES, lora_dropout=dropout), name="x"
    )
    layer.weight.requires_grad_(True)
    inputs, output_gradients = (drawn(7, 8), drawn(3, 8, seed=1)), (drawn(7, 6, seed=2), drawn(3, 6, seed=3))
    for x, grad in zip(inputs, output_gradients, strict=True):
        (layer(x) * grad).sum().backward()
    expected = sum(grad.T @ x for x, grad in zip(inputs, output_gradients, strict=True))
    torch.testing.assert_close(layer.weight.grad, expected)


@pytest.mark.parametrize("order", ORDERS)
def test_fp32_is_about_as_exact_as_plain_pytorch(order: ProductOrder) -> None:
    """Errors against float64 may be twice those of plain fp32, since sums are in another order."""
    x, weight, a, b = (
        drawn(*s, seed=i, dtype=torch.float32) for i, s in enumerate([(96, 64), (48, 64), (8, 64), (48, 8)])
    )
    leaves = [t.requires_grad_() for t in (x, a, b)]
    exact_leaves = [t.detach().double().requires_grad_() for t in leaves]
    truth = F.linear(exact_leaves[0], weight.double() + 0.5 * exact_leaves[2] @ exact_leaves[1])
    truths = [truth, *gradients(truth, *exact_leaves)]
    plain = F.linear(x, weight) + 0.5 * F.linear(F.linear(x, a), b)
    plains = [plain, *gradients(plain, *leaves)]
    with mock.patch.object(kernel, "_choose_order", return_value=order):
        y = low_rank_linear(x, weight, None, a, b, 0.5, rates=NOMINAL_RATES)
        ours = [y, *gradients(y, *leaves)]
    for mine, theirs, true in zip(ours, plains, truths, strict=True):
        assert (mine - true).norm() <= 2 * (theirs - true).norm() + 1e-6 * true.norm()


@pytest.mark.parametrize("arithmetic", ["native", "bf16", "int8"])
@pytest.mark.parametrize("base", ["auto", "bf16", "int8"])
@pytest.mark.parametrize("conv1d", [False, True])
def test_every_storage_and_arithmetic_is_close_to_the_plain_formula(arithmetic: str, base: str, conv1d: bool) -> None:
    """Output and gradients are within 1% (bf16: 8 bits of mantissa) or 2.5% (int8: 127 levels)."""
    torch.manual_seed(0)
    in_features, out_features = 64, 48
    plain = (
        nn.Linear(out_features, in_features, bias=False) if conv1d else nn.Linear(in_features, out_features, bias=False)
    )
    exact = (plain.weight.T if conv1d else plain.weight).detach().clone()
    layer = LowRankLinear(
        plain, LowRankConfig(r=4, base=base, frozen=arithmetic, rates=NOMINAL_RATES), name="x", fan_in_fan_out=conv1d
    )
    nn.init.normal_(layer.lora_B, std=0.1)
    x = torch.randn(40, in_features, requires_grad=True)
    leaves = (x, layer.lora_A, layer.lora_B)
    y, twin = layer(x), F.linear(x, exact + layer.scaling * layer.lora_B @ layer.lora_A)
    tolerance = 0.025 if "int8" in (arithmetic, base) else 0.01 if "bf16" in (arithmetic, base) else 1e-5
    for mine, theirs in zip((y, *gradients(y, *leaves)), (twin, *gradients(twin, *leaves)), strict=True):
        assert (mine - theirs).norm() <= tolerance * theirs.norm()
    layer.eval()
    if base == "auto":  # evaluation uses the exact weight
        torch.testing.assert_close(layer(x), twin, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_like_plain_pytorch_under_autocast(dtype: torch.dtype) -> None:
    """Outputs and gradients are within 1% of the plain formula, since bf16 has 8 bits."""
    layer = LowRankLinear(nn.Linear(64, 48), LowRankConfig(r=4, rates=NOMINAL_RATES), name="x")
    layer.weight.requires_grad_(True)
    nn.init.normal_(layer.lora_B, std=0.1)
    x = torch.randn(40, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x.to(dtype))
    assert y.dtype == torch.bfloat16
    twin = F.linear(x, layer.weight + layer.scaling * layer.lora_B @ layer.lora_A, layer.bias)
    leaves = (x, layer.weight, layer.lora_A, layer.lora_B, layer.bias)
    for mine, theirs in zip((y, *gradients(y, *leaves)), (twin, *gradients(twin, *leaves)), strict=True):
        assert (mine - theirs).norm() <= 0.01 * theirs.norm()
    assert layer.lora_A.grad is None


def test_small_updates_are_not_rounded_away_in_half_precision() -> None:
    """s B A is a ten-thousandth of W: a bf16 sum of both would lose it, but the output must contain it."""
    layer = LowRankLinear(nn.Linear(64, 48, dtype=torch.bfloat16), LowRankConfig(r=4, rates=NOMINAL_RATES), name="x")
    x = torch.randn(4096, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        nn.init.normal_(layer.lora_B)
        layer.lora_B.mul_(1e-4 / layer.delta().abs().max())
        layer.bias.zero_()
        x -= x.mean(1, keepdim=True)  # so that x Wᵀ is small and its rounding does not hide the update
        moved = layer(x).float() - F.linear(x, layer.weight).float()
    expected = F.linear(x.float(), layer.delta())
    assert (moved * expected).sum() / (moved.norm() * expected.norm()) > 0.5
