"""Optimizer state of the factors at a restart, and Adam's update direction.

    zero        m, v and step are cleared; the next update is the first one of a fresh Adam
    random      m and v are zeroed by one mask, except for a random share of the entries; step is kept (the paper's
                pruning)
    magnitude   the same, except for the entries where m is largest
    keep        nothing changes
    project     m and v are carried over into the space of the new factors; step is kept

`project`: lora_B's gradient is s·dW Aᵀ. With T = (A Aᵀ)⁻¹ A A'ᵀ [r, r'], its first moment for the new A' is m T, to the
extent that the old A's rows contain dW. The second moment belongs to single entries and must not be rotated like a
vector (it would become negative): it is v (T∘T), which is exact for entries that vary independently, and for the part
of A' outside the old A's rows it is the mean level of the row of v. lora_A's gradient is s·Bᵀ dW, so the same holds
with B in the place of A; beside a zero B or B' there is no T, and lora_A's state is cleared. Muon has no v.

The paper is Lialin et al. 2023, arXiv 2307.05695, section 3.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from relora.errors import UserError
from relora.lowrank.directions import in_float64
from relora.seeding import keyed_generator

Reset = Literal["zero", "random", "magnitude", "keep", "project"]


@dataclass(frozen=True)
class PartnerChange:
    """The restart as one factor's moments see it: which ranks restart, and the other factor of the product (partner).

    lora_A is the partner of lora_B, and lora_B the partner of lora_A.
    """

    before: Tensor
    """The partner before the restart, ranks as rows [r, n]: lora_A for lora_B, lora_Bᵀ for lora_A."""
    after: Tensor
    """The partner after the restart, in the same form."""
    ranks: slice
    """The ranks that restart."""
    rank_dim: int
    """Dimension of the factor (not the partner) that counts ranks: 0 for lora_A, 1 for lora_B."""

    @property
    def index(self) -> tuple[slice | EllipsisType, ...]:
        """Index of the factor's entries that restart."""
        return (self.ranks, ...) if self.rank_dim == 0 else (..., self.ranks)


def moments_of(optimizer: torch.optim.Optimizer, factor: nn.Parameter) -> list[Tensor]:
    """Return the tensors that the optimizer keeps per entry of a factor; an empty list before its first step."""
    state = optimizer.state.get(factor, {})
    tensors = [value for key, value in state.items() if key != "step" and torch.is_tensor(value)]
    return [tensor for tensor in tensors if tensor.shape == factor.shape]


def adam_direction(state: Mapping[str, Any], betas: tuple[float, float], eps: float) -> Tensor:
    """Compute Adam's update in units of the learning rate, m̂ / (√v̂ + ε), from the present moments, in their shape.

    A moment starts at zero; m̂ = m / (1 - beta^step) corrects for that (Kingma & Ba 2015, arXiv 1412.6980, section 3).
    1 - beta^step is computed by expm1, so that fp32 keeps its last digits.

    Args:
        state: the optimizer's state of one parameter: `step`, `exp_avg` and `exp_avg_sq`.
    """

    def corrected(moment: Tensor, beta: float) -> Tensor:
        log_beta = math.log(beta) if beta else -math.inf
        steps = torch.as_tensor(state["step"], dtype=torch.float32)
        return moment / -torch.expm1(steps * log_beta).to(moment.device)

    mean, square = corrected(state["exp_avg"], betas[0]), corrected(state["exp_avg_sq"], betas[1])
    return mean / (square.sqrt() + eps)


def check_reset(optimizer: torch.optim.Optimizer, factor: nn.Parameter, reset: Reset, *, whole: bool) -> None:
    """Raise `UserError` if a reset changes moments in place and they are codes of an 8-bit optimizer, not numbers.

    Args:
        whole: all ranks of the layer restart; `zero` then drops the state and changes nothing in place.
    """
    in_place = reset in ("random", "magnitude", "project") or (reset == "zero" and not whole)
    if in_place and not all(moment.is_floating_point() for moment in moments_of(optimizer, factor)):
        raise UserError(f"restart.optimizer: {reset} needs floating-point moments; use `zero` with this optimizer")


