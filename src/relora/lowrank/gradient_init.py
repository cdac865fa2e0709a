"""Factors that begin along the task's own gradient (LoRA-GA), and updates told apart from what factors began with.

    dW = mean over batches of dYᵀ x        of every low-rank layer, its weight frozen as it is
    A, B along dW (see `factors`);  W <- W - s·B A, so the model's function stays

After Wang et al. 2024 (arXiv 2407.05000, algorithm 1). The price: a forward and a backward pass for each batch, 4 bytes
of main memory for every parameter of the targets while their dW are summed there (on the device is one layer's dW at a
time), and a singular value decomposition per layer.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from relora.errors import NonFinite, UserError
from relora.lowrank.init import along_gradient
from relora.lowrank.inject import low_rank_layers
from relora.lowrank.linear import LowRankLinear
from relora.lowrank.weight_gradients import visit_weight_gradients

STABLE_GAMMA = 16.0
"""The paper's for T5; its stable scale is out^(1/4) / sqrt(gamma)."""


def weight_gradients(model: nn.Module, loss_of_batches: Iterable[Callable[[nn.Module], Tensor]]) -> dict[str, Tensor]:
    """Gradients dW [out, in] of the low-rank layers' weights by path, in main memory, the mean over the batches.

    No weight, no `.grad` and no mode of the model changes.

    Args:
        loss_of_batches: of each batch, what makes its loss (a mean over its tokens) of the model.

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
    """Begin every layer that was injected with `init: gradient-svd` along its dW; the model's function stays.

    Args:
        gradients: dW [out, in] by path, as `weight_gradients` gives them.

    Raises:
        UserError: a layer was injected otherwise, has begun already, has no gradient, or is narrower than 2 r.
        NonFinite: a gradient is not finite. No layer has changed.
    """
    layers = low_rank_layers(model)
    for name, layer in layers.items():
        _check(name, layer, gradients.get(name))
    for name, layer in layers.items():
        layer.set_initial_factors_(*along_gradient(gradients[name].to(layer.lora_A), layer.r, stable_gamma))


@torch.no_grad()
def update_factors(layer: LowRankLinear) -> tuple[Tensor, Tensor, float]:
    """Copies A [k, in] and B [out, k], and s: s·B A is the update relative to the weight as it was injected.

    k is r; or 2 r where the factors began with a part B0 A0 of the weight: then they are [A; A0] and [B, -B0]. The
    rounding of a base without a master is no part of it.
    """
    a, b = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    if isinstance(layer.scaling, nn.Parameter):
        b = b * (layer.scaling.detach() / layer.initial_scaling)
    if layer.initial_A is not None and layer.initial_B is not None and layer.initial_B.any():
        a, b = torch.cat([a, layer.initial_A]), torch.cat([b, -layer.initial_B], dim=1)
    return a, b, layer.initial_scaling


def _check(name: str, layer: LowRankLinear, gradient: Tensor | None) -> None:
    if layer.init != "gradient-svd" or layer.lora_B.any():
        kind = "has begun already" if layer.init == "gradient-svd" else f"was injected with init: {layer.init}"
        raise UserError(f"lowrank.init: {name} {kind}; gradient_svd_ is for fresh layers with init: gradient-svd")
    if gradient is None or gradient.shape != (layer.out_features, layer.in_features) or not gradient.any():
        raise UserError(f"lowrank.init: gradient-svd has no gradient of {name}; leave it out of lowrank.target_modules")
    narrow = min(gradient.shape)
    if 2 * layer.r > narrow:
        raise UserError(
            f"lowrank.init: gradient-svd takes 2 r = {2 * layer.r} directions, and {name} has {narrow}; "
            f"r may be at most {narrow // 2} here"
        )
    if not torch.isfinite(gradient.sum()):
        raise NonFinite(f"the gradient of {name} is not finite, so no factor began with it")
