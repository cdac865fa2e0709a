"""The ReLoRA event: merge, check, redraw, clear.

    W <- W + s·B A;   A <- fresh draw;   B <- 0;   m, v, step of A and B <- 0

(Lialin et al. 2023, arXiv 2307.05695, Algorithm 1). The model's function does not change: s·B A moves from the factors
into the weight. Nowhere else in the package is a factor merged in training or a moment cleared. Adam's step count is
cleared with its moments; kept, bias correction is off and the next updates are up to 6.6 times too long, which is what
makes the published code diverge without a re-warm. The price is r·(in + out) fresh parameters per layer that start with
no memory.
"""

import math
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from relora.draws import keyed_generator
from relora.errors import NonFinite, UserError
from relora.lowrank.inject import low_rank_layers
from relora.lowrank.linear import LowRankLinear

Reset = Literal["zero", "random", "magnitude", "keep"]


@dataclass(frozen=True)
class MergedUpdate:
    """What one layer gained in the cycle that ended."""

    name: str
    shape: tuple[int, int]
    update_norm: float
    """Frobenius norm of s·B A."""
    weight_norm: float
    """Frobenius norm of W before the merge."""
    effective_rank: float
    singular_values: list[float]
    """Of s·B A, descending, r of them."""


@dataclass(frozen=True)
class RestartReport:
    """What a restart did."""

    cycle: int
    """The cycle that begins."""
    optimizer: Reset
    layers: list[MergedUpdate]
    moments_cleared: int
    """Entries of the factors' moments (m and v counted apart) that were set to zero."""
    seconds: float


def restart(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, cycle: int, reset: Reset = "zero", keep_ratio: float = 0.1
) -> RestartReport:
    """Merge every low-rank layer, redraw its factors for `cycle` and clear their optimizer state.

    Args:
        cycle: number of the cycle that begins (1 for the first restart); keys the draws.
        reset: `zero` forgets m, v and step; `random` and `magnitude` keep `keep_ratio` of the entries by one mask for m
            and v, and keep step (the paper's pruning); `keep` touches nothing.

    Raises:
        NonFinite: a factor or an update is not finite. Checked before the first weight moves, and again layer by
            layer. UserError: pruning was asked for on moments that are not floating point (8-bit optimizers), or the
            layers are made for one update (DoRA, pissa, gradient-svd); nothing has moved.
    """
    started = time.perf_counter()
    layers = low_rank_layers(model)
    for name, layer in layers.items():
        layer.check_restart()
        for kind, factor in layer.factors.items():
            if not torch.isfinite(factor.sum()):
                raise NonFinite(
                    f"{name}.{kind} is not finite before the restart into cycle {cycle}; no weight was changed"
                )
            if reset in ("random", "magnitude") and not all(m.is_floating_point() for m in _moments(optimizer, factor)):
                raise UserError(
                    f"restart.optimizer: {reset} needs floating-point moments; use `zero` with this optimizer"
                )
    merged, cleared = [], 0
    for name, layer in layers.items():
        merged.append(_merge_and_redraw(name, layer, cycle))
        for kind, factor in layer.factors.items():
            cleared += _clear_moments(optimizer, factor, reset, keep_ratio, (layer.seed, cycle, f"{name}.{kind}"))
    return RestartReport(cycle, reset, merged, cleared, time.perf_counter() - started)


def effective_rank(singular_values: Tensor) -> float:
    """exp(entropy of the normalised singular values); r for r equal ones (Roy & Vetterli 2007). 0 for a zero matrix."""
    total = singular_values.sum()
    if total == 0:
        return 0.0
    share = (singular_values / total).clamp_min(torch.finfo(singular_values.dtype).tiny)
    return math.exp(-(share * share.log()).sum().item())


def update_spectrum(layer: LowRankLinear) -> Tensor:
    """Singular values [r] of s·B A, without forming it: those of R_B R_Aᵀ, from the QR factors of B and Aᵀ."""
    with torch.no_grad():
        triangle_b = torch.linalg.qr(layer.lora_B, mode="r").R  # [r, r]
        triangle_a = torch.linalg.qr(layer.lora_A.T, mode="r").R  # [r, r]
        spectrum: Tensor = torch.linalg.svdvals(layer.scaling * (triangle_b @ triangle_a.T))
    return spectrum


def _merge_and_redraw(name: str, layer: LowRankLinear, cycle: int) -> MergedUpdate:
    spectrum = update_spectrum(layer).cpu()
    weight_norm = layer.base.exact.norm().item()
    delta = layer.merge_()
    layer.redraw_(cycle)
    return MergedUpdate(
        name=name,
        shape=(layer.out_features, layer.in_features),
        update_norm=delta.norm().item(),
        weight_norm=weight_norm,
        effective_rank=effective_rank(spectrum),
        singular_values=spectrum.tolist(),
    )


def _clear_moments(
    optimizer: torch.optim.Optimizer, factor: nn.Parameter, reset: Reset, keep_ratio: float, draw: tuple[int, int, str]
) -> int:
    """Clear one factor's optimizer state; returns how many moment entries went to zero."""
    moments = _moments(optimizer, factor)
    if reset == "keep" or not moments:
        return 0
    if reset == "zero":
        # Forgetting the state is the one reset that is right for every optimizer: it starts anew at the next step, with
        # m = v = step = 0. Zeroing in place is not: a zero code of an 8-bit moment is not a zero value.
        del optimizer.state[factor]
        return sum(moment.numel() for moment in moments)
    keep = _kept_entries(moments[0], reset, keep_ratio, draw)
    for moment in moments:  # one mask for all: m kept where v is gone would be divided by eps
        moment.mul_(keep)
    return int((~keep).sum().item()) * len(moments)


def _moments(optimizer: torch.optim.Optimizer, factor: nn.Parameter) -> list[Tensor]:
    """What the optimizer keeps of a factor, entry by entry: none before its first step."""
    state = optimizer.state.get(factor, {})
    tensors = [value for key, value in state.items() if key != "step" and torch.is_tensor(value)]
    return [tensor for tensor in tensors if tensor.shape == factor.shape]


def _kept_entries(first_moment: Tensor, reset: Reset, keep_ratio: float, draw: tuple[int, int, str]) -> Tensor:
    """Mask of the entries that stay: a keyed random share, or the largest by magnitude."""
    if reset == "random":
        seed, cycle, name = draw
        uniform = torch.rand(first_moment.shape, generator=keyed_generator(seed, "prune", cycle, name))
        return (uniform < keep_ratio).to(first_moment.device)
    keep = torch.zeros(first_moment.numel(), dtype=torch.bool, device=first_moment.device)
    largest = first_moment.abs().flatten().topk(math.ceil(keep_ratio * first_moment.numel())).indices
    keep[largest] = True
    return keep.view(first_moment.shape)
