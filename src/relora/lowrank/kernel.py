"""Forward and backward pass of one low-rank layer: y = x Wᵀ + b + s (x Aᵀ) Bᵀ.

LoRA's formula (Hu et al. 2021, arXiv 2106.09685, section 4.1), computed in the cheapest order of products for the given
shapes (`costs`). The update is applied through its factors, or added to the weight for one product and dropped. The
factors' gradients come from products of their own, or from dW = dYᵀ x, which is formed for one layer at a time. Only x
is kept for the backward pass: weights and factors are kept by reference, and x Aᵀ is recomputed. (With dropout, plain
autograd computes the factors' part and keeps the dropped-out input.)

If the weight needs its gradient (see `residual`), dW is formed in any case, and the factors' gradients come from it,
since that is their cheapest way. The price is one more product of the size of the frozen ones, 2·T·o·i operations for T
tokens and a weight [o, i].

The frozen products run in the precision of x, in bf16 or in int8 (`storage/int8`); the products with the factors never
run below the precision of x.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from relora.lowrank.costs import FACTORED, ProductOrder, Rates, cheapest_order
from relora.lowrank.storage.int8 import dequantize_int8, int8_product, int8_product_backward, runs_in_int8
from relora.lowrank.storage.nf4 import dequantize_nf4

Arithmetic = Literal["native", "bf16", "int8"]
"""Arithmetic of the frozen products; `native` is the dtype of the layer's input, or autocast's dtype."""


class CallPlan(NamedTuple):
    """Decisions on how one call of the layer is computed."""

    product_order: ProductOrder
    arithmetic: Arithmetic
    """Arithmetic of the frozen products."""
    dtype: torch.dtype
    """Dtype of the output, and of the frozen products if their arithmetic is native."""
    factor_dtype: torch.dtype
    """Dtype of the products with the factors."""


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
    weight_scale: Tensor | None = None,
    trained_weight: Tensor | None = None,
) -> Tensor:
    """Compute y [..., out] from x [..., in], weight [out, in], bias [out], lora_A [r, in] and lora_B [out, r].

    Args:
        weight: floating-point numbers; or int8 codes with a `weight_scale` [out, 1]; or NF4 codes [out, in / 2] with
            one scale per block.
        scaling: s, a number or a trained scalar.
        rates: measured rates of the device, which decide the order of the products.
        dropout: probability of dropout on the input of the factors; the frozen product sees the whole input.
        arithmetic: arithmetic of the frozen products.
        trained_weight: tensor [out, in] that receives dW if it requires a gradient; `weight` itself unless given. It is
            given where `weight` is a copy or codes.
    """
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    # Without autocast, half-precision activations meet fp32 factors, which hold small updates: compute those in fp32
    factor_dtype = dtype if autocast else torch.promote_types(dtype, lora_A.dtype)
    flat = x.reshape(-1, x.shape[-1])  # [tokens, in]
    weight_to_train = weight if trained_weight is None else trained_weight
    weight_needing_grad = weight_to_train if weight_to_train.requires_grad else None
    weight = weight.detach()
    if arithmetic == "int8" and not runs_in_int8(flat.shape[0], weight):
        arithmetic = "native"
    with torch.autocast(device, enabled=False):
        if dropout:
            plan = CallPlan(FACTORED, arithmetic, dtype, factor_dtype)
            update = _update_with_dropout(flat, lora_A, lora_B, scaling, dropout, factor_dtype)
            y: Tensor = _LowRankProduct.apply(  # type: ignore[no-untyped-call]
                flat, weight, weight_scale, bias, None, None, 1.0, None, plan, weight_needing_grad
            )
            y = y + update.to(dtype)
        else:
            shape = (flat.shape[0], weight.shape[0], lora_A.shape[1], lora_A.shape[0])  # tokens, out, in, r
            # in half precision, W + s B A would round away an update that is small against W
            mergeable = arithmetic == "native" and dtype.itemsize >= 4
            weight_gradient = weight_needing_grad is not None
            order = _choose_order(rates, *shape, mergeable=mergeable, weight_gradient=weight_gradient)
            plan = CallPlan(order, arithmetic, dtype, factor_dtype)
            fixed, trained = (1.0, scaling) if isinstance(scaling, Tensor) else (scaling, None)
            y = _LowRankProduct.apply(  # type: ignore[no-untyped-call]
                flat, weight, weight_scale, bias, lora_A, lora_B, fixed, trained, plan, weight_needing_grad
            )
    return y.view(*x.shape[:-1], weight.shape[0])


def _update_with_dropout(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor | float, dropout: float, factor_dtype: torch.dtype
) -> Tensor:
    """Compute s B A dropout(x) [tokens, out] in `factor_dtype`, with plain autograd."""
    dropped = F.dropout(x.to(factor_dtype), dropout)
    compressed = scaling * F.linear(dropped, lora_A.to(factor_dtype))  # s A dropout(x) [tokens, r]
    return F.linear(compressed, lora_B.to(factor_dtype))


_cheapest_order_cached: Callable[..., ProductOrder] = functools.lru_cache(maxsize=4096)(cheapest_order)


def _choose_order(*shape: Any, **conditions: bool) -> ProductOrder:
    """Return `cheapest_order`, computed once per shape.

    Compiled code calls this only while it is traced, and Dynamo warns of cached functions, so the cache is left out.
    """
    choose: Callable[..., ProductOrder] = cheapest_order if torch.compiler.is_compiling() else _cheapest_order_cached
    return choose(*shape, **conditions)


class _LowRankProduct(torch.autograd.Function):
    """Autograd function from x [tokens, in] to y [tokens, out]; without factors it is the frozen product alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        weight_scale: Tensor | None,
        bias: Tensor | None,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        fixed_scaling: float,
        trained_scaling: Tensor | None,
        plan: CallPlan,
        weight_needing_grad: Tensor | None,
    ) -> Tensor:
        needs_weight_grad = ctx.needs_input_grad[-1]
        x_is_needed = lora_A is not None or needs_weight_grad
        ctx.save_for_backward(x if x_is_needed else None, weight, weight_scale, lora_A, lora_B, trained_scaling)
        ctx.fixed_scaling, ctx.plan, ctx.dtype = fixed_scaling, plan, x.dtype
        operator = torch.ops.relora.low_rank_linear.default
        y: Tensor = operator(x, weight, weight_scale, bias, lora_A, lora_B, fixed_scaling, trained_scaling, *plan)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of `forward`'s arguments, in their order; None for those that need none."""
        x, weight, weight_scale, lora_A, lora_B, trained_scaling = ctx.saved_tensors
        needs_x, _, _, needs_bias, needs_a, needs_b, _, needs_scaling, _, needs_weight = ctx.needs_input_grad
        scaling = ctx.fixed_scaling if trained_scaling is None else trained_scaling
        plan = ctx.plan
        grad_x = grad_weight = grad_a = grad_b = grad_scaling = None
        grad_bias = grad.sum(0) if needs_bias else None
        if lora_A is None or lora_B is None:
            if needs_x:
                grad_x = _frozen_product_backward(grad, weight, weight_scale, plan.arithmetic, plan.dtype)
                grad_x = grad_x.to(ctx.dtype)
            if needs_weight:
                grad_weight = grad.to(plan.factor_dtype).T @ x.to(plan.factor_dtype)
            return grad_x, None, None, grad_bias, None, None, None, None, None, grad_weight
        a, b, factor_grad = (tensor.to(plan.factor_dtype) for tensor in (lora_A, lora_B, grad))
        merged, dense = plan.product_order.merged_backward, plan.product_order.dense or needs_weight
        if not (merged and dense):
            compressed = factor_grad @ b  # dY B [tokens, r]
        if needs_x:
            if merged:
                grad_x = grad.to(plan.dtype) @ _merged_weight(weight, weight_scale, lora_A, lora_B, scaling, plan.dtype)
            else:
                grad_x = _frozen_product_backward(grad, weight, weight_scale, plan.arithmetic, plan.dtype)
                grad_x = _add_scaled_product_(grad_x, compressed, a, scaling)
            grad_x = grad_x.to(ctx.dtype)
        if needs_a or needs_b or needs_scaling or needs_weight:
            x = x.to(plan.factor_dtype)
            if dense:
                grad_weight = factor_grad.T @ x  # dW [out, in] of this layer alone
                unscaled_a, unscaled_b = b.T @ grad_weight, grad_weight @ a.T
            else:
                unscaled_a = compressed.T @ x
                unscaled_b = ((x @ a.T).T @ factor_grad).T  # narrow sides first: up to twice as fast on a CPU
            grad_a, grad_b = (scaling * unscaled_a).to(lora_A.dtype), (scaling * unscaled_b).to(lora_B.dtype)
            if needs_scaling:
                grad_scaling = (unscaled_a * a).sum().to(lora_A.dtype)
        if not needs_weight:
            grad_weight = None
        return grad_x, None, None, grad_bias, grad_a, grad_b, None, grad_scaling, None, grad_weight


