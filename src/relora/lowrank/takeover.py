"""The takeover: at the switch to low rank, the factors take over what the warm start has learnt.

    dW = W - W0                                  W0: the weight before the first step
    s·B A = the r leading singular directions of dW
    W <- W - s·B A        the rest of dW stays in the weight, and the model's function does not change

Without it the directions that mattered most so far are frozen at the switch, and new factors have to find them again.
Each direction is shared equally, as s_i^(1/2) in lora_A and in lora_B, so both factors have a gradient at once.
The price: the initial weights once more in main memory, and a randomized singular value decomposition per layer.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from relora.errors import NonFinite
from relora.lowrank.directions import leading_basis
from relora.lowrank.divided_layer import whole_factors
from relora.lowrank.inject import low_rank_layers
from relora.lowrank.linear import LowRankLinear
from relora.seeding import keyed_generator


@torch.no_grad()
def take_over_(model: nn.Module, initial_weights: Mapping[str, Tensor]) -> float:
    """Set the factors of freshly injected layers to the leading directions of dW.

    A layer whose weight has not changed keeps its factors.

    Args:
        initial_weights: W0 by path of the layer, in the weights' shape.

    Returns:
        The share of dW's squared norm, over all layers, that the factors hold.

    Raises:
        NonFinite: a weight is not finite; layers before it have changed.
        UserError: a layer cannot have other factors than those that it was injected with (DoRA, pissa, gradient-svd).
    """
    held = whole = 0.0
    for name, layer in low_rank_layers(model).items():
        layer.check_restart()
        initial = layer.own_rows(layer.base.reorient(initial_weights[name])).to(layer.base.exact)
        update = layer.whole((layer.base.reorient(layer.base.exact) - initial).to(layer.lora_A))
        if not torch.isfinite(update.sum()):
            raise NonFinite(f"{name}.weight is not finite at the switch to low rank")
        if not update.any():
            continue
        lora_A, lora_B = _leading_factors(name, layer, update)
        with whole_factors(layer):
            layer.replace_factors_(lora_A, lora_B)
        rest = update - layer.initial_scaling * lora_B @ lora_A
        whole += update.square().sum().item()
        held += update.square().sum().item() - rest.square().sum().item()
    return held / whole if whole else 0.0


def _leading_factors(name: str, layer: LowRankLinear, update: Tensor) -> tuple[Tensor, Tensor]:
    """Return A [r, in] and B [out, r] such that s·B A is about the best approximation of rank r to an update."""
    u, v = leading_basis(update, layer.r, keyed_generator(layer.seed, "takeover", name))
    values = ((update @ v) * u).sum(0).clamp_min(0)  # [r]
    roots = (values / layer.initial_scaling).sqrt()
    return (v * roots).T, u * roots
