"""The arithmetic of one low-rank layer: y = x Wᵀ + b + s (x Aᵀ) Bᵀ, and its gradients.

LoRA's formula (Hu et al. 2021, arXiv 2106.09685, section 4.1), in the cheapest order of products for the shapes at hand
(`costs`): the update is applied through its factors, or added to the weight for one product and dropped; the factors'
gradients come from their own products, or from dW = dYᵀ x, formed for one layer at a time. x is kept for the way back
and nothing else: weights and factors are kept by reference, x Aᵀ is computed again. (With dropout the factors' part is
autograd's, which keeps the dropped input.)

A weight that asks for its gradient gets dW, and the factors' gradients come from it, which is then their cheapest way:
the price is one more product as large as the frozen ones, 2·T·o·i (see `residual`).

The frozen products run in the arithmetic of x, in bf16 or in int8 (`int8`); the factors' never below that of x.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from relora.lowrank.costs import FACTORED, Rates, Way, cheapest
from relora.lowrank.storage.int8 import dequantized, product, product_backward, runs_in_int8
from relora.lowrank.storage.nf4 import dequantize_nf4

Arithmetic = Literal["native", "bf16", "int8"]
"""Of the frozen products; `native` is that of the layer's input, or autocast's."""


class Order(NamedTuple):
    """How one call is computed."""

    way: Way
    arithmetic: Arithmetic
    dtype: torch.dtype
    """Of the output, and of the frozen products if they are native."""
    low: torch.dtype
    """Of the products with the factors."""


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor | float,
    *,
    rates: Rates,
    dropout: float = 0.0,
    arithmetic: Arithmetic = "native",
    scale: Tensor | None = None,
    trained_weight: Tensor | None = None,
) -> Tensor:
    """y [..., out] of x [..., in], weight [out, in], bias [out], lora_A [r, in] and lora_B [out, r].

    Args:
        weight: in floating point, int8 codes with a `scale` [out, 1], or NF4 codes [out, in / 2] with theirs.
        rates: of the device, for the choice between the ways to compute the same.
        dropout: acts on the input of the factors alone.
        trained_weight: what gets dW [out, in] if it asks for its gradient; `weight` itself, unless that is codes.
    """
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    # without autocast, half-precision activations meet fp32 factors: small updates live there, so their precision wins
    low = dtype if autocast else torch.promote_types(dtype, lora_A.dtype)
    flat = x.reshape(-1, x.shape[-1])  # [tokens, in]
    trained = weight if trained_weight is None else trained_weight
    asking, weight = trained if trained.requires_grad else None, weight.detach()
    if arithmetic == "int8" and not runs_in_int8(flat.shape[0], weight):
        arithmetic = "native"
    with torch.autocast(device, enabled=False):
        if dropout:
            order = Order(FACTORED, arithmetic, dtype, low)
            compressed = scaling * F.linear(F.dropout(flat.to(low), dropout), lora_A.to(low))
            y: Tensor = _LowRank.apply(flat, weight, scale, bias, None, None, 1.0, None, order, asking)  # type: ignore[no-untyped-call]
            y = y + F.linear(compressed, lora_B.to(low)).to(dtype)
        else:
            out, (r, inn) = weight.shape[0], lora_A.shape
            fixed, learned = (1.0, scaling) if isinstance(scaling, Tensor) else (scaling, None)
            # in half precision W + s B A would lose what is small against W
            mergeable = arithmetic == "native" and dtype.itemsize >= 4
            way = _way(rates, flat.shape[0], out, inn, r, mergeable=mergeable, weight_gradient=asking is not None)
            order = Order(way, arithmetic, dtype, low)
            y = _LowRank.apply(  # type: ignore[no-untyped-call]
                flat, weight, scale, bias, lora_A, lora_B, fixed, learned, order, asking
            )
    return y.view(*x.shape[:-1], weight.shape[0])


_remembered: Callable[..., Way] = functools.lru_cache(maxsize=4096)(cheapest)


def _way(*shape: Any, **asked: bool) -> Way:
    """`cheapest`, worked out once for every shape. What is compiled asks once anyway, and Dynamo warns of caches."""
    choose: Callable[..., Way] = cheapest if torch.compiler.is_compiling() else _remembered
    return choose(*shape, **asked)


class _LowRank(torch.autograd.Function):
    """x [tokens, in] -> y [tokens, out]; without factors, the frozen product alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        fixed_scaling: float,
        trained_scaling: Tensor | None,
        order: Order,
        asking: Tensor | None,
    ) -> Tensor:
        trained = lora_A is not None or ctx.needs_input_grad[9]
        ctx.save_for_backward(x if trained else None, weight, scale, lora_A, lora_B, trained_scaling)
        ctx.fixed_scaling, ctx.order, ctx.dtype = fixed_scaling, order, x.dtype
        operator = torch.ops.relora.low_rank_linear.default
        y: Tensor = operator(x, weight, scale, bias, lora_A, lora_B, fixed_scaling, trained_scaling, *order)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, lora_A, lora_B, trained_scaling = ctx.saved_tensors
        scaling = ctx.fixed_scaling if trained_scaling is None else trained_scaling
        order, wants = ctx.order, ctx.needs_input_grad
        grad_bias = grad.sum(0) if wants[3] else None
        if lora_A is None or lora_B is None:
            grad_x = _frozen_backward(grad, weight, scale, order.arithmetic, order.dtype) if wants[0] else None
            grad_weight = grad.to(order.low).T @ x.to(order.low) if wants[9] else None
            return (None if grad_x is None else grad_x.to(ctx.dtype)), None, None, grad_bias, *[None] * 5, grad_weight
        a, b, low_grad = lora_A.to(order.low), lora_B.to(order.low), grad.to(order.low)
        dense = order.way.dense or wants[9]
        grad_x = grad_weight = grad_a = grad_b = grad_scaling = None
        if not (order.way.merged_backward and dense):
            compressed = low_grad @ b  # dY B [tokens, r]
        if wants[0]:
            if order.way.merged_backward:
                grad_x = grad.to(order.dtype) @ _merged(weight, scale, lora_A, lora_B, scaling, order.dtype)
            else:
                grad_x = _frozen_backward(grad, weight, scale, order.arithmetic, order.dtype)
                grad_x = _add_product(grad_x, compressed, a, scaling)
            grad_x = grad_x.to(ctx.dtype)
        if any(wants[4:]):
            x = x.to(order.low)
            if dense:
                grad_weight = low_grad.T @ x  # [out, in], of this layer alone
                unscaled_a, unscaled_b = b.T @ grad_weight, grad_weight @ a.T
            else:
                unscaled_a = compressed.T @ x
                unscaled_b = ((x @ a.T).T @ low_grad).T  # narrow sides first: up to twice as fast on a CPU
            grad_a, grad_b = (scaling * unscaled_a).to(lora_A.dtype), (scaling * unscaled_b).to(lora_B.dtype)
            grad_scaling = (unscaled_a * a).sum().to(lora_A.dtype) if wants[7] else None
        grad_weight = grad_weight if wants[9] else None
        return grad_x, None, None, grad_bias, grad_a, grad_b, None, grad_scaling, None, grad_weight


