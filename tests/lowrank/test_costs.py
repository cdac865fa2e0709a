"""The cost model picks the way that the formulas say, and never one that it predicts to be slower."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relora.lowrank.costs import (
    FACTORED,
    NOMINAL_RATES,
    ProductOrder,
    Rates,
    _backward_seconds,
    _forward_seconds,
    cheapest_order,
    layer_seconds,
)

COUNTING = Rates(fp32=((1, 1.0),), bf16=2.0, int8=4.0, bandwidth=float("inf"))
"""Every operation costs the same and memory nothing: seconds are operations."""


def test_operations_are_those_of_the_formulas() -> None:
    tokens, out, inn, r = 11, 7, 5, 3
    assert _forward_seconds(COUNTING, tokens, out, inn, r, False) == 2 * tokens * r * (inn + out)
    assert _forward_seconds(COUNTING, tokens, out, inn, r, True) == 2 * r * out * inn
    factored = 2 * tokens * r * (inn + out) + 4 * tokens * r * inn + 2 * tokens * r * out
    assert _backward_seconds(COUNTING, tokens, out, inn, r, False, False) == factored
    assert _backward_seconds(COUNTING, tokens, out, inn, r, True, True) == 2 * tokens * out * inn + 6 * r * out * inn


@pytest.mark.parametrize(
    ("tokens", "r", "way"),
    [
        (1, 64, FACTORED),  # one token: no sum over the weight pays
        (
            8192,
            16,
            ProductOrder(True, True, False),
        ),  # many tokens: merging is all but free, thin factors cheaper than dW
        (8192, 512, ProductOrder(True, True, True)),  # thick factors cost more than dW
    ],
)
def test_the_known_ends(tokens: int, r: int, way: ProductOrder) -> None:
    assert cheapest_order(COUNTING, tokens, 1024, 1024, r, mergeable=True) == way


@given(
    tokens=st.integers(1, 10_000),
    out=st.integers(1, 5000),
    inn=st.integers(1, 5000),
    r=st.integers(1, 512),
    mergeable=st.booleans(),
    weight_gradient=st.booleans(),
)
def test_no_way_is_predicted_to_be_faster(
    tokens: int, out: int, inn: int, r: int, mergeable: bool, weight_gradient: bool
) -> None:
    """Where dW is asked for, of the ways that form it."""
    way = cheapest_order(NOMINAL_RATES, tokens, out, inn, r, mergeable=mergeable, weight_gradient=weight_gradient)

    def seconds(way: ProductOrder) -> float:
        return _forward_seconds(NOMINAL_RATES, tokens, out, inn, r, way.merged_forward) + _backward_seconds(
            NOMINAL_RATES, tokens, out, inn, r, way.merged_backward, way.dense
        )

    merges = (False, True) if mergeable else (False,)
    forms = (True,) if weight_gradient else (False, True)
    every = [ProductOrder(forward, backward, dense) for forward in merges for backward in merges for dense in forms]
    assert way in every and seconds(way) <= min(map(seconds, every)) * (1 + 1e-12)


def test_never_dearer_than_the_factored_way_of_everybody() -> None:
    """4·T·o·i + 10·T·r·(i + o) and more, which PEFT pays; ours at d = 1024, in units of T·d², by the formulas."""
    tokens, d = 2048, 1024
    for r, bound in ((16, 4.2), (64, 4.8), (256, 6.8)):
        assert layer_seconds(COUNTING, tokens, d, d, r, "native") / (tokens * d * d) < bound


def test_int8_where_it_is_faster() -> None:
    fast = Rates(fp32=((8, 2e10), (64, 8e10), (1024, 9e10)), bf16=2e11, int8=4e11, bandwidth=1e10)
    without = Rates(fp32=fast.fp32, bf16=fast.bf16, int8=0.0, bandwidth=fast.bandwidth)
    assert layer_seconds(fast, 2048, 1024, 1024, 64, "int8") < 0.6 * layer_seconds(fast, 2048, 1024, 1024, 64, "native")
    # a small layer's products are over before its input is quantized
    assert layer_seconds(fast, 512, 64, 64, 8, "int8") > layer_seconds(fast, 512, 64, 64, 8, "native")
    assert layer_seconds(without, 2048, 1024, 1024, 64, "int8") == float("inf")


def test_rates_grow_with_the_narrowest_side() -> None:
    rates = Rates(fp32=((8, 1e9), (32, 4e9)), bf16=1.0, int8=1.0, bandwidth=1.0)
    assert rates.product(100, 4, 100) == pytest.approx(2 * 100 * 4 * 100 / 0.5e9)
    assert rates.product(100, 100, 20) == pytest.approx(2 * 100 * 100 * 20 / 2.5e9)
    assert rates.product(100, 100, 100) == pytest.approx(2e6 / 4e9)


@pytest.mark.parametrize("arithmetic", ["native", "bf16", "int8"])
def test_a_weight_that_moves_costs_its_gradient_and_a_new_copy(arithmetic: str) -> None:
    rates = Rates(fp32=((8, 2e10), (1024, 9e10)), bf16=2e11, int8=4e11, bandwidth=1e10)
    shape = (rates, 2048, 1024, 512, 16, arithmetic)
    still, half, always = (layer_seconds(*shape, moved=moved) for moved in (0.0, 0.5, 1.0))
    assert half == pytest.approx((still + always) / 2)
    copying = {"native": 0, "bf16": 2, "int8": 10}[arithmetic]
    extra = rates.product(1024, 2048, 512) + rates.traffic(1024 * 512, copying)
    assert always - still == pytest.approx(extra, rel=0.35)  # less what the factors' own gradients cost no more
