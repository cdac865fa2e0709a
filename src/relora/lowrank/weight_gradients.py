"""Gradients of frozen weights, one layer at a time.

    dW = dYᵀ x   [out, in]        of every low-rank layer, formed on the way back, handed over and dropped

Training never forms them. What looks at them now and then (factors that begin along the gradient) pays a forward and a
backward pass, and holds one layer's dW.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from relora.lowrank.linear import LowRankLinear


def visit_weight_gradients(
    model: nn.Module,
    layers: Mapping[str, LowRankLinear],
    loss_of: Callable[[nn.Module], Tensor],
    use: Callable[[str, Tensor], object],
) -> None:
    """Call `use` with the path and dW [out, in] of each of the layers, for the loss that `loss_of` makes of the model.

    No weight, no `.grad` and no mode of the model changes. dW has the precision of the factors.
    """
    hooks = [layer.register_forward_hook(_visiting(name, layer, use)) for name, layer in layers.items()]
    # the way back goes through every layer's output to its factors, whose own gradients are dropped
    ends = [layer.lora_B for layer in layers.values()]
    try:
        with torch.enable_grad():
            torch.autograd.grad(loss_of(model), ends, allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()


def _visiting(
    name: str, layer: LowRankLinear, use: Callable[[str, Tensor], object]
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """A hook that hands over a layer's dYᵀ x once the gradient of its output is there."""

    def after_forward(_: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        x = inputs[0].detach()

        def visit(grad: Tensor) -> None:
            rows, columns = (part.reshape(-1, part.shape[-1]).to(layer.lora_A.dtype) for part in (grad, x))
            use(name, rows.T @ columns)

        if y.requires_grad:
            y.register_hook(visit)  # type: ignore[no-untyped-call]

    return after_forward
