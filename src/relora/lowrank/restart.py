"""The restart of ReLoRA: merge the factors into W, start new ones, clear the optimizer state of the old ones.

    W <- W + s·B A - s·B' A';   A, B <- A', B';   m, v, step of A and B <- 0

(Lialin et al. 2023, arXiv 2307.05695, Algorithm 1, where A' is a fresh draw and B' = 0.) The model's function does not
change: the old product moves into the weight, and the new one is subtracted from it. Every cycle adds an update of rank
r, so N cycles add up to an update of rank up to N·r. Nowhere else in the package is a factor merged during training or
a moment of a factor cleared.

Adam's step count is cleared together with its moments. If it were kept, bias correction would be off and the next
updates would be up to 6.6 times too long, which makes the published code diverge unless the learning rate is warmed up
after every restart. The price of a restart is that r·(in + out) parameters per layer start without moments.

Beside B' = 0 the gradient of A' is zero, so a restart of the paper begins at a saddle point. `balanced` factors avoid
it: A' and B' are both non-zero, with the norms that A and B had reached. They may retain the leading directions of the
old product, so that only its weak directions are given up for new ones (SwitchLoRA, Zhou et al. 2024, arXiv 2406.06564,
renews single vectors).

Steps of `restart`, in order:

    _restarting_ranks   which layers restart, and which of their ranks (all of them, unless restarts are staggered)
    _check_layer        refuse before anything changes
    gradient_bases      singular vectors of the gradient, if the new factors follow it
    _merge_and_redraw   per layer: new factors (`_new_factors`), merge (`LowRankLinear.replace_factors_`), measurements
    _reset_moments      per layer: optimizer state (`moments`)
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from relora.errors import NonFinite, UserError
from relora.lowrank.directions import (
    Directions,
    SingularBasis,
    factored_svd,
    gradient_bases,
    leading_basis,
    outside,
    random_basis,
)
from relora.lowrank.divided_layer import whole_factors
from relora.lowrank.init import DRAW_A
from relora.lowrank.inject import low_rank_layers
from relora.lowrank.linear import LowRankLinear
from relora.lowrank.moments import PartnerChange, Reset, check_reset, reset_moments
from relora.seeding import keyed_generator

RestartInit = Literal["kaiming", "orthogonal", "gradient-svd", "weight-svd", "balanced"]
Stagger = Literal["none", "layers", "ranks"]


@dataclass(frozen=True, kw_only=True)
class RestartConfig:
    """Settings of a restart: how the new factors start, and what the optimizer keeps of the old ones."""

    optimizer: Reset = "zero"
    """Treatment of the factors' optimizer state (see `moments`)."""
    keep_ratio: float = 0.1
    """Share of the moments' entries that `random` and `magnitude` keep."""
    init: RestartInit = "kaiming"
    """The new factors. `kaiming`: A' is drawn as the layer's first A was, B' = 0. `orthogonal`, `gradient-svd`,
    `weight-svd`: A' has orthonormal rows in those directions, B' = 0. `balanced`: A' and B' are both non-zero, with the
    norms of the old factors, along `directions`."""
    directions: Directions = "orthogonal"
    """Directions of `balanced` factors."""
    retain: float = 0.0
    """Share of the ranks that `balanced` factors give to the leading singular directions of the old s·B A."""
    stagger: Stagger = "none"
    """Extent of one restart: everything, every `turns`-th layer, or one of `turns` parts of every layer's ranks."""
    turns: int = 1
    """Number of restarts after which every part has restarted once."""

    @property
    def basis(self) -> Directions | None:
        """Source of the orthonormal basis that the new factors are taken from; None: the layer's own draw of A."""
        if self.init == "balanced":
            return self.directions
        return None if self.init == "kaiming" else self.init


@dataclass(frozen=True)
class MergedUpdate:
    """Measurements of the update that one layer's restart merged."""

    name: str
    shape: tuple[int, int]
    """Shape (out, in) of the weight."""
    update_norm: float
    """Frobenius norm of the merged s·B A; for balanced factors it includes the product that they started with."""
    weight_norm: float
    """Frobenius norm of W before the merge."""
    effective_rank: float
    """exp(entropy of the normalised singular values) of the merged s·B A (see `effective_rank`)."""
    singular_values: list[float]
    """Singular values of the merged s·B A, descending, one for each rank that restarted."""


@dataclass(frozen=True)
class RestartReport:
    """Result of a restart."""

    cycle: int
    """Number of the cycle that begins."""
    optimizer: Reset
    """Treatment of the factors' optimizer state."""
    layers: list[MergedUpdate]
    """Measurements of every layer that restarted, in model order."""
    moments_cleared: int
    """Number of entries of the factors' moments (m and v counted separately) that were set to zero."""
    seconds: float
    """Duration of the restart."""


