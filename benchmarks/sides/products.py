"""The bare products of a step: how fast the machine multiplies these very shapes when it does nothing else."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from sides.shape import Shape, factor_flops

Seconds = dict[str, dict[str, list[float]]]
"""Layer -> arithmetic -> of x Wᵀ, dY W and, in fp32, dYᵀ x."""


def distinct(shape: Shape) -> dict[str, tuple[int, int]]:
    """The linear layers of different sizes: name -> (out, in)."""
    by_size = {size: name for name, size in reversed(shape.linears.items())}
    return {name: size for size, name in by_size.items()} | {"lm_head": (shape.vocabulary, shape.hidden)}


def product_seconds(shape: Shape, tokens: int) -> Seconds:
    """Each once, after one that warms up, into memory that is there already."""
    seconds: Seconds = {}
    for name, (o, i) in distinct(shape).items():
        x, weight, grad = torch.randn(tokens, i), torch.randn(o, i), torch.randn(tokens, o)
        forward, backward = torch.empty(tokens, o), torch.empty(tokens, i)
        seconds[name] = {
            "fp32": _timed([(x, weight.T, forward), (grad, weight, backward), (grad.T, x, weight)], torch.mm)
        }
        if name == "lm_head":
            continue
        half = [
            (a.bfloat16(), b.bfloat16(), out.bfloat16())
            for a, b, out in ((x, weight.T, forward), (grad, weight, backward))
        ]
        seconds[name]["bf16"] = _timed(half, torch.mm)
        x, weight, grad = (tensor.mul(30).to(torch.int8) for tensor in (x, weight, grad))
        codes = [(x, weight.T, forward.int()), (grad, weight, backward.int())]
        seconds[name]["int8"] = _timed(codes, torch._int_mm)
    return seconds


def ideal_seconds(side: str, shape: Shape, rank: int, tokens: int, products: Seconds) -> float:
    """What a step's operations take at the speed of the bare products; the factors at that of their layer in fp32."""
    arithmetic = next((kind for kind in ("int8", "bf16") if kind in side), "fp32")
    names = {size: name for name, size in distinct(shape).items()}
    seconds = sum(products["lm_head"]["fp32"])
    for o, i in shape.linears.values():
        layer = products[names[o, i]]
        if side == "full":
            seconds += shape.layers * sum(layer["fp32"])
            continue
        rate = 4 * tokens * o * i / sum(layer["fp32"][:2])
        seconds += shape.layers * (sum(layer[arithmetic][:2]) + factor_flops(side, rank, tokens, o, i) / rate)
    return seconds


def _timed(products: list[tuple[Tensor, Tensor, Tensor]], multiply: Callable[..., Tensor]) -> list[float]:
    seconds = []
    for left, right, out in products:
        multiply(left, right, out=out)
        began = time.perf_counter()
        multiply(left, right, out=out)
        seconds.append(time.perf_counter() - began)
    return seconds
