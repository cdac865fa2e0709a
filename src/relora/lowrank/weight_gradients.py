"""Gradients of frozen weights, computed for one layer at a time.

    dW = dYᵀ x   [out, in]        of every low-rank layer, formed in the backward pass, handed to a callback and dropped

Training itself forms no dW of a frozen weight. Factors that start along the gradient need it now and then; the price is
a forward and a backward pass, and the memory of one layer's dW.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from relora.lowrank.linear import LowRankLinear


def visit_weight_gradients(
    model: nn.Module,
    layers: Mapping[str, LowRankLinear],
    loss_of: Callable[[nn.Module], Tensor],
    visit: Callable[[str, Tensor], object],
) -> None:
    """Call `visit` with the path and the dW [out, in] of each layer, for one loss.

    No weight, no `.grad` and no training mode of the model changes. dW has the factors' dtype. A layer that the loss
    uses twice is visited twice, once per use, and its dW is the sum of both.

    Args:
        loss_of: computes the loss with the model.
    """
    hooks = [layer.register_forward_hook(_gradient_hook(name, layer, visit)) for name, layer in layers.items()]
    # the backward pass reaches every layer's output on its way to the factors, whose own gradients are dropped
    factors = [layer.lora_B for layer in layers.values()]
    try:
        with torch.enable_grad():
            torch.autograd.grad(loss_of(model), factors, allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()


def _gradient_hook(
    name: str, layer: LowRankLinear, visit: Callable[[str, Tensor], object]
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """Make a forward hook that calls `visit` with dYᵀ x as soon as the gradient dY of the layer's output is known."""

    def after_forward(_: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        x = inputs[0].detach()

        def after_backward(grad: Tensor) -> None:
            dtype = layer.lora_A.dtype
            flat_grad = grad.reshape(-1, grad.shape[-1]).to(dtype)  # [tokens, out]
            flat_x = x.reshape(-1, x.shape[-1]).to(dtype)  # [tokens, in]
            visit(name, flat_grad.T @ flat_x)

        if y.requires_grad:
            y.register_hook(after_backward)  # type: ignore[no-untyped-call]

    return after_forward