def reset_moments(
    optimizer: torch.optim.Optimizer,
    factor: nn.Parameter,
    reset: Reset,
    change: PartnerChange | None,
    keep_ratio: float,
    draw_key: tuple[int, int, str],
) -> int:
    """Reset one factor's optimizer state.

    Args:
        change: the restart of lora_A or lora_B; None for a trained scale, which restarts as a whole and has no partner.
        keep_ratio: share of the entries that `random` and `magnitude` keep.
        draw_key: (seed, cycle, name), key of the mask of `random`.

    Returns:
        The number of moment entries that were set to zero.
    """
    moments = moments_of(optimizer, factor)
    if reset == "keep" or not moments:
        return 0
    index = change.index if change else (...,)
    entries = moments[0][index].numel()
    if reset == "project" and change and change.after.any() and change.before.any():
        _project(moments, change)
        return 0
    if reset in ("random", "magnitude"):
        keep = _kept_entries(moments[0][index], reset, keep_ratio, draw_key)
        for moment in moments:  # one mask for all: where m is kept and v is zero, the update would be divided by eps
            moment[index] *= keep
        return int((~keep).sum().item()) * len(moments)
    if change is None or entries == factor.numel():
        # Dropping the state is right for every optimizer: it starts anew in the next step, with m = v = step = 0.
        # Zeroing the tensors in place is not right: a zero code of an 8-bit moment does not stand for the value zero.
        del optimizer.state[factor]
        return entries * len(moments)
    _clear_ranks(moments, change)
    return entries


def _clear_ranks(moments: list[Tensor], change: PartnerChange) -> None:
    """Set m of the restarted ranks to zero, and their v, where there is one, to the mean over the other ranks.

    All ranks share one step count, so bias correction would not make up for v = 0, and the next updates would be too
    long.
    """
    first, *seconds = moments
    first.movedim(change.rank_dim, 0)[change.ranks] = 0
    for second in seconds:
        others = torch.ones(second.shape[change.rank_dim], dtype=torch.bool, device=second.device)
        others[change.ranks] = False
        second.movedim(change.rank_dim, 0)[change.ranks] = second.movedim(change.rank_dim, 0)[others].mean(0)


def _project(moments: list[Tensor], change: PartnerChange) -> None:
    """Carry m and v over from the space of the old partner into that of the new one, in place."""
    before, after = in_float64(change.before), in_float64(change.after)  # [r, n], [r', n]
    transform = after @ torch.linalg.pinv(before)  # Tᵀ [r', r]: the new rows as combinations of the old
    outside = (after - transform @ before).square().sum(1) / before.square().sum(1).mean()  # of each new row [r']
    first, *seconds = (in_float64(moment.movedim(change.rank_dim, 0)) for moment in moments)  # [r, m]
    new_moments = [transform @ first]
    new_moments += [transform.square() @ second + outside[:, None] * second.mean(0) for second in seconds]
    for moment, new in zip(moments, new_moments, strict=True):
        moment.copy_(new.movedim(0, change.rank_dim))


def _kept_entries(first_moment: Tensor, reset: Reset, keep_ratio: float, draw_key: tuple[int, int, str]) -> Tensor:
    """Return the mask of the entries that pruning keeps: a keyed random share, or the largest by magnitude."""
    if reset == "random":
        seed, cycle, name = draw_key
        uniform = torch.rand(first_moment.shape, generator=keyed_generator(seed, "prune", cycle, name))
        return (uniform < keep_ratio).to(first_moment.device)
    keep = torch.zeros(first_moment.numel(), dtype=torch.bool, device=first_moment.device)
    largest = first_moment.abs().flatten().topk(math.ceil(keep_ratio * first_moment.numel())).indices
    keep[largest] = True
    return keep.view(first_moment.shape)