# what `torch.library.custom_op` would do, with less than half of what that adds to a call
_LIBRARY = torch.library.Library("relora", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "low_rank_linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor? lora_A, Tensor? lora_B, "
    "float fixed_scaling, Tensor? trained_scaling, bool[] way, str arithmetic, ScalarType dtype, ScalarType low) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(_LIBRARY, "low_rank_linear", "CompositeExplicitAutograd")
def _forward(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    fixed_scaling: float,
    trained_scaling: Tensor | None,
    way: Sequence[bool],
    arithmetic: str,
    dtype: torch.dtype,
    low: torch.dtype,
) -> Tensor:
    """y [tokens, out], as one operator: selective activation checkpointing keeps y, and nothing that led to it."""
    merged = Way(*way).merged_forward
    scaling = fixed_scaling if trained_scaling is None else trained_scaling
    bias = None if bias is None else bias.to(dtype)
    if lora_A is not None and lora_B is not None and merged:
        return F.linear(x, _merged(weight, scale, lora_A, lora_B, scaling, dtype), bias)
    y = _frozen_product(x, weight, scale, arithmetic, dtype)
    if bias is not None:
        y += bias
    if lora_A is None or lora_B is None:
        return y
    return _add_product(y, x.to(low) @ lora_A.to(low).T, lora_B.to(low).T, scaling)


@torch.library.register_fake("relora::low_rank_linear", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    dtype: torch.dtype = others[-2]
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)


def _frozen_product(x: Tensor, weight: Tensor, scale: Tensor | None, arithmetic: str, dtype: torch.dtype) -> Tensor:
    """x Wᵀ [tokens, out]."""
    if arithmetic == "int8":
        assert scale is not None  # codes have one
        return product(x, weight, scale).to(dtype)
    precision = torch.bfloat16 if arithmetic == "bf16" else dtype
    return (x.to(precision) @ as_numbers(weight, scale, precision).T).to(dtype)


def _frozen_backward(grad: Tensor, weight: Tensor, scale: Tensor | None, arithmetic: str, dtype: torch.dtype) -> Tensor:
    """dY W [tokens, in]."""
    if arithmetic == "int8":
        assert scale is not None
        return product_backward(grad, weight, scale).to(dtype)
    precision = torch.bfloat16 if arithmetic == "bf16" else dtype
    return (grad.to(precision) @ as_numbers(weight, scale, precision)).to(dtype)


def _merged(
    weight: Tensor, scale: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: Tensor | float, dtype: torch.dtype
) -> Tensor:
    """W + s B A [out, in]."""
    left, alpha = _scaled(lora_B.to(dtype), scaling)
    return torch.addmm(as_numbers(weight, scale, dtype), left, lora_A.to(dtype), alpha=alpha)


def _add_product(y: Tensor, left: Tensor, right: Tensor, scaling: Tensor | float) -> Tensor:
    """y += s left right, in place; the product in its own precision."""
    left, alpha = _scaled(left, scaling)
    if y.dtype == left.dtype:
        return y.addmm_(left, right, alpha=alpha)
    return y.add_((left @ right).to(y.dtype), alpha=alpha)


def _scaled(left: Tensor, scaling: Tensor | float) -> tuple[Tensor, float]:
    """A left factor and what its product is to be multiplied with: for a number a product does that by itself."""
    return (scaling * left, 1.0) if isinstance(scaling, Tensor) else (left, scaling)


def as_numbers(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The frozen weight as numbers of `dtype`, which may be the weight itself."""
    if scale is None:
        return weight.to(dtype)
    return (dequantize_nf4 if weight.dtype == torch.uint8 else dequantized)(weight, scale, dtype)
