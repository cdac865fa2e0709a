"""Products in int8: exact sums of codes, close to the exact products, and not finite where an operand is not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.gpu import needs_gpu
from torch import nn

from relora.lowrank import LowRankConfig, LowRankLinear
from relora.lowrank.costs import NOMINAL_RATES
from relora.lowrank.storage.int8 import (
    LEVELS,
    dequantize_int8,
    int8_product,
    int8_product_backward,
    quantize_rows,
    runs_in_int8,
)


@settings(max_examples=40)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), power=st.integers(-30, 30), seed=st.integers(0, 100))
def test_rounding_is_at_most_half_a_level(rows: int, columns: int, power: int, seed: int) -> None:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10.0**power
    codes, scale = quantize_rows(x)
    assert codes.dtype == torch.int8 and codes.abs().max() <= LEVELS
    assert ((dequantize_int8(codes, scale, torch.float32) - x).abs() <= scale * 0.501).all()
    assert (codes.abs().amax(1) == LEVELS).all()  # the largest number of a row has the largest code


def test_zero_rows_stay_zero() -> None:
    codes, scale = quantize_rows(torch.zeros(3, 4))
    assert not codes.any() and torch.isfinite(scale).all()


@pytest.mark.parametrize("tokens", [1, 17, 512, 1100])
def test_products_are_those_of_the_codes(tokens: int) -> None:
    """The sum in int32 is exact, so compared with float64 sums of the same codes only the rounding to fp32 remains."""
    torch.manual_seed(0)
    x, grad = torch.randn(tokens, 40), torch.randn(tokens, 24)
    codes, scale = quantize_rows(torch.randn(24, 40))
    weight = dequantize_int8(codes, scale, torch.float64)
    coded_x = dequantize_int8(*quantize_rows(x), torch.float64)
    torch.testing.assert_close(int8_product(x, codes, scale).double(), coded_x @ weight.T, rtol=1e-5, atol=1e-5)
    coded_grad = dequantize_int8(*quantize_rows(grad * scale.T), torch.float64)
    expected = coded_grad @ codes.double()
    torch.testing.assert_close(int8_product_backward(grad, codes, scale).double(), expected, rtol=1e-5, atol=1e-5)
    assert (expected - grad.double() @ weight).norm() < 0.02 * expected.norm()


@needs_gpu
@pytest.mark.parametrize(
    ("tokens", "out_features", "in_features"), [(17, 32, 48), (100, 16, 16), (512, 336, 128), (1025, 512, 1376)]
)
def test_products_on_a_gpu_are_those_of_the_cpu(tokens: int, out_features: int, in_features: int) -> None:
    """Both devices sum the same codes exactly, with one exception: where the last bit of a quotient differs, a number
    half-way between two codes may be rounded to either, which changes one of `in_features` terms by one level of 127.
    """
    torch.manual_seed(0)
    x, grad = torch.randn(tokens, in_features), torch.randn(tokens, out_features)
    codes, scale = quantize_rows(torch.randn(out_features, in_features))
    weight_on_gpu = codes.cuda(), scale.cuda()
    assert runs_in_int8(tokens, weight_on_gpu[0])
    for multiply, factor in ((int8_product, x), (int8_product_backward, grad)):
        on_cpu, on_gpu = multiply(factor, codes, scale), multiply(factor.cuda(), *weight_on_gpu).cpu()
        assert (on_cpu - on_gpu).norm() < 1e-4 * on_cpu.norm()


@needs_gpu
@pytest.mark.parametrize(("tokens", "out_features", "in_features"), [(16, 32, 48), (100, 24, 16), (100, 32, 42)])
def test_shapes_without_an_int8_product_on_the_gpu_are_multiplied_dequantized(
    tokens: int, out_features: int, in_features: int
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(in_features, out_features, bias=False).cuda()
    x = torch.randn(tokens, in_features, device="cuda", requires_grad=True)
    layer = LowRankLinear(linear, LowRankConfig(r=4, rates=NOMINAL_RATES, frozen="int8"), name="x")
    y = layer(x)
    y.square().sum().backward()
    assert (y - linear(x)).norm() < 0.02 * y.norm()
    assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_makes_its_output_not_finite(bad: float) -> None:
    """A NaN has no code, but the loss must become NaN."""
    codes, scale = quantize_rows(torch.randn(8, 16))
    x = torch.randn(20, 16)
    x[3, 5] = bad
    y = int8_product(x, codes, scale)
    assert not torch.isfinite(y[3]).any() and torch.isfinite(y[[0, 1, 2, 4]]).all()


def test_an_outlier_token_does_not_affect_the_others() -> None:
    torch.manual_seed(0)
    codes, scale = quantize_rows(torch.randn(8, 16))
    x = torch.randn(20, 16)
    before = int8_product(x, codes, scale)
    x[0] *= 1e4
    assert torch.equal(int8_product(x, codes, scale)[1:], before[1:])


@pytest.mark.parametrize("base", ["auto", "int8"])
def test_codes_follow_the_weight_through_a_merge(base: str) -> None:
    """The exact weight is quantized after each merge, so rounding errors do not accumulate over cycles."""
    torch.manual_seed(0)
    layer = LowRankLinear(
        nn.Linear(64, 48), LowRankConfig(r=4, base=base, frozen="int8", rates=NOMINAL_RATES), name="x"
    )
    for cycle in range(3):
        layer.redraw_(cycle)
        nn.init.normal_(layer.lora_B, std=0.1)
        layer.merge_()
        codes, scale = quantize_rows(layer.base.exact)
        stored, stored_scale, arithmetic = layer.base.operand(training=True)
        assert torch.equal(stored, codes) and torch.equal(stored_scale, scale) and arithmetic == "int8"


def test_codes_are_not_saved() -> None:
    layer = LowRankLinear(nn.Linear(64, 48), LowRankConfig(r=4, frozen="int8", rates=NOMINAL_RATES), name="x")
    assert set(layer.state_dict()) == {"weight", "bias", "lora_A", "lora_B"}
    assert layer.unwrap().weight.dtype == torch.float32


def test_memory_is_one_byte_per_parameter() -> None:
    layer = LowRankLinear(nn.Linear(64, 48, bias=False), LowRankConfig(r=4, base="int8", rates=NOMINAL_RATES), name="x")
    on_device = sum(t.nbytes for t in (layer.weight, layer.frozen_scale, layer.frozen_copy) if t is not None)
    assert on_device == 64 * 48 + 4 * 48
    assert layer.base.exact.dtype == torch.float32
