"""The ReLoRA event: merge, check, begin anew, clear.

    W <- W + s·B A - s·B' A';   A, B <- A', B';   m, v, step of A and B <- 0

(Lialin et al. 2023, arXiv 2307.05695, Algorithm 1, where A' is a fresh draw and B' = 0). The model's function does not
change: what the factors held moves into the weight, and what they begin with comes out of it. Nowhere else in the
package is a factor merged in training or a moment cleared. Adam's step count is cleared with its moments; kept, bias
correction is off and the next updates are up to 6.6 times too long, which is what makes the published code diverge
without a re-warm. The price is r·(in + out) parameters per layer that start with no memory.

Beside B' = 0 the gradient of A' is zero: a saddle, which every restart of the paper begins at. `balanced` factors begin
away from it, both at the norms that the old ones had reached.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from relora.errors import NonFinite
from relora.lowrank.directions import Directions, SingularBasis, gradient_frames, leading_frame, random_frame
from relora.lowrank.init import DRAWS
from relora.lowrank.inject import low_rank_layers
from relora.lowrank.linear import LowRankLinear
from relora.lowrank.moments import Change, Reset, check_reset, reset_moments
from relora.seeding import keyed_generator

RestartInit = Literal["kaiming", "orthogonal", "gradient-svd", "weight-svd", "balanced"]
Stagger = Literal["none", "layers", "ranks"]


@dataclass(frozen=True, kw_only=True)
class RestartConfig:
    """How factors begin anew, and what the optimizer remembers of the old ones."""

    optimizer: Reset = "zero"
    """See `moments`."""
    keep_ratio: float = 0.1
    """For `random` and `magnitude`: the share of the moments' entries that stays."""
    init: RestartInit = "kaiming"
    """A' as the layer first drew it (`kaiming`), or with unit rows in other directions, beside B' = 0; `balanced`: both
    non-zero, at the norms of the old ones."""
    directions: Directions = "orthogonal"
    """Of balanced factors."""
    stagger: Stagger = "none"
    """Restart everything, or a part of the layers or of every layer's ranks in turn."""
    turns: int = 1
    """How many parts there are."""

    @property
    def frames(self) -> Directions | None:
        """What the new factors' directions are taken from; None for the paper's draw."""
        if self.init == "balanced":
            return self.directions
        return None if self.init == "kaiming" else self.init


@dataclass(frozen=True)
class MergedUpdate:
    """What one layer gained in the cycle that ended."""

    name: str
    shape: tuple[int, int]
    update_norm: float
    """Frobenius norm of the s·B A that was merged: of balanced factors with what they began with."""
    weight_norm: float
    """Frobenius norm of W before the merge."""
    effective_rank: float
    singular_values: list[float]
    """Of the s·B A that was merged, descending, one for each of its ranks."""


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
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    how: RestartConfig | None = None,
    *,
    cycle: int,
    loss_of: Callable[[nn.Module], Tensor] | None = None,
) -> RestartReport:
    """Merge the low-rank layers, begin `cycle` with new factors and clear the old ones' optimizer state.

    Args:
        how: by default the paper's restart with a true reset: Kaiming A, zero B, zero moments, all layers at once.
        cycle: number of the cycle that begins (1 for the first restart); keys the draws, and says whose turn it is.
        loss_of: makes the loss of a batch; the gradient's singular vectors are those of this loss.

    Raises:
        NonFinite: a factor, a gradient or an update is not finite. Checked before the first weight moves, and again
            layer by layer.
        UserError: pruning or projecting was asked for on moments that are not floating point (8-bit optimizers), or
            the layers are made for one update (DoRA, pissa, gradient-svd); nothing has moved.
        ValueError: directions of the gradient were asked for without `loss_of`.
    """
    started = time.perf_counter()
    how = how or RestartConfig()
    parts = _parts(model, how, cycle)
    for name, (layer, ranks) in parts.items():
        _check(name, layer, optimizer, how, cycle, whole=ranks == slice(0, layer.r))
    frames: dict[str, SingularBasis] = {}
    if how.frames == "gradient-svd":
        if loss_of is None:
            raise ValueError("restart: directions of the gradient need `loss_of`, which makes the loss of a batch")
        frames = gradient_frames(model, {name: layer for name, (layer, _) in parts.items()}, loss_of, cycle=cycle)
    merged, cleared = [], 0
    for name, (layer, ranks) in parts.items():
        before = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
        merged.append(_redraw_factors(name, layer, ranks, how, frames.get(name), cycle))
        cleared += _reset(name, layer, ranks, optimizer, how, before, cycle)
    return RestartReport(cycle, how.optimizer, merged, cleared, time.perf_counter() - started)


def initial_directions(model: nn.Module, how: RestartConfig, loss_of: Callable[[nn.Module], Tensor]) -> None:
    """Turn the factors of freshly injected layers (B = 0) into the directions in which restarts will begin."""
    if how.frames is None:
        return
    layers, how = low_rank_layers(model), replace(how, init=how.frames)
    frames = gradient_frames(model, layers, loss_of, cycle=0) if how.frames == "gradient-svd" else {}
    for name, layer in layers.items():
        layer.check_restart()
        layer.lora_A.data.copy_(_new_factors(layer, slice(0, layer.r), how, frames.get(name), cycle=0)[0])