def restart(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    how: RestartConfig | None = None,
    *,
    cycle: int,
    loss_of: Callable[[nn.Module], Tensor] | None = None,
) -> RestartReport:
    """Merge the low-rank layers' updates, start `cycle` with new factors and reset the old ones' optimizer state.

    Args:
        how: settings; by default the paper's restart with a true reset: Kaiming A, zero B, zero moments, all layers at
            once.
        cycle: number of the cycle that begins (1 for the first restart); it is part of the key of every draw, and
            decides which part restarts if restarts are staggered.
        loss_of: computes the loss of a batch with the model; required if the directions are the gradient's singular
            vectors.

    Raises:
        NonFinite: a factor, a gradient or an update is not finite. Factors and gradients are checked before the first
            weight changes, each update again before it is merged.
        UserError: pruning or projecting was asked for on moments that are not floating point (8-bit optimizers), or
            the layers cannot restart (DoRA, pissa, gradient-svd); nothing has changed.
        ValueError: directions of the gradient were asked for without `loss_of`.
    """
    started = time.perf_counter()
    config = how or RestartConfig()
    restarting = _restarting_ranks(model, config, cycle)
    for name, (layer, ranks) in restarting.items():
        _check_layer(name, layer, ranks, optimizer, config, cycle)
    bases: dict[str, SingularBasis] = {}
    if config.basis == "gradient-svd":
        if loss_of is None:
            raise ValueError("restart: directions of the gradient need `loss_of`, which makes the loss of a batch")
        bases = gradient_bases(model, {name: layer for name, (layer, _) in restarting.items()}, loss_of, cycle=cycle)
    merged, cleared = [], 0
    for name, (layer, ranks) in restarting.items():
        with whole_factors(layer, optimizer):
            old_factors = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
            merged.append(_merge_and_redraw(name, layer, ranks, config, bases.get(name), cycle))
            cleared += _reset_moments(name, layer, ranks, optimizer, config, old_factors, cycle)
    return RestartReport(cycle, config.optimizer, merged, cleared, time.perf_counter() - started)


def set_initial_directions_(model: nn.Module, how: RestartConfig, loss_of: Callable[[nn.Module], Tensor]) -> None:
    """Give the A of freshly injected layers the directions that restarts will use, with orthonormal rows; B stays zero.

    Nothing changes if `how` draws the factors as the layers do (`kaiming`).

    Args:
        loss_of: computes the loss of a batch with the model; called only for directions of the gradient.
    """
    if how.basis is None:
        return
    layers = low_rank_layers(model)
    config = replace(how, init=how.basis)  # of `balanced` the directions, without the norms of old factors
    bases = gradient_bases(model, layers, loss_of, cycle=0) if config.basis == "gradient-svd" else {}
    for name, layer in layers.items():
        layer.check_restart()
        with whole_factors(layer):
            lora_A, _ = _new_factors(layer, slice(0, layer.r), config, bases.get(name), cycle=0)
            layer.lora_A.data.copy_(lora_A)


def effective_rank(singular_values: Tensor) -> float:
    """Return exp(entropy of the normalised singular values): r for r equal ones, 0 for a zero matrix.

    Source: Roy & Vetterli 2007.
    """
    total = singular_values.sum()
    if total == 0:
        return 0.0
    share = (singular_values / total).clamp_min(torch.finfo(singular_values.dtype).tiny)
    return math.exp(-(share * share.log()).sum().item())


def update_spectrum(layer: LowRankLinear, ranks: slice = slice(None)) -> Tensor:
    """Return the k singular values of s·B A, restricted to k ranks, without forming the product.

    They are those of R_B R_Aᵀ [k, k], where B = Q_B R_B and Aᵀ = Q_A R_A are QR decompositions.
    """
    with torch.no_grad():
        triangle_b = torch.linalg.qr(layer.lora_B[:, ranks], mode="r").R  # [k, k]
        triangle_a = torch.linalg.qr(layer.lora_A[ranks].T, mode="r").R  # [k, k]
        spectrum: Tensor = torch.linalg.svdvals(layer.scaling * (triangle_b @ triangle_a.T))
    return spectrum


