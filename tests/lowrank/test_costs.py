"""The cost model counts operations as the formulas do, and never chooses an order that it predicts to be slower."""

import itertools

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
"""Rates with one operation per second and free memory traffic, so that predicted seconds are operations."""


def test_operations_are_those_of_the_formulas() -> None:
    tokens, out_features, in_features, r = 11, 7, 5, 3
    assert _forward_seconds(COUNTING, tokens, out_features, in_features, r, False) == 2 * tokens * r * (
        in_features + out_features
    )
    assert _forward_seconds(COUNTING, tokens, out_features, in_features, r, True) == 2 * r * out_features * in_features
    factored = (
        2 * tokens * r * (in_features + out_features) + 4 * tokens * r * in_features + 2 * tokens * r * out_features
    )
    assert _backward_seconds(COUNTING, tokens, out_features, in_features, r, False, False) == factored
    assert (
        _backward_seconds(COUNTING, tokens, out_features, in_features, r, True, True)
        == 2 * tokens * out_features * in_features + 6 * r * out_features * in_features
    )


@pytest.mark.parametrize(
    ("tokens", "r", "order"),
    [
        (1, 64, FACTORED),  # one token: forming a matrix of the weight's size does not pay
        (
            8192,
            16,
            ProductOrder(True, True, False),
        ),  # many tokens: merging is almost free, and thin factors are cheaper than dW
        (8192, 512, ProductOrder(True, True, True)),  # thick factors cost more than dW
    ],
)
def test_the_extremes(tokens: int, r: int, order: ProductOrder) -> None:
    assert cheapest_order(COUNTING, tokens, 1024, 1024, r, mergeable=True) == order


@given(
    tokens=st.integers(1, 10_000),
    out_features=st.integers(1, 5000),
    in_features=st.integers(1, 5000),
    r=st.integers(1, 512),
    mergeable=st.booleans(),
    weight_gradient=st.booleans(),
)
def test_no_allowed_order_is_predicted_to_be_faster(
    tokens: int, out_features: int, in_features: int, r: int, mergeable: bool, weight_gradient: bool
) -> None:
    """If dW is needed anyway, only the orders that form it are allowed."""
    chosen = cheapest_order(
        NOMINAL_RATES, tokens, out_features, in_features, r, mergeable=mergeable, weight_gradient=weight_gradient
    )

    def seconds(order: ProductOrder) -> float:
        return _forward_seconds(
            NOMINAL_RATES, tokens, out_features, in_features, r, order.merged_forward
        ) + _backward_seconds(NOMINAL_RATES, tokens, out_features, in_features, r, order.merged_backward, order.dense)

    merges = (False, True) if mergeable else (False,)
    dense_choices = (True,) if weight_gradient else (False, True)
    every = [ProductOrder(*choice) for choice in itertools.product(merges, merges, dense_choices)]
    assert chosen in every and seconds(chosen) <= min(map(seconds, every)) * (1 + 1e-12)


def test_cheaper_than_the_factored_order() -> None:
    """PEFT needs 4·T·o·i + 10·T·r·(i + o) operations and more; the bounds are ours at d = 1024, in units of T·d²."""
    tokens, d = 2048, 1024
    for r, bound in ((16, 4.2), (64, 4.8), (256, 6.8)):
        assert layer_seconds(COUNTING, tokens, d, d, r, "native") / (tokens * d * d) < bound


def test_int8_where_it_is_faster() -> None:
    fast = Rates(fp32=((8, 2e10), (64, 8e10), (1024, 9e10)), bf16=2e11, int8=4e11, bandwidth=1e10)
    without = Rates(fp32=fast.fp32, bf16=fast.bf16, int8=0.0, bandwidth=fast.bandwidth)
    assert layer_seconds(fast, 2048, 1024, 1024, 64, "int8") < 0.6 * layer_seconds(fast, 2048, 1024, 1024, 64, "native")
    # in a small layer, quantizing the input takes longer than the product
    assert layer_seconds(fast, 512, 64, 64, 8, "int8") > layer_seconds(fast, 512, 64, 64, 8, "native")
    assert layer_seconds(without, 2048, 1024, 1024, 64, "int8") == float("inf")


def test_rates_grow_with_the_narrowest_side() -> None:
    rates = Rates(fp32=((8, 1e9), (32, 4e9)), bf16=1.0, int8=1.0, bandwidth=1.0)
    assert rates.product(100, 4, 100) == pytest.approx(2 * 100 * 4 * 100 / 0.5e9)
    assert rates.product(100, 100, 20) == pytest.approx(2 * 100 * 100 * 20 / 2.5e9)
    assert rates.product(100, 100, 100) == pytest.approx(2e6 / 4e9)


@pytest.mark.parametrize("arithmetic", ["native", "bf16", "int8"])
def test_a_residual_step_costs_a_weight_gradient_and_a_new_copy(arithmetic: str) -> None:
    rates = Rates(fp32=((8, 2e10), (1024, 9e10)), bf16=2e11, int8=4e11, bandwidth=1e10)
    shape = (rates, 2048, 1024, 512, 16, arithmetic)
    never, half, always = (layer_seconds(*shape, moved=moved) for moved in (0.0, 0.5, 1.0))
    assert half == pytest.approx((never + always) / 2)
    copying = {"native": 0, "bf16": 2, "int8": 10}[arithmetic]
    extra = rates.product(1024, 2048, 512) + rates.traffic(1024 * 512, copying)
    # less than `extra`, because dW replaces the factors' own gradient products
    assert always - never == pytest.approx(extra, rel=0.35)
