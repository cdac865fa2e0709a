"""Muon for the factors and for full-rank matrices, beside AdamW for everything else, in one optimizer.

    m <- μ m + (1 - μ) g                    momentum, the only state: half of AdamW's
    u  = μ m + (1 - μ) g                    Nesterov's look ahead
    p <- p - η · 0.2 sqrt(max(p.shape)) · polar(u)

The polar factor U Vᵀ of u = U S Vᵀ has all its singular values at 1: every direction of the momentum moves equally far,
where AdamW moves every entry equally far (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon). The factor
0.2 sqrt(max(p.shape)) gives the update of every shape the root mean square 0.2, which is that of AdamW's updates in
practice, so that a learning rate holds across widths, ranks and both optimizers (Liu et al. 2025, arXiv 2502.16982,
section 2.2).

A factor has r rows or columns, so its polar factor is exact and cheap: (u uᵀ)^(-1/2) u, with an eigendecomposition of
order r. For full-rank matrices torch's own Muon is used, whose Newton-Schulz iteration in bf16 gets singular values
between 0.7 and 1.2 and needs products only.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor, nn

Rule = Literal["adamw", "muon", "muon-exact"]
"""Update rule of a parameter group: AdamW, torch's Muon, or Muon with the exact polar factor (for factors)."""

RMS = 0.2
"""Root mean square of an update's entries, in units of the learning rate."""
_ZERO_SINGULAR_VALUE = 1e-6
"""Singular values below this share of the largest are rounding errors of fp32; their directions do not move."""


class AdamWWithMuon(torch.optim.AdamW):
    """AdamW in whose parameter groups the entry `rule` may ask for Muon.

    State of a parameter under Muon: `momentum_buffer`, of its shape. A flag `found_inf` on the optimizer, as the fused
    kernels of AdamW read it, withholds the update of every group alike.
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
            defaults = self._muon.defaults
            self._muon.state = self.state
            self._muon.param_groups = [defaults | _own(g) for g in self.param_groups if g["rule"] == "muon"]
            self._muon.step()  # type: ignore[no-untyped-call]
        return loss

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
        """Update the factors of one group, all of one rank together."""
        updated = [parameter for parameter in group["params"] if parameter.grad is not None]
        updates = [self._look_ahead(parameter, found_inf) for parameter in updated]
        by_rank = sorted(range(len(updated)), key=lambda index: min(updated[index].shape))
        for _, members in groupby(by_rank, key=lambda index: min(updated[index].shape)):
            indices = list(members)
            for index, polar in zip(indices, polar_factors([updates[i] for i in indices]), strict=True):
                parameter = updated[index]
                change = polar.mul_(-group["lr"] * RMS * max(parameter.shape) ** 0.5)
                if group["weight_decay"]:
                    change.add_(parameter, alpha=-group["lr"] * group["weight_decay"])
                if found_inf is not None:
                    change.masked_fill_(found_inf > 0, 0.0)
                parameter.add_(change)

    def _look_ahead(self, parameter: nn.Parameter, found_inf: Tensor | None) -> Tensor:
        """Move a parameter's momentum towards its gradient, and return Nesterov's combination of the two."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if found_inf is not None:  # what is not finite has no polar factor
            gradient = gradient.masked_fill(found_inf > 0, 0.0)
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        moved = buffer.lerp(gradient, 1 - self.momentum)
        buffer.copy_(moved if found_inf is None else torch.where(found_inf > 0, buffer, moved))
        return gradient.lerp(buffer, self.momentum)


def polar_factors(matrices: list[Tensor]) -> list[Tensor]:
    """Return the polar factor U Vᵀ of each matrix U S Vᵀ; directions whose singular value is zero stay zero.

    All is computed in float64, so that singular values down to a millionth of the largest keep
    their directions. On a GPU the eigendecomposition makes the host wait.

    Args:
        matrices: of any shapes whose smaller sides are equal, r; the price is O(r² · larger side + r³) for each.
    """
    wide = [matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T for matrix in matrices]  # [r, n]
    exact = [matrix.to("cpu" if matrix.device.type == "mps" else matrix.device, torch.float64) for matrix in wide]
    values, vectors = torch.linalg.eigh(torch.stack([matrix @ matrix.T for matrix in exact]))  # [k, r], [k, r, r]
    smallest = (_ZERO_SINGULAR_VALUE**2 * values[:, -1:]).clamp_min(torch.finfo(values.dtype).tiny)
    scales = values.clamp_min(smallest).rsqrt().where(values > smallest, 0.0)
    roots = (vectors * scales[:, None, :]) @ vectors.mT  # (M Mᵀ)^(-1/2) [k, r, r]
    polar = [(root @ matrix).to(matrices[0]) for root, matrix in zip(roots, exact, strict=True)]
    return [p if p.shape == matrix.shape else p.T for p, matrix in zip(polar, matrices, strict=True)]


def _own(group: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a parameter group that torch's Muon shares with it; the others keep Muon's defaults."""
    return {key: group[key] for key in ("params", "lr", "weight_decay")}