def _restarting_ranks(model: nn.Module, config: RestartConfig, cycle: int) -> Mapping[str, tuple[LowRankLinear, slice]]:
    """Return by path the layers that restart when `cycle` begins, each with its ranks that do."""
    layers, turns = low_rank_layers(model), config.turns
    turn = (cycle - 1) % turns
    if config.stagger == "ranks":
        parts = {
            name: (layer, slice(turn * layer.r // turns, (turn + 1) * layer.r // turns))
            for name, layer in layers.items()
        }
        return {name: (layer, ranks) for name, (layer, ranks) in parts.items() if ranks.stop > ranks.start}
    if config.stagger == "layers":
        layers = {name: layer for index, (name, layer) in enumerate(layers.items()) if index % turns == turn}
    return {name: (layer, slice(0, layer.r)) for name, layer in layers.items()}


def _check_layer(
    name: str,
    layer: LowRankLinear,
    ranks: slice,
    optimizer: torch.optim.Optimizer,
    config: RestartConfig,
    cycle: int,
) -> None:
    """Raise if the layer cannot restart so, a factor is not finite, or its optimizer state cannot be reset as asked."""
    layer.check_restart()
    whole = ranks == slice(0, layer.r)
    if not whole and isinstance(layer.scaling, nn.Parameter):
        raise UserError(
            f"{name}: stagger: ranks restarts some ranks, and the trained scale, which returns to its start, belongs "
            "to all of them; use stagger: layers or none, or trainable_scaling=False"
        )
    for kind, factor in layer.factors.items():
        if not torch.isfinite(layer.total(factor)):
            raise NonFinite(f"{name}.{kind} is not finite before the restart into cycle {cycle}; no weight was changed")
        check_reset(optimizer, factor, config.optimizer, whole=whole)


def _merge_and_redraw(
    name: str, layer: LowRankLinear, ranks: slice, config: RestartConfig, basis: SingularBasis | None, cycle: int
) -> MergedUpdate:
    """Merge a layer's old product into its weight, give it new factors, and measure what was merged."""
    spectrum = update_spectrum(layer, ranks).cpu()
    weight_norm = layer.norm(layer.base.exact)
    lora_A, lora_B = _new_factors(layer, ranks, config, basis, cycle)
    update = layer.replace_factors_(lora_A, lora_B, ranks)
    return MergedUpdate(
        name=name,
        shape=(layer.out_features, layer.in_features),
        update_norm=layer.norm(update),
        weight_norm=weight_norm,
        effective_rank=effective_rank(spectrum),
        singular_values=spectrum.tolist(),
    )


@torch.no_grad()
def _new_factors(
    layer: LowRankLinear, ranks: slice, config: RestartConfig, basis: SingularBasis | None, cycle: int
) -> tuple[Tensor, Tensor | None]:
    """Return A' [k, in], and B' [out, k] or None for zero, for k ranks of a layer.

    Args:
        basis: singular vectors of the gradient, for all ranks of the layer; None unless `config` asks for them.
    """
    generator = keyed_generator(layer.seed, "redraw", cycle, layer.name)
    k = ranks.stop - ranks.start
    if config.basis is None:
        return DRAW_A[layer.init]((k, layer.in_features), generator), None
    if config.basis == "orthogonal":
        basis = random_basis(layer, k, generator)
    elif config.basis == "weight-svd":
        weight = layer.base.reorient(layer.base.exact).to(layer.lora_A) + layer.base.reorient(layer.delta())
        basis = leading_basis(layer.whole(weight), layer.r, generator)
    assert basis is not None  # the gradient's is an argument
    u, v = basis
    if u.shape[1] > k:  # a basis for all ranks, of which some restart
        u, v = u[:, ranks], v[:, ranks]
    if config.init != "balanced":
        return v.T, None
    if (retained := int(config.retain * k)) and layer.lora_B.any():
        return _retaining_factors(layer, u, v, retained)
    row_norm_a = layer.lora_A[ranks].norm() / math.sqrt(k)  # root mean square of the old rows' norms
    column_norm_b = layer.lora_B[:, ranks].norm() / math.sqrt(k)
    return row_norm_a * v.T, column_norm_b * u


def _retaining_factors(layer: LowRankLinear, u: Tensor, v: Tensor, retained: int) -> tuple[Tensor, Tensor]:
    """Return A' [r, in] and B' [out, r] with the leading directions of B A, and new ones in place of the others.

    With B A = U S Vᵀ a retained direction i keeps its share of the product, as s_i^(1/2) u_i and s_i^(1/2) v_i. New
    directions get the root of the mean singular value as their norm in both factors.

    Args:
        u, v: orthonormal directions [out, r] and [in, r], of which the first are taken as far as they are new.
        retained: number of directions that stay.
    """
    old_u, values, old_v = factored_svd(layer.lora_A, layer.lora_B)
    norms = values.mean().sqrt().repeat(layer.r)
    norms[:retained] = values[:retained].sqrt()
    old_u, old_v, new = old_u[:, :retained], old_v[:, :retained], layer.r - retained
    new_u = torch.cat([old_u, outside(u[:, :new], old_u)], dim=1)
    new_v = torch.cat([old_v, outside(v[:, :new], old_v)], dim=1)
    return (new_v * norms).T, new_u * norms


def _reset_moments(
    name: str,
    layer: LowRankLinear,
    ranks: slice,
    optimizer: torch.optim.Optimizer,
    config: RestartConfig,
    old_factors: tuple[Tensor, Tensor],
    cycle: int,
) -> int:
    """Reset the optimizer state of all that a layer trains; return the number of entries that were set to zero."""
    old_a, old_b = old_factors
    changes = {
        "lora_A": PartnerChange(old_b.T, layer.lora_B.detach().T, ranks, rank_dim=0),
        "lora_B": PartnerChange(old_a, layer.lora_A.detach(), ranks, rank_dim=1),
    }
    cleared = 0
    for kind, factor in layer.factors.items():
        draw_key = (layer.seed, cycle, f"{name}.{kind}")
        cleared += reset_moments(optimizer, factor, config.optimizer, changes.get(kind), config.keep_ratio, draw_key)
    return cleared
