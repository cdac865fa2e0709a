"""Full weights whose momentum is kept in a subspace and orthogonalized there: SUMO and GUM.

G [m, n] is the gradient of a matrix laid so that m <= n, and Q [m, r] the leading left singular vectors of the gradient
at the last renewal, one every `every_steps` steps (200 in GaLore, whose subspace this is).

SUMO (Refael et al. 2025, arXiv 2505.24749), polar(M) = U Vᵀ of M = U S Vᵀ, exact:

    at a renewal      M <- (Q_newᵀ Q_old) M
    at every step     M <- μ M + Qᵀ G,    W <- W - η Q polar(M)

GUM (Pan et al. 2025, arXiv 2510.17802): a period's update is that of the subspace, or with probability
q that of its complement, so that both together are without bias; the momentum begins anew with the period:

    with 1 - q        M <- μ M + Qᵀ G / (1 - q),          W <- W - η Q polar(M)
    with q            M <- μ M + (G - Q Qᵀ G) / q,        W <- W - η polar(M)

Deviations: η is scaled by 0.2 sqrt(n) as in torch's Muon (Liu et al. 2025, arXiv 2502.16982), so that rates mean about
the same in all of them. SUMO's limiter of the norm's growth is left out: |polar(M)| is sqrt(r), always. GUM's
polar factor is exact where the paper iterates Newton-Schulz. Its factors 1/q and 1/(1-q) do not change a polar factor.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from relora.train.muon import RMS, polar_factors

from .beside import BesideAdamW


class Sumo(BesideAdamW):
    """SUMO for the groups of the method. State: M [r, n] and Q [m, r]."""

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, r: int, every_steps: int, momentum: float = 0.95, **options: Any
    ) -> None:
        """Build the optimizer; `options` are those of AdamW."""
        super().__init__(groups, **options)
        self.r, self.every_steps, self.momentum = r, every_steps, momentum

    def update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        """Move a matrix along the polar factor of its momentum."""
        gradient, state = wide(parameter.grad), self.state[parameter]
        if state.get("steps", 0) % self.every_steps == 0:
            self.renew(state, gradient)
        state["steps"] = state.get("steps", 0) + 1
        wide(parameter).sub_(self.direction(state, gradient), alpha=group["lr"] * RMS * gradient.shape[1] ** 0.5)

    def renew(self, state: dict[str, Any], gradient: Tensor) -> None:
        """Choose a new subspace, and carry the momentum into it."""
        basis = leading_directions(gradient, self.r)
        if "basis" in state:
            state["momentum"] = basis.T @ state["basis"] @ state["momentum"]
        else:
            state["momentum"] = gradient.new_zeros(self.r, gradient.shape[1])
        state["basis"] = basis

    def direction(self, state: dict[str, Any], gradient: Tensor) -> Tensor:
        """Add a gradient to the momentum and return its polar factor in the whole space [m, n]."""
        basis: Tensor = state["basis"]
        state["momentum"].mul_(self.momentum).add_(basis.T @ gradient)
        return basis @ polar_factors(state["momentum"][None])[0]


class Gum(Sumo):
    """GUM for the groups of the method. State: Q [m, r], and M [r, n] or, in the complement, [m, n]."""

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, share: float, generator: torch.Generator, **options: Any
    ) -> None:
        """Build the optimizer; `share` is q, the share of the matrices that move in their complement."""
        super().__init__(groups, **options)
        self.share, self.generator = share, generator

    def renew(self, state: dict[str, Any], gradient: Tensor) -> None:
        """Choose a new subspace, and whether the period is one of its complement."""
        state["basis"] = leading_directions(gradient, self.r)
        state["complement"] = torch.rand((), generator=self.generator).item() < self.share
        rows = len(gradient) if state["complement"] else self.r
        state["momentum"] = gradient.new_zeros(rows, gradient.shape[1])

    def direction(self, state: dict[str, Any], gradient: Tensor) -> Tensor:
        """Add the period's part of a gradient to the momentum and return its polar factor [m, n]."""
        basis: Tensor = state["basis"]
        if not state["complement"]:
            state["momentum"].mul_(self.momentum).add_(basis.T @ gradient, alpha=1 / (1 - self.share))
            return basis @ polar_factors(state["momentum"][None])[0]
        rest = gradient - basis @ (basis.T @ gradient)
        state["momentum"].mul_(self.momentum).add_(rest, alpha=1 / self.share)
        polar = polar_factors(state["momentum"][None])[0]
        return polar - basis @ (basis.T @ polar)  # rounding errors in the subspace are directions to a polar factor


def wide(matrix: Tensor | None) -> Tensor:
    """Return a view of a matrix whose first side is the smaller one."""
    assert matrix is not None
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def leading_directions(gradient: Tensor, r: int) -> Tensor:
    """Return the r leading left singular vectors [m, r] of a gradient."""
    u, _, _ = torch.linalg.svd(gradient, full_matrices=False)
    return u[:, :r].clone(memory_format=torch.contiguous_format)