def effective_rank(singular_values: Tensor) -> float:
    """exp(entropy of the normalised singular values); r for r equal ones (Roy & Vetterli 2007). 0 for a zero matrix."""
    total = singular_values.sum()
    if total == 0:
        return 0.0
    share = (singular_values / total).clamp_min(torch.finfo(singular_values.dtype).tiny)
    return math.exp(-(share * share.log()).sum().item())


def update_spectrum(layer: LowRankLinear, ranks: slice = slice(None)) -> Tensor:
    """Singular values [k] of s·B A of these ranks, without forming it: those of R_B R_Aᵀ, from QR of B and Aᵀ."""
    with torch.no_grad():
        triangle_b = torch.linalg.qr(layer.lora_B[:, ranks], mode="r").R  # [k, k]
        triangle_a = torch.linalg.qr(layer.lora_A[ranks].T, mode="r").R  # [k, k]
        spectrum: Tensor = torch.linalg.svdvals(layer.scaling * (triangle_b @ triangle_a.T))
    return spectrum


def _parts(model: nn.Module, how: RestartConfig, cycle: int) -> Mapping[str, tuple[LowRankLinear, slice]]:
    """The layers, and of each the ranks, that begin anew with this cycle."""
    layers, turn = low_rank_layers(model), (cycle - 1) % how.turns
    if how.stagger == "layers":
        return {
            name: (layer, slice(0, layer.r))
            for index, (name, layer) in enumerate(layers.items())
            if index % how.turns == turn
        }
    if how.stagger == "ranks":
        cuts = {
            name: (turn * layer.r // how.turns, (turn + 1) * layer.r // how.turns) for name, layer in layers.items()
        }
        return {name: (layers[name], slice(first, end)) for name, (first, end) in cuts.items() if end > first}
    return {name: (layer, slice(0, layer.r)) for name, layer in layers.items()}


def _check(
    name: str, layer: LowRankLinear, optimizer: torch.optim.Optimizer, how: RestartConfig, cycle: int, *, whole: bool
) -> None:
    layer.check_restart()
    for kind, factor in layer.factors.items():
        if not torch.isfinite(factor.sum()):
            raise NonFinite(f"{name}.{kind} is not finite before the restart into cycle {cycle}; no weight was changed")
        check_reset(optimizer, factor, how.optimizer, whole=whole)


def _redraw_factors(
    name: str, layer: LowRankLinear, ranks: slice, how: RestartConfig, frame: SingularBasis | None, cycle: int
) -> MergedUpdate:
    """Give a layer its new factors."""
    spectrum = update_spectrum(layer, ranks).cpu()
    weight_norm = layer.base.exact.norm().item()
    taken = layer.replace_factors_(*_new_factors(layer, ranks, how, frame, cycle), ranks)
    return MergedUpdate(
        name=name,
        shape=(layer.out_features, layer.in_features),
        update_norm=taken.norm().item(),
        weight_norm=weight_norm,
        effective_rank=effective_rank(spectrum),
        singular_values=spectrum.tolist(),
    )


@torch.no_grad()
def _new_factors(
    layer: LowRankLinear, ranks: slice, how: RestartConfig, frame: SingularBasis | None, cycle: int
) -> tuple[Tensor, Tensor | None]:
    """A' [k, in], and B' [out, k] or None for zero."""
    generator, k = keyed_generator(layer.seed, "redraw", cycle, layer.name), ranks.stop - ranks.start
    if how.frames is None:
        return DRAWS[layer.init]((k, layer.in_features), generator), None
    if how.frames == "orthogonal":
        frame = random_frame(layer, k, generator)
    elif how.frames == "weight-svd":
        weight = layer.base.rows(layer.base.exact).to(layer.lora_A) + layer.base.rows(layer.delta())
        frame = leading_frame(weight, layer.r, generator)
    assert frame is not None  # the gradient's comes with the call
    u, v = (side[:, ranks] if side.shape[1] > k else side for side in frame)
    if how.init != "balanced":
        return v.T, None
    norm_a, norm_b = (factor.norm() / math.sqrt(k) for factor in (layer.lora_A[ranks], layer.lora_B[:, ranks]))
    return norm_a * v.T, norm_b * u


def _reset(
    name: str,
    layer: LowRankLinear,
    ranks: slice,
    optimizer: torch.optim.Optimizer,
    how: RestartConfig,
    before: tuple[Tensor, Tensor],
    cycle: int,
) -> int:
    """Treat the optimizer state of all that a layer trains; returns the entries that went to zero."""
    old_a, old_b = before
    changes = {
        "lora_A": Change(old_b.T, layer.lora_B.detach().T, ranks, along=0),
        "lora_B": Change(old_a, layer.lora_A.detach(), ranks, along=1),
    }
    return sum(
        reset_moments(
            optimizer, factor, how.optimizer, changes.get(kind), how.keep_ratio, (layer.seed, cycle, f"{name}.{kind}")
        )
        for kind, factor in layer.factors.items()
    )
