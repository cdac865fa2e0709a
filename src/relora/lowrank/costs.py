"""Predicted cost of a low-rank layer on a device for each order of its products, and the cheapest order.

For T tokens, a weight [o, i] and rank r, a layer computes the frozen products (2·T·o·i operations forward, 2·T·o·i for
the input's gradient) and, for the factors, the cheaper of two alternatives each (multiplications and additions counted
separately):

    forward            factored  2·T·r·(i + o)        merged  2·r·o·i             (y = x (W + s B A)ᵀ)
    input's gradient   factored  2·T·r·(i + o)        merged  2·r·o·i
    factors' gradients factored  2·T·r·(i + o) + h    dense   2·T·o·i + 4·r·o·i   (dW = dYᵀ x, then dB, dA from it)

The two factored backward products share dY B (2·T·r·o). h is the cost of x Aᵀ (2·T·r·i), which is recomputed in the
backward pass instead of being kept. A product with a narrow side runs below the device's peak rate, and forming
W + s B A moves memory; both enter the prediction as measured rates (see `calibrate`).
"""

from dataclasses import dataclass
from typing import NamedTuple


class ProductOrder(NamedTuple):
    """Choice of the order of a layer's products; every order computes the same function."""

    merged_forward: bool
    """Compute the output through W + s B A, which is formed for the product and dropped."""
    merged_backward: bool
    """Compute the input's gradient through W + s B A, which is formed again and dropped."""
    dense: bool
    """Compute the factors' gradients from dW, which is formed and dropped."""


FACTORED = ProductOrder(merged_forward=False, merged_backward=False, dense=False)
"""LoRA's own order: every product goes through the factors."""
_QUANTIZING_PASSES = 10
"""Reads or writes of input and output that quantizing and rescaling cost in int8 products. With a value of 4, layers of
160 x 160 were predicted to be faster in int8 and were 3% slower."""


@dataclass(frozen=True)
class Rates:
    """Measured rates of a device, per second (see `calibrate`)."""

    fp32: tuple[tuple[int, float], ...]
    """(narrowest side of a product, floating-point operations), ascending; the last is the peak."""
    bf16: float
    """Floating-point operations of a product in bf16, all sides wide."""
    int8: float
    """Integer operations of a product in int8, all sides wide; 0 where the device has no fast int8 product."""
    bandwidth: float
    """Bytes read or written."""

    def product(self, m: int, k: int, n: int) -> float:
        """Return the seconds of an fp32 product [m, k] x [k, n]."""
        return 2 * m * k * n / self._fp32_rate(min(m, k, n))

    def traffic(self, numbers: int, passes: int) -> float:
        """Return the seconds to read or write `numbers` fp32 numbers `passes` times."""
        return 4 * numbers * passes / self.bandwidth

    def _fp32_rate(self, narrowest: int) -> float:
        """Return the rate of a product whose narrowest side is `narrowest`, in operations per second.

        The rate is interpolated linearly between the measured sides, and taken as proportional to the side below the
        smallest measured one. Above the largest it is the peak.
        """
        (low_side, low_rate), *rest = self.fp32
        if narrowest <= low_side:
            return low_rate * narrowest / low_side
        for side, rate in rest:
            if narrowest <= side:
                return low_rate + (rate - low_rate) * (narrowest - low_side) / (side - low_side)
            low_side, low_rate = side, rate
        return low_rate


NOMINAL_RATES = Rates(fp32=((1, 1e10), (64, 1e11)), bf16=1e11, int8=0.0, bandwidth=2e10)
"""Made-up rates of no particular device, for models on the meta device, and for tests."""