# Registered by hand, as `torch.library.custom_op` would do it, but at less than half of what that adds to every call
_LIBRARY = torch.library.Library("relora", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "low_rank_linear(Tensor x, Tensor weight, Tensor? weight_scale, Tensor? bias, Tensor? lora_A, Tensor? lora_B, "
    "float fixed_scaling, Tensor? trained_scaling, bool[] product_order, str arithmetic, ScalarType dtype, "
    "ScalarType factor_dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(_LIBRARY, "low_rank_linear", "CompositeExplicitAutograd")
def _forward(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    fixed_scaling: float,
    trained_scaling: Tensor | None,
    product_order: Sequence[bool],
    arithmetic: str,
    dtype: torch.dtype,
    factor_dtype: torch.dtype,
) -> Tensor:
    """Compute y [tokens, out] as one operator, so that selective activation checkpointing keeps y and nothing else."""
    merged = ProductOrder(*product_order).merged_forward
    scaling = fixed_scaling if trained_scaling is None else trained_scaling
    bias = None if bias is None else bias.to(dtype)
    if lora_A is not None and lora_B is not None and merged:
        return F.linear(x, _merged_weight(weight, weight_scale, lora_A, lora_B, scaling, dtype), bias)
    y = _frozen_product(x, weight, weight_scale, arithmetic, dtype)
    if bias is not None:
        y += bias
    if lora_A is None or lora_B is None:
        return y
    compressed = x.to(factor_dtype) @ lora_A.to(factor_dtype).T  # x Aᵀ [tokens, r]
    return _add_scaled_product_(y, compressed, lora_B.to(factor_dtype).T, scaling)


@torch.library.register_fake("relora::low_rank_linear", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    """Return an empty tensor with the shape and dtype of the operator's output, for tracing."""
    *_, dtype, _ = others
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)


def _frozen_product(
    x: Tensor, weight: Tensor, weight_scale: Tensor | None, arithmetic: str, dtype: torch.dtype
) -> Tensor:
    """Compute x Wᵀ [tokens, out] in the given arithmetic; the result has `dtype`."""
    if arithmetic == "int8":
        assert weight_scale is not None  # int8 codes always have one
        return int8_product(x, weight, weight_scale).to(dtype)
    precision = torch.bfloat16 if arithmetic == "bf16" else dtype
    return (x.to(precision) @ dense_weight(weight, weight_scale, precision).T).to(dtype)


def _frozen_product_backward(
    grad: Tensor, weight: Tensor, weight_scale: Tensor | None, arithmetic: str, dtype: torch.dtype
) -> Tensor:
    """Compute dY W [tokens, in] in the given arithmetic; the result has `dtype`."""
    if arithmetic == "int8":
        assert weight_scale is not None
        return int8_product_backward(grad, weight, weight_scale).to(dtype)
    precision = torch.bfloat16 if arithmetic == "bf16" else dtype
    return (grad.to(precision) @ dense_weight(weight, weight_scale, precision)).to(dtype)


def _merged_weight(
    weight: Tensor,
    weight_scale: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor | float,
    dtype: torch.dtype,
) -> Tensor:
    """Form W + s B A [out, in] in `dtype`."""
    left, alpha = _fold_scaling(lora_B.to(dtype), scaling)
    return torch.addmm(dense_weight(weight, weight_scale, dtype), left, lora_A.to(dtype), alpha=alpha)


def _add_scaled_product_(y: Tensor, left: Tensor, right: Tensor, scaling: Tensor | float) -> Tensor:
    """Add s · left · right to y in place; the product is computed in its operands' dtype."""
    left, alpha = _fold_scaling(left, scaling)
    if y.dtype == left.dtype:
        return y.addmm_(left, right, alpha=alpha)
    return y.add_((left @ right).to(y.dtype), alpha=alpha)


def _fold_scaling(left: Tensor, scaling: Tensor | float) -> tuple[Tensor, float]:
    """Return the left operand and the `alpha` of a scaled product.

    A scale that is a number becomes `alpha`, which `addmm` applies at no cost; a trained one is multiplied in.
    """
    return (scaling * left, 1.0) if isinstance(scaling, Tensor) else (left, scaling)


def dense_weight(weight: Tensor, weight_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the frozen weight [out, in] as numbers of `dtype`; may be the weight itself, not a copy."""
    if weight_scale is None:
        return weight.to(dtype)
    dequantize = dequantize_nf4 if weight.dtype == torch.uint8 else dequantize_int8
    return dequantize(weight, weight_scale, dtype)
