"""The residual step, a cheap full-rank path: W moves along the part of its gradient that the factors cannot express.

    R   = dW - dW Aᵀ (A Aᵀ)⁻¹ A                              [out, in], the part of dW outside A's row space
    W_o <- W_o - scale · η · s² · ‖A‖²/r · φ_o · R_o            φ_o = ‖u_o‖ / ‖g_o‖, for every output o

where g is the gradient of lora_B as AdamW received it, u = m̂ / (√v̂ + ε) is AdamW's update of lora_B, and η is the
learning rate of lora_B. Inside A's row space, AdamW's step on lora_B moves W by -η·s·u A, about -η·s²·φ·dW Aᵀ A; and
Aᵀ A is the projection onto that space times the mean square of A's row norms, ‖A‖²/r. So with scale 1 the residual step
continues the same step outside that space at the same rate. It has no moments of its own, so no memory of earlier
gradients.

That an optimizer in a subspace tells how long the steps outside it should be was found by Fira (Chen et al. 2024,
arXiv 2410.01623), and that one number per channel is enough by APOLLO (Zhu et al. 2024, arXiv 2412.05270). Both train
full-rank weights with the moments of a projected gradient; here the factors are the projection. Fira limits steps that
grow by more than 1%, for which it must remember their length; here φ is limited to a multiple of its median in the
layer.

The price, in a step where it is due: 4 bytes of gradient per frozen weight, and a third product of the weight's size
(2·T·o·i operations for T tokens and a weight [o, i]), as in full-rank training. The 8 bytes of moments per weight are
still saved.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from relora.lowrank.config import Residual
from relora.lowrank.division import whole_tensor
from relora.lowrank.inject import low_rank_layers
from relora.lowrank.linear import LowRankLinear
from relora.lowrank.moments import adam_direction

_MAX_PHI_TO_MEDIAN = 10.0
"""Upper limit of φ, in units of its median in the layer: a gradient that is nearly zero for one step would make
‖u‖ / ‖g‖ arbitrarily large."""
_RIDGE_IN_ROUNDING_ERRORS = 16.0
"""Ridge added to A Aᵀ, in units of its rounding error, so that its Cholesky decomposition exists when rows of A are
nearly dependent."""


@contextmanager
def residual_steps(model: nn.Module, optimizer: torch.optim.Optimizer, residual: Residual, step: int) -> Iterator[None]:
    """Let the weights of low-rank layers take residual steps inside the context, if one is due at `step`.

    Inside the context these weights get gradients, which count like those of trained parameters (norm, clipping,
    checks), and every `optimizer.step()` is followed by the residual step. At the end the weights are frozen again and
    their gradients are dropped.

    Args:
        optimizer: AdamW; if its `found_inf` makes it skip an update, the residual step is skipped, too.
        step: number of the optimizer step.
    """
    layers = list(low_rank_layers(model).values()) if residual.due(step) else []
    if not layers:
        yield
        return
    hook = optimizer.register_step_post_hook(lambda *_: _take_residual_step(layers, optimizer, residual.scale))
    for layer in layers:
        layer.weight.requires_grad_(True)
    try:
        yield
    finally:
        hook.remove()
        for layer in layers:
            layer.weight.requires_grad_(False)
            layer.weight.grad = None


@torch.no_grad()
def remove_row_space_(gradient: Tensor, lora_A: Tensor) -> Tensor:
    """Subtract from dW [out, in], in place, its projection onto the row space of A [r, in]: R of the formula."""
    gram = lora_A @ lora_A.T  # [r, r]
    limits = torch.finfo(gram.dtype)
    gram.diagonal().add_((_RIDGE_IN_ROUNDING_ERRORS * limits.eps * gram.trace()).clamp_min(limits.tiny))
    triangle = torch.linalg.cholesky_ex(gram).L  # unlike `cholesky`, it does not make the host wait for a GPU
    coefficients = torch.cholesky_solve(lora_A @ gradient.T, triangle)  # (A Aᵀ)⁻¹ A dWᵀ [r, out]
    return gradient.addmm_(coefficients.T, lora_A, alpha=-1)


@torch.no_grad()
def _take_residual_step(layers: Iterable[LowRankLinear], optimizer: torch.optim.Optimizer, scale: float) -> None:
    """Move every weight along R, after the optimizer's step on lora_B, and drop the weight's gradient.

    A weight without a gradient, or whose lora_B has no gradient or no moments, does not move.
    """
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    found_inf = getattr(optimizer, "found_inf", None)
    for layer in layers:
        weight_gradient, layer.weight.grad = layer.weight.grad, None
        state, gradient_b = optimizer.state.get(layer.lora_B), layer.lora_B.grad
        if not state or weight_gradient is None or gradient_b is None:
            continue
        group, a = groups[id(layer.lora_B)], whole_tensor(layer.lora_A)
        rate = scale * group["lr"] * layer.scaling**2 * a.square().sum() / layer.r  # scale · η · s² · ‖A‖²/r
        outside = remove_row_space_(layer.base.reorient(weight_gradient).to(a), a)  # R [out, in]
        ratios = _update_to_gradient_ratios(state, group, gradient_b)
        phi = ratios.clamp(max=_MAX_PHI_TO_MEDIAN * layer.whole(ratios).nanmedian()).nan_to_num(0.0)
        change = outside.mul_((-rate * phi)[:, None])
        if found_inf is not None:
            change.masked_fill_(found_inf > 0, 0.0)
        layer.base.add_(layer.base.reorient(change))


def _update_to_gradient_ratios(state: Mapping[str, Tensor], group: Mapping[str, Any], gradient: Tensor) -> Tensor:
    """Return the norm [out] of each row of AdamW's update of lora_B, relative to that row of the gradient.

    It is φ before it is limited to a multiple of its median, and NaN for rows without a gradient.
    """
    update = adam_direction(state, group["betas"], group["eps"])
    gradient_norms = gradient.norm(dim=1)
    ratios: Tensor = (update.norm(dim=1) / gradient_norms).where(gradient_norms > 0, torch.nan)
    return ratios
