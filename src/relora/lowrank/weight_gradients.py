"""Gradients of frozen weights, computed for one layer at a time.

    dW = dYᵀ x   [out, in]        of every low-rank layer, formed in the backward pass, handed to a callback and dropped

Training itself forms no dW of a frozen weight. Factors that start along the gradient need it now and then; the price is
a forward and a backward pass, and the memory of one layer's dW.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from relora.lowrank.division import division_of
from relora.lowrank.linear import LowRankLinear


def visit_weight_gradients(
    model: nn.Module,
    layers: Mapping[str, LowRankLinear],
    loss_of: Callable[[nn.Module], Tensor],
    visit: Callable[[str, Tensor], object],
) -> None:
    """Call `visit` once with the path and the dW [out, in] of each layer that a loss uses.

    No weight, no `.grad` and no training mode of the model changes. dW has the factors' dtype. The dW of a layer that
    the loss uses several times is the sum over its uses; it is kept until the last of them.

    Args:
        loss_of: computes the loss with the model.
    """
    sums = {name: _UseSum(name, layer, visit) for name, layer in layers.items()}
    hooks = [layer.register_forward_hook(sums[name].after_forward) for name, layer in layers.items()]
    # the backward pass reaches every layer's output on its way to the factors, whose own gradients are dropped
    factors = [layer.lora_B for layer in layers.values()]
    division = division_of(model)
    try:
        with torch.enable_grad(), nullcontext() if division is None else division.passes():
            loss = loss_of(model)
            for one in sums.values():
                one.in_backward = True
            if division is None:
                torch.autograd.grad(loss, factors, allow_unused=True)
            else:  # in a pass other tensors stand in for the factors, and the gradients of all are added up
                loss.backward()  # type: ignore[no-untyped-call]
        if division is not None:
            model.zero_grad()
        for one in sums.values():
            one.finish()
    finally:
        for hook in hooks:
            hook.remove()


class _UseSum:
    """The sum of dYᵀ x over all uses of one layer in a forward pass, handed to `visit` when the last one is known."""

    def __init__(self, name: str, layer: LowRankLinear, visit: Callable[[str, Tensor], object]) -> None:
        self.name, self.layer, self.visit = name, layer, visit
        self.in_backward = False
        self.uses = 0
        self.total: Tensor | None = None

    def after_forward(self, _: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        """Forward hook: wait for the gradient dY of this use's output."""
        # activation checkpointing runs a block again in the backward pass: that is no further use
        if not y.requires_grad or (self.in_backward and self.uses):
            return
        self.uses += 1
        x = inputs[0].detach()

        def after_backward(grad: Tensor) -> None:
            dtype = self.layer.lora_A.dtype
            flat_grad = grad.reshape(-1, grad.shape[-1]).to(dtype)  # [tokens, out]
            flat_x = x.reshape(-1, x.shape[-1]).to(dtype)  # [tokens, in]
            gradient = flat_grad.T @ flat_x
            self.total = gradient if self.total is None else self.total.add_(gradient)
            self.uses -= 1
            if not self.uses:
                self.finish()

        y.register_hook(after_backward)  # type: ignore[no-untyped-call]

    def finish(self) -> None:
        """Hand over the sum; a use whose output the loss ignores has no gradient, so its hook never ran."""
        if self.total is not None:
            total, self.total = self.total, None
            self.visit(self.name, total)
