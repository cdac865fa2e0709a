"""What becomes of the factors' optimizer state when the factors begin anew.

    zero        m, v and step forgotten; the next update is Adam's first
    random      all but a random share of the entries of m and v zeroed by one mask; step kept (the paper's pruning)
    magnitude   likewise, the largest entries of m stay
    keep        nothing is touched
    project     m and v carried over into the new factors' space; step kept

Projecting: lora_B's gradient is s·dW Aᵀ, so with T = (A Aᵀ)⁻¹ A A'ᵀ [r, r'] its first moment beside the new A' is m T,
as far as the old A saw dW. The second moment is that of single entries and must not be rotated like a vector (it would
turn negative): v (T∘T), as for entries that move independently, and for the share of A' that the old A did not see
the row's mean level. lora_A's gradient is s·Bᵀ dW, so the same with B; beside B' = 0 it is forgotten.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from relora.errors import UserError
from relora.seeding import keyed_generator

Reset = Literal["zero", "random", "magnitude", "keep", "project"]


@dataclass(frozen=True)
class Change:
    """Of one factor: what its partner was and is, and which of the ranks begin anew."""

    before: Tensor
    """The partner with ranks as rows [r, n]: lora_A beside lora_B, lora_Bᵀ beside lora_A."""
    after: Tensor
    ranks: slice
    along: int
    """The factor's dimension that counts ranks."""

    @property
    def index(self) -> tuple[slice | EllipsisType, ...]:
        """Of the factor's entries that begin anew."""
        return (self.ranks, ...) if self.along == 0 else (..., self.ranks)


def moments_of(optimizer: torch.optim.Optimizer, factor: nn.Parameter) -> list[Tensor]:
    """What the optimizer keeps of a factor, entry by entry: none before its first step."""
    state = optimizer.state.get(factor, {})
    tensors = [value for key, value in state.items() if key != "step" and torch.is_tensor(value)]
    return [tensor for tensor in tensors if tensor.shape == factor.shape]


def adam_direction(state: Mapping[str, Any], betas: tuple[float, float], eps: float) -> Tensor:
    """Adam's update in units of the learning rate, m̂ / (√v̂ + ε), of the moments as they are; in the tensor's shape.

    A moment begins at zero; m̂ = m / (1 - beta^step) takes that share out (Kingma & Ba 2015, arXiv 1412.6980,
    section 3), by expm1 so that fp32 keeps its last digits.
    """

    def corrected(moment: Tensor, beta: float) -> Tensor:
        steps = torch.as_tensor(state["step"], dtype=torch.float32)
        return moment / -torch.expm1(steps * (math.log(beta) if beta else -math.inf)).to(moment.device)

    mean, square = corrected(state["exp_avg"], betas[0]), corrected(state["exp_avg_sq"], betas[1])
    return mean / (square.sqrt() + eps)


def check_reset(optimizer: torch.optim.Optimizer, factor: nn.Parameter, reset: Reset, *, whole: bool) -> None:
    """`UserError` where the optimizer's state cannot be treated so: pruning and projecting need numbers, not codes."""
    in_place = reset in ("random", "magnitude", "project") or (reset == "zero" and not whole)
    if in_place and not all(moment.is_floating_point() for moment in moments_of(optimizer, factor)):
        raise UserError(f"restart.optimizer: {reset} needs floating-point moments; use `zero` with this optimizer")


def reset_moments(
    optimizer: torch.optim.Optimizer,
    factor: nn.Parameter,
    reset: Reset,
    change: Change | None,
    keep_ratio: float,
    draw: tuple[int, int, str],
) -> int:
    """Treat one factor's optimizer state; returns how many moment entries went to zero.

    Args:
        change: of lora_A and lora_B; None for a scale, which begins anew as a whole and has no space to project into.
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
        keep = _kept_entries(moments[0][index], reset, keep_ratio, draw)
        for moment in moments:  # one mask for all: m kept where v is gone would be divided by eps
            moment[index] *= keep
        return int((~keep).sum().item()) * len(moments)
    if change is None or entries == factor.numel():
        # Forgetting the state is the one reset that is right for every optimizer: it starts anew at the next step, with
        # m = v = step = 0. Zeroing in place is not: a zero code of an 8-bit moment is not a zero value.
        del optimizer.state[factor]
        return entries * len(moments)
    _forget_part(moments, change)
    return entries


def _forget_part(moments: list[Tensor], change: Change) -> None:
    """m zero, v the mean of the other ranks': with the step they share, v = 0 would make the next updates too long."""
    first, second = moments
    others = torch.ones(second.shape[change.along], dtype=torch.bool, device=second.device)
    others[change.ranks] = False
    mean = second.movedim(change.along, 0)[others].mean(0)
    first.movedim(change.along, 0)[change.ranks] = 0
    second.movedim(change.along, 0)[change.ranks] = mean


def _project(moments: list[Tensor], change: Change) -> None:
    """Carry m and v over into the space of the new partner."""
    before, after = change.before.double(), change.after.double()  # [r, n], [r', n]
    seen = after @ torch.linalg.pinv(before)  # Tᵀ [r', r]: the new rows in terms of the old
    unseen = (after - seen @ before).square().sum(1) / before.square().sum(1).mean()  # of each new row [r']
    first, second = (moment.movedim(change.along, 0).double() for moment in moments)  # [r, m]
    carried = seen @ first, seen.square() @ second + unseen[:, None] * second.mean(0)
    for moment, new in zip(moments, carried, strict=True):
        moment.copy_(new.movedim(0, change.along))


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
