"""A cheap full-rank path: the frozen weight follows that part of its gradient which its factors cannot express.

    R   = dW - dW Aᵀ (A Aᵀ)⁻¹ A                              [out, in], what of dW lies outside of A's row space
    W_o <- W_o - scale · η · s² · ‖A‖²/r · φ_o · R_o            φ_o = ‖u_o‖ / ‖g_o‖, for every output o

where g is the gradient of lora_B as AdamW saw it, u what AdamW made of it, m̂ / (√v̂ + ε), and η lora_B's learning rate.
Inside of A's row space AdamW's own step on lora_B moves W by -η·s·u A, which is about -η·s²·φ·dW Aᵀ A, and Aᵀ A is the
projection onto that space times the mean square of A's row lengths, ‖A‖²/r. So with scale 1 the same step goes on
outside of it, at the same rate, with no moments of its own: a step without memory of earlier gradients.

That an optimizer in a subspace tells how long steps outside of it should be is Fira's finding (Chen et al. 2024,
arXiv 2410.01623), that one number a channel is enough APOLLO's (Zhu et al. 2024, arXiv 2412.05270). Both train
full-rank weights with moments of a projected gradient; here the factors are the projection. Fira holds back steps that
grow by more than 1%, for which it remembers their length; here φ is held below a multiple of its median in the layer.

The price, in a step where it is due: 4 bytes of gradient a frozen weight, and one product more of three (2·T·o·i for T
tokens), that of full-rank training; 8 bytes of moments a weight stay saved.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from relora.lowrank.config import Residual
from relora.lowrank.inject import low_rank_layers
from relora.lowrank.linear import LowRankLinear
from relora.lowrank.moments import adam_direction

_MOST = 10.0
"""Times the layer's median, φ at most: a gradient that is nearly zero for a moment makes ‖u‖ / ‖g‖ as large as it
likes."""
_RIDGE = 16.0
"""Of A Aᵀ in units of its rounding error: rows of A that are nearly dependent must not break its decomposition."""


@contextmanager
def residual_steps(model: nn.Module, optimizer: torch.optim.Optimizer, residual: Residual, step: int) -> Iterator[None]:
    """Within the context, if `step` is one of those at which it is due, weights of low-rank layers train, too.

    They get gradients, which count wherever those of trained parameters do (norm, clipping, checks), and every
    `optimizer.step()` is followed by theirs. Afterwards they are frozen again and their gradients are gone.

    Args:
        optimizer: AdamW. What holds back its update (`found_inf`) holds back theirs.
    """
    layers = list(low_rank_layers(model).values()) if residual.due(step) else []
    if not layers:
        yield
        return
    hook = optimizer.register_step_post_hook(lambda *_: _move(layers, optimizer, residual.scale))
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
def outside_(gradient: Tensor, lora_A: Tensor) -> Tensor:
    """Take from dW [out, in], in place, its part in the row space of A [r, in]."""
    gram = lora_A @ lora_A.T  # [r, r]
    limits = torch.finfo(gram.dtype)
    gram.diagonal().add_((_RIDGE * limits.eps * gram.trace()).clamp_min(limits.tiny))
    triangle = torch.linalg.cholesky_ex(gram).L  # which a GPU need not be waited for
    inside = torch.cholesky_solve(lora_A @ gradient.T, triangle)  # [r, out]
    return gradient.addmm_(inside.T, lora_A, alpha=-1)


@torch.no_grad()
def _move(layers: Iterable[LowRankLinear], optimizer: torch.optim.Optimizer, scale: float) -> None:
    """Every weight's step, from its gradient and from what the optimizer has just done to lora_B."""
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    held = getattr(optimizer, "found_inf", None)
    for layer in layers:
        dense, layer.weight.grad = layer.weight.grad, None
        state, gradient = optimizer.state.get(layer.lora_B), layer.lora_B.grad
        if not state or dense is None or gradient is None:
            continue
        group, a = groups[id(layer.lora_B)], layer.lora_A
        rate = scale * group["lr"] * layer.scaling**2 * a.square().sum() / layer.r
        change = outside_(layer.base.rows(dense).to(a), a).mul_((-rate * _lengthening(state, group, gradient))[:, None])
        if held is not None:
            change.masked_fill_(held > 0, 0.0)
        layer.base.add_(layer.base.rows(change))


def _lengthening(state: Mapping[str, Tensor], group: Mapping[str, Any], gradient: Tensor) -> Tensor:
    """φ [out]: how many times longer than the gradient's AdamW made each row of its update; 0 for rows without one."""
    update = adam_direction(state, group["betas"], group["eps"])
    lengths = gradient.norm(dim=1)
    ratios: Tensor = (update.norm(dim=1) / lengths).where(lengths > 0, torch.nan)
    return ratios.clamp(max=_MOST * ratios.nanmedian()).nan_to_num(0.0)
