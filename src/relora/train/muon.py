"""Muon for the factors and for full-rank matrices, beside AdamW for everything else, in one optimizer.

    m <- μ m + (1 - μ) g                          momentum, half of AdamW's state
    u  = μ m + (1 - μ) g                          Nesterov's look ahead
    o  = polar(u)                                 [r, n], for a factor with r ranks and n features
    v <- β v + (1 - β) mean over ranks of o²      [n]
    p <- p - η · 0.2 sqrt(n) · o / sqrt(v)        scaled back to the norm that o had

The polar factor U Vᵀ of u = U S Vᵀ has all its singular values at 1: every direction of the momentum moves equally far,
where AdamW moves every entry equally far (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon). The factor
0.2 sqrt(n) gives the update of every shape the root mean square 0.2, which is that of AdamW's updates in practice, so
that a learning rate holds across widths, ranks and both optimizers (Liu et al. 2025, arXiv 2502.16982, section 2.2).
The polar factor still moves some features much farther than others; v evens that out, as NorMuon does for the neurons
of a full-rank matrix (Li et al. 2025, arXiv 2510.05491).

A factor has r rows or columns, so its polar factor is exact and cheap: (u uᵀ)^(-1/2) u, with an eigendecomposition of
order r. For full-rank matrices torch's own Muon is used, whose Newton-Schulz iteration in bf16 gets singular values
between 0.7 and 1.2 and needs products only; it has no v.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor, nn

from relora.lowrank.directions import in_float64
from relora.lowrank.division import part_of, whole_shape

Rule = Literal["adamw", "muon", "muon-exact"]
"""Update rule of a parameter group: AdamW, torch's Muon, or Muon with the exact polar factor (for factors)."""

RMS = 0.2
"""Root mean square of an update's entries, in units of the learning rate."""
_ZERO_SINGULAR_VALUE = 1e-6
"""Singular values below this share of the largest are rounding errors of fp32; their directions do not move."""

_SQUARE_DECAY = 0.95
"""Decay β of the features' mean squares."""
_ENTRIES_AT_A_TIME = 2**20
"""Size of the factors of one shape whose polar factors are computed together: few calls, and few bytes."""