def cheapest_order(
    rates: Rates,
    tokens: int,
    out_features: int,
    in_features: int,
    r: int,
    *,
    mergeable: bool,
    weight_gradient: bool = False,
) -> ProductOrder:
    """Return the order with the least predicted time for `tokens` tokens, a weight [out, in] and factors of rank r.

    Args:
        mergeable: W + s B A may be formed, because the product runs in fp32 or better. In half precision the sum would
            round small updates away, and int8 codes cannot hold it.
        weight_gradient: dW is needed anyway, so only orders that form it are compared.
    """
    shape = (tokens, out_features, in_features, r)
    merge_choices = (False, True) if mergeable else (False,)
    dense_choices = (True,) if weight_gradient else (False, True)
    forward = {merged: _forward_seconds(rates, *shape, merged) for merged in merge_choices}
    backward = {
        (merged, dense): _backward_seconds(rates, *shape, merged, dense)
        for merged in merge_choices
        for dense in dense_choices
    }
    return ProductOrder(min(forward, key=forward.__getitem__), *min(backward, key=backward.__getitem__))


def layer_seconds(
    rates: Rates,
    tokens: int,
    out_features: int,
    in_features: int,
    r: int,
    arithmetic: str,
    moved: float = 0.0,
) -> float:
    """Predict the seconds of one layer's forward and backward pass.

    Args:
        arithmetic: arithmetic of the frozen products: `native` (fp32), `bf16` or `int8`.
        moved: share of the steps in which the weight moves (see `residual`). Such a step forms dW, and a coarser copy
            of the weight is made again after it.
    """
    shape = (tokens, out_features, in_features, r)
    numbers = out_features * in_features
    seconds, copy_passes = 0.0, {"native": 0, "bf16": 2, "int8": _QUANTIZING_PASSES}[arithmetic]
    for share, weight_gradient in ((1 - moved, False), (moved, True)):
        order = cheapest_order(rates, *shape, mergeable=arithmetic == "native", weight_gradient=weight_gradient)
        factors = _forward_seconds(rates, *shape, order.merged_forward) + _backward_seconds(
            rates, *shape, order.merged_backward, order.dense
        )
        seconds += share * (factors + rates.traffic(numbers, copy_passes if weight_gradient else 0))
    operations = 4 * tokens * numbers
    activations = tokens * (in_features + out_features)
    if arithmetic == "native":
        return seconds + 2 * rates.product(tokens, in_features, out_features)
    if arithmetic == "bf16":
        return seconds + operations / rates.bf16 + rates.traffic(activations, 3)
    if not rates.int8:
        return float("inf")
    return seconds + operations / rates.int8 + rates.traffic(activations, _QUANTIZING_PASSES)


def _forward_seconds(rates: Rates, tokens: int, out_features: int, in_features: int, r: int, merged: bool) -> float:
    """Predict the seconds that the factors add to the forward pass."""
    if merged:
        return rates.product(out_features, r, in_features) + rates.traffic(out_features * in_features, 3)
    compress = rates.product(tokens, in_features, r)  # x Aᵀ
    expand = rates.product(tokens, r, out_features)  # (x Aᵀ) Bᵀ
    return compress + expand + rates.traffic(tokens * out_features, 2)


def _backward_seconds(
    rates: Rates, tokens: int, out_features: int, in_features: int, r: int, merged: bool, dense: bool
) -> float:
    """Predict the seconds that the factors add to the backward pass."""
    seconds = 0.0
    if not (merged and dense):
        seconds += rates.product(tokens, out_features, r)  # dY B
    if merged:
        seconds += rates.product(out_features, r, in_features) + rates.traffic(out_features * in_features, 3)
    else:
        seconds += rates.product(tokens, r, in_features) + rates.traffic(tokens * in_features, 2)  # (dY B) A
    if dense:
        weight_gradient = rates.product(out_features, tokens, in_features)  # dW = dYᵀ x
        gradient_b = rates.product(out_features, in_features, r)  # dW Aᵀ
        gradient_a = rates.product(r, out_features, in_features)  # Bᵀ dW
        products = weight_gradient + gradient_b + gradient_a
        return seconds + products + rates.traffic(out_features * in_features, 3)
    compress = rates.product(tokens, in_features, r)  # x Aᵀ, recomputed
    gradient_b = rates.product(out_features, tokens, r)  # dYᵀ (x Aᵀ)
    gradient_a = rates.product(r, tokens, in_features)  # (dY B)ᵀ x
    return seconds + compress + gradient_b + gradient_a
