"""Factors that start along the gradient of the task (LoRA-GA), and updates relative to the weight before injection.

    dW = mean over batches of dYᵀ x        for every low-rank layer; its weight stays frozen
    A, B along dW (see `init`);  W <- W - s·B A, so the model's function does not change

After Wang et al. 2024 (arXiv 2407.05000, algorithm 1). The price: a forward and a backward pass for each batch; 4 bytes
of main memory per parameter of the targets while their dW are summed there (the device holds the dW of one layer at a
time); and a singular value decomposition per layer.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from relora.errors import NonFinite, UserError
from relora.lowrank.init import gradient_factors
from relora.lowrank.inject import low_rank_layers
from relora.lowrank.linear import LowRankLinear
from relora.lowrank.weight_gradients import visit_weight_gradients

STABLE_GAMMA = 16.0
"""gamma of the stable scale out^(1/4) / sqrt(gamma); the paper's value for T5."""


def weight_gradients(model: nn.Module, loss_of_batches: Iterable[Callable[[nn.Module], Tensor]]) -> dict[str, Tensor]:
    """Compute the gradients dW [out, in] of the low-rank layers' weights by path, as the mean over the batches.

    They are in main memory, in the factors' dtype. A layer that no loss uses has a dW of zeros.

    The model computes in the training mode that it has. No weight, no `.grad` and no training mode of it changes.

    Args:
        loss_of_batches: for each batch a function that computes its loss (a mean over its tokens) with the model.

    Raises:
        UserError: there are no batches, or no low-rank layers.
    """
    layers = low_rank_layers(model)
    if not layers:
        raise UserError("the model has no low-rank layers whose weights could have a gradient; relora.inject first")
    gradients = {
        name: torch.zeros(layer.out_features, layer.in_features, dtype=layer.lora_A.dtype)
        for name, layer in layers.items()
    }
    batches = 0
    for loss_of in loss_of_batches:
        visit_weight_gradients(model, layers, loss_of, lambda name, gradient: gradients[name].add_(gradient.cpu()))
        batches += 1
    if not batches:
        raise UserError("lowrank.init: gradient-svd needs at least one batch to take the gradient of")
    return {name: gradient.div_(batches) for name, gradient in gradients.items()}


@torch.no_grad()
def gradient_svd_(model: nn.Module, gradients: Mapping[str, Tensor], *, stable_gamma: float = STABLE_GAMMA) -> None:
    """Set the factors of all layers, injected with `init: gradient-svd`, along their dW; the model's function stays.

    Args:
        gradients: dW [out, in] by path, from `weight_gradients`.
        stable_gamma: gamma of the stable scale.

    Raises:
        UserError: a layer was injected with another `init`, its factors are set already, its gradient is missing, zero
            or of another shape, or its smaller side is less than 2 r. No layer has changed.
        NonFinite: a gradient is not finite. No layer has changed.
    """
    layers = low_rank_layers(model)
    for name, layer in layers.items():
        _check(name, layer, gradients.get(name))
    for name, layer in layers.items():
        layer.set_initial_factors_(*gradient_factors(gradients[name].to(layer.lora_A), layer.r, stable_gamma))


@torch.no_grad()
def update_factors(layer: LowRankLinear) -> tuple[Tensor, Tensor, float]:
    """Return factors A [k, in] and B [out, k] and s, such that s·B A is the update relative to the weight at injection.

    After a merge it is the update since then: what was merged is part of the weight. k is r. Where an initial product
    s·B0 A0 was subtracted from the weight and has not been merged, k is 2 r and the factors are [A; A0] and [B, -B0].
    They are copies. s is the scale at injection; a trained scale is multiplied into B. DoRA's magnitude and the
    rounding of a stored weight without a master are not part of the update.
    """
    a, b = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    if isinstance(layer.scaling, nn.Parameter):
        b = b * (layer.scaling.detach() / layer.initial_scaling)
    if layer.initial_A is not None and layer.initial_B is not None and layer.initial_B.any():
        a, b = torch.cat([a, layer.initial_A]), torch.cat([b, -layer.initial_B], dim=1)
    return a, b, layer.initial_scaling


def _check(name: str, layer: LowRankLinear, gradient: Tensor | None) -> None:
    """Raise the errors of `gradient_svd_` for one layer."""
    if layer.init != "gradient-svd" or layer.lora_B.any():
        kind = "has begun already" if layer.init == "gradient-svd" else f"was injected with init: {layer.init}"
        raise UserError(f"lowrank.init: {name} {kind}; gradient_svd_ is for fresh layers with init: gradient-svd")
    if gradient is None or gradient.shape != (layer.out_features, layer.in_features) or not gradient.any():
        raise UserError(f"lowrank.init: gradient-svd has no gradient of {name}; leave it out of lowrank.target_modules")
    smaller_side = min(gradient.shape)
    if 2 * layer.r > smaller_side:
        raise UserError(
            f"lowrank.init: gradient-svd takes 2 r = {2 * layer.r} directions, and {name} has {smaller_side}; "
            f"r may be at most {smaller_side // 2} here"
        )
    if not torch.isfinite(gradient.sum()):
        raise NonFinite(f"the gradient of {name} is not finite, so no factor began with it")