class AdamWWithMuon(torch.optim.AdamW):
    """AdamW in whose parameter groups the entry `rule` may ask for Muon.

    State of a parameter under Muon: `momentum_buffer`, of its shape, and for a factor `feature_squares` [n]. A flag
    `found_inf` on the optimizer, as the fused kernels of AdamW read it, withholds the update of every group alike.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        betas: tuple[float, float],
        eps: float,
        momentum: float,
    ) -> None:
        """Build the optimizer.

        Args:
            groups: parameter groups with the entries `params`, `lr`, `weight_decay` and `rule`. Parameters of groups
                under Muon are matrices.
            momentum: μ of Muon.
        """
        groups = list(groups)
        super().__init__(groups, betas=betas, eps=eps, fused=True)
        self.momentum = momentum
        matrices = [parameter for group in groups if group["rule"] == "muon" for parameter in group["params"]]
        self._muon = None
        if matrices:
            self._muon = torch.optim.Muon(matrices, weight_decay=0.0, momentum=momentum, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, by the rule of its group."""
        with self._groups_of("adamw"):
            loss = super().step(closure)
        found_inf = getattr(self, "found_inf", None)
        for group in self.param_groups:
            if group["rule"] == "muon-exact":
                self._exact_step(group, found_inf)
        if self._muon is not None and not (found_inf is not None and found_inf.item()):
            self._matrix_step(self._muon)
        return loss

    def _matrix_step(self, muon: torch.optim.Muon) -> None:
        """Update the full-rank matrices by torch's Muon; one that is divided among processes is brought together."""
        groups = [muon.defaults | _own(group) for group in self.param_groups if group["rule"] == "muon"]
        whole = [group | {"params": [p for p in group["params"] if part_of(p) is None]} for group in groups]
        muon.state, muon.param_groups = self.state, [group for group in whole if group["params"]]
        muon.step()  # type: ignore[no-untyped-call]
        for group in groups:
            for parameter in group["params"]:
                if (part := part_of(parameter)) is None or parameter.grad is None:
                    continue
                change, state = nn.Parameter(parameter.new_zeros(whole_shape(parameter))), self.state[parameter]
                change.grad = part.gathered(parameter.grad)
                kept = {key: part.gathered(tensor) for key, tensor in state.items()}
                muon.state, muon.param_groups = defaultdict(dict, {change: kept}), [group | {"params": [change]}]
                muon.step()  # type: ignore[no-untyped-call]
                state.update({key: part.own(tensor) for key, tensor in muon.state[change].items()})
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(part.own(change.detach()))

    @contextmanager
    def _groups_of(self, rule: Rule) -> Iterator[None]:
        """Hide all parameter groups except those of one rule."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if group["rule"] == rule]
        try:
            yield
        finally:
            self.param_groups = groups

    def _exact_step(self, group: dict[str, Any], found_inf: Tensor | None) -> None:
        """Update the factors of one group, those of one shape together."""
        updated = sorted((p for p in group["params"] if p.grad is not None), key=_wide_shape)
        for shape, same in groupby(updated, key=_wide_shape):
            of_shape, at_a_time = list(same), max(1, _ENTRIES_AT_A_TIME // (shape[0] * shape[1]))
            for first in range(0, len(of_shape), at_a_time):
                parameters = of_shape[first : first + at_a_time]
                updates = torch.stack([self._look_ahead(parameter, found_inf) for parameter in parameters])
                for parameter, polar in zip(parameters, polar_factors(updates), strict=True):
                    change = self._evened(parameter, polar, found_inf).mul_(-group["lr"] * RMS * shape[1] ** 0.5)
                    change = change.T if _is_tall(parameter) else change
                    if (part := part_of(parameter)) is not None:
                        change = part.own(change)
                    if group["weight_decay"]:
                        change.add_(parameter, alpha=-group["lr"] * group["weight_decay"])
                    if found_inf is not None:
                        change.masked_fill_(found_inf > 0, 0.0)
                    parameter.add_(change)

    def _look_ahead(self, parameter: nn.Parameter, found_inf: Tensor | None) -> Tensor:
        """Move a factor's momentum towards its gradient, and return Nesterov's combination of the two, ranks as rows.

        Of a factor that is divided among processes every one gets the whole.
        """
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if found_inf is not None:  # what is not finite has no polar factor
            gradient = gradient.masked_fill(found_inf > 0, 0.0)
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        moved = buffer.lerp(gradient, 1 - self.momentum)
        buffer.copy_(moved if found_inf is None else torch.where(found_inf > 0, buffer, moved))
        ahead, part = gradient.lerp(buffer, self.momentum), part_of(parameter)
        ahead = ahead if part is None else part.gathered(ahead)
        return ahead.T if _is_tall(parameter) else ahead

    def _evened(self, parameter: nn.Parameter, polar: Tensor, found_inf: Tensor | None) -> Tensor:
        """Divide the polar factor [r, n] of a factor by the root mean squares of its features, and keep its norm."""
        squares, state = polar.square().mean(0), self.state[parameter]
        before: Tensor = state.get("feature_squares", torch.zeros_like(squares))
        moved = torch.where(before > 0, before.lerp(squares, 1 - _SQUARE_DECAY), squares)  # begins at the first one
        state["feature_squares"] = moved if found_inf is None else torch.where(found_inf > 0, before, moved)
        tiny = torch.finfo(polar.dtype).tiny
        evened: Tensor = polar * state["feature_squares"].clamp_min(tiny).rsqrt()
        return evened.mul_(polar.norm() / evened.norm().clamp_min(tiny))


def polar_factors(matrices: Tensor) -> Tensor:
    """Return the polar factor U Vᵀ of each matrix U S Vᵀ; directions whose singular value is zero stay zero.

    All is computed in float64, so that singular values down to a millionth of the largest keep their directions. On a
    GPU the eigendecomposition makes the host wait.

    Args:
        matrices: [k, r, n] with r <= n; the price is O(r² n + r³) for each.
    """
    exact = in_float64(matrices)
    values, vectors = torch.linalg.eigh(exact @ exact.mT)  # [k, r], [k, r, r]
    smallest = (_ZERO_SINGULAR_VALUE**2 * values[:, -1:]).clamp_min(torch.finfo(values.dtype).tiny)
    scales = values.clamp_min(smallest).rsqrt().where(values > smallest, 0.0)
    roots = (vectors * scales[:, None, :]) @ vectors.mT  # (M Mᵀ)^(-1/2) [k, r, r]
    polar: Tensor = (roots @ exact).to(matrices)
    return polar


def _is_tall(parameter: Tensor) -> bool:
    """Whether the whole of a factor has more rows than columns."""
    rows, columns = whole_shape(parameter)
    return rows > columns


def _wide_shape(parameter: Tensor) -> tuple[int, int]:
    """Return the sides of the whole of a factor, the smaller one first."""
    small, large = sorted(whole_shape(parameter))
    return small, large


def _own(group: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a parameter group that torch's Muon shares with it; the others keep Muon's defaults."""
    return {key: group[key] for key in ("params", "lr", "weight_decay")}
