"""What the ways to compute a low-rank layer cost on a machine, and which is the cheapest.

For T tokens, weight [o, i] and rank r a layer takes the frozen products (2·T·o·i forward, 2·T·o·i for the input's
gradient) and, for the factors, the cheaper of two ways each (multiplications and additions counted apart):

    forward            factored  2·T·r·(i + o)        merged  2·r·o·i             (y = x (W + s B A)ᵀ)
    input's gradient   factored  2·T·r·(i + o)        merged  2·r·o·i
    factors' gradients factored  2·T·r·(i + o) + h    dense   2·T·o·i + 4·r·o·i   (dW = dYᵀ x, then dB, dA from it)

where dY B (2·T·r·o) is shared by the two factored backward products and h = x Aᵀ (2·T·r·i) is computed again, not kept.
A product with a narrow side runs below the machine's peak, and a merge moves memory: both enter as measured rates.
"""

from dataclasses import dataclass
from typing import NamedTuple


class Way(NamedTuple):
    """How one layer is computed."""

    merged_forward: bool
    """Through W + s B A, formed for the product and dropped."""
    merged_backward: bool
    """The input's gradient likewise."""
    dense: bool
    """The factors' gradients through dW, formed and dropped."""


_QUANTIZING_PASSES = 10
"""Over input and output, what quantizing and rescaling cost: with 4, layers of 160 x 160 were taken for faster in int8
and were 3% slower."""
FACTORED = Way(False, False, False)


@dataclass(frozen=True)
class Rates:
    """What a device does in a second, as measured (see `calibrate`)."""

    fp32: tuple[tuple[int, float], ...]
    """(narrowest side of a product, floating-point operations), ascending; the last is the peak."""
    bf16: float
    """Floating-point operations, all sides wide."""
    int8: float
    """Integer operations, all sides wide; 0 where the device has no int8 products."""
    bandwidth: float
    """Bytes read or written."""

    def product(self, m: int, k: int, n: int) -> float:
        """Seconds of an fp32 product [m, k] x [k, n]."""
        return 2 * m * k * n / self._fp32_rate(min(m, k, n))

    def traffic(self, numbers: int, passes: int) -> float:
        """Seconds to read or write `numbers` fp32 numbers `passes` times."""
        return 4 * numbers * passes / self.bandwidth

    def _fp32_rate(self, narrowest: int) -> float:
        """Between the measured widths the rate grows with the width in proportion; below them it falls so."""
        (low_side, low), *rest = self.fp32
        if narrowest <= low_side:
            return low * narrowest / low_side
        for side, rate in rest:
            if narrowest <= side:
                return low + (rate - low) * (narrowest - low_side) / (side - low_side)
            low_side, low = side, rate
        return low


ANY = Rates(fp32=((1, 1e10), (64, 1e11)), bf16=1e11, int8=0.0, bandwidth=2e10)
"""Of no machine in particular: where nothing is computed."""


def cheapest(
    rates: Rates, tokens: int, out: int, inn: int, r: int, *, mergeable: bool, weight_gradient: bool = False
) -> Way:
    """The way with the least predicted time for `tokens` tokens through a weight [out, inn] with factors of rank r.

    Args:
        mergeable: W + s B A may be formed: the product runs in fp32 or better. In half precision the sum would round
            small updates away, and int8 codes have no room for it.
        weight_gradient: dW is asked for, so it is there in any case.
    """
    forward = {
        merged: _forward(rates, tokens, out, inn, r, merged) for merged in ((False, True) if mergeable else (False,))
    }
    backward = {
        (merged, dense): _backward(rates, tokens, out, inn, r, merged, dense)
        for merged in forward
        for dense in ((True,) if weight_gradient else (False, True))
    }
    return Way(min(forward, key=forward.__getitem__), *min(backward, key=backward.__getitem__))


def layer_seconds(rates: Rates, tokens: int, out: int, inn: int, r: int, arithmetic: str, moved: float = 0.0) -> float:
    """Predicted seconds of one layer forward and backward, frozen products `native` (fp32), in `bf16` or in `int8`.

    Args:
        moved: share of the steps in which the weight moves: they form dW, and a coarser copy is made anew.
    """
    seconds, renewing = 0.0, {"native": 0, "bf16": 2, "int8": _QUANTIZING_PASSES}[arithmetic]
    for share, weight_gradient in ((1 - moved, False), (moved, True)):
        way = cheapest(rates, tokens, out, inn, r, mergeable=arithmetic == "native", weight_gradient=weight_gradient)
        factors = _forward(rates, tokens, out, inn, r, way.merged_forward) + _backward(
            rates, tokens, out, inn, r, way.merged_backward, way.dense
        )
        seconds += share * (factors + rates.traffic(out * inn, renewing if weight_gradient else 0))
    operations = 4 * tokens * out * inn
    if arithmetic == "native":
        return seconds + 2 * rates.product(tokens, inn, out)
    if arithmetic == "bf16":
        return seconds + operations / rates.bf16 + rates.traffic(tokens * (inn + out), 3)
    if not rates.int8:
        return float("inf")
    return seconds + operations / rates.int8 + rates.traffic(tokens * (inn + out), _QUANTIZING_PASSES)


def _forward(rates: Rates, tokens: int, out: int, inn: int, r: int, merged: bool) -> float:
    if merged:
        return rates.product(out, r, inn) + rates.traffic(out * inn, 3)
    return rates.product(tokens, inn, r) + rates.product(tokens, r, out) + rates.traffic(tokens * out, 2)


def _backward(rates: Rates, tokens: int, out: int, inn: int, r: int, merged: bool, dense: bool) -> float:
    seconds = 0.0
    if not (merged and dense):
        seconds += rates.product(tokens, out, r)  # dY B
    if merged:
        seconds += rates.product(out, r, inn) + rates.traffic(out * inn, 3)
    else:
        seconds += rates.product(tokens, r, inn) + rates.traffic(tokens * inn, 2)
    if dense:
        products = rates.product(out, tokens, inn) + rates.product(out, inn, r) + rates.product(r, out, inn)
        return seconds + products + rates.traffic(out * inn, 3)
    return seconds + rates.product(tokens, inn, r) + rates.product(out, tokens, r) + rates.product(r, tokens, inn)
