"""One adapter out of several, or out of what a full training changed.

    linear        A = Σ √(w s) A_i, B = Σ √(w s) B_i: cheap, but B A has products across adapters
    cat           A = [w s A_i; ...], B = [B_i, ...]: the weighted sum itself, at the sum of the ranks
    svd           the nearest of rank r to the weighted sum (Eckart and Young 1936)
    ties          of each adapter the `density` largest numbers; in every place the sign of their sum, and the mean of
                  the weighted numbers of that sign (Yadav et al. 2023, arXiv 2306.01708, section 4)
    dare_linear   of each adapter a random `density` of the numbers over `density`, then the weighted sum
    dare_ties     the same, then sign and mean as above (Yu et al. 2023, arXiv 2311.03099, sections 3 and 4.3)

`ties` and `dare` work on A and B, as `linear` does, or with `_svd` on s B A itself, where the papers define them, and
then keep rank r. Definitions and names are those of PEFT's `add_weighted_adapter`; numbers are pruned tensor by tensor,
and drawn by key (`relora.seeding`), so that the same seed gives the same adapter. All in fp32 or better.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

from relora.adapters.contents import Summary, _summary
from relora.adapters.peft_format import Adapter, Factors, read_adapter, write_adapter
from relora.errors import UserError
from relora.seeding import keyed_generator

METHODS = (
    "linear",
    "cat",
    "svd",
    *(f"{kind}{end}" for kind in ("ties", "dare_linear", "dare_ties") for end in ("", "_svd")),
)

_EXACT_SIDE = 1024
"""Below it the full decomposition of a matrix costs less than a second."""
_OVERSAMPLING, _ITERATIONS = 16, 8
"""Of the randomized decomposition: singular values agree to about 1e-4 on slowly falling spectra."""


@dataclass(frozen=True)
class _Mixing:
    """How one layer is combined."""

    density: float
    """Share of the numbers that is kept."""
    random: bool
    """Which are kept: at random, then scaled up; else the largest."""
    elect: bool
    """One sign for every place."""
    seed: int

    def __call__(self, tensors: Mapping[int, Tensor], weights: Mapping[int, float], *key: str) -> Tensor:
        """One tensor of those of the adapters, by their number."""
        kept = torch.stack([self._pruned(tensor, number, *key) for number, tensor in tensors.items()])
        by_adapter = kept.new_tensor([weights[number] for number in tensors]).view(-1, *[1] * (kept.dim() - 1))
        if not self.elect:
            return (kept * by_adapter).sum(0)
        sign = torch.where(kept.sum(0) >= 0, 1.0, -1.0)
        agrees = kept.sign() == sign
        return (kept * by_adapter * agrees).sum(0) / agrees.sum(0).clamp(min=1)

    def _pruned(self, tensor: Tensor, number: int, *key: str) -> Tensor:
        if self.density == 1:
            return tensor
        if self.random:
            generator = keyed_generator(self.seed, "dare", number, *key)
            drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float32)
            return tensor * (drawn < self.density) / self.density
        flat = tensor.flatten()
        kept = flat.abs().topk(int(self.density * flat.numel())).indices
        return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).view_as(tensor)


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    method: str = "svd",
    *,
    r: int | None = None,
    density: float | None = None,
    seed: int = 0,
) -> Adapter:
    """One LoRA adapter (scaling 1) of several for the same base.

    Args:
        weights: one for each adapter, of any sign; by default 1 over their number.
        method: see the module.
        r: of `svd` and its kin; by default the largest of the adapters.
        density: of `ties` and `dare`, above 0 and at most 1.
        seed: keys the draws of `dare`.

    Raises:
        UserError: adapters that do not fit each other, DoRA, whole modules, or settings that do not fit the method.
    """
    weights = [1 / len(adapters) for _ in adapters] if weights is None else weights
    _check(adapters, weights, method, r, density)
    kind = method.removesuffix("_svd")
    mixing = _Mixing(density or 1.0, kind.startswith("dare"), kind.endswith("ties"), seed)
    layers = {}
    for path in dict.fromkeys(path for adapter in adapters for path in adapter.layers):
        found = {number: adapter.layers[path] for number, adapter in enumerate(adapters) if path in adapter.layers}
        if len({factors.shape for factors in found.values()}) > 1:
            raise UserError(f"{path} is of another size in another adapter; they were made for different base models")
        given = {number: weights[number] for number in found}
        rank = r or max(factors.r for factors in found.values())
        layers[path] = _combined(path, found, given, method, mixing, rank)
    bases = {adapter.base for adapter in adapters}
    targets = {name for adapter in adapters for name in adapter.targets}
    return Adapter(
        layers=layers,
        base=adapters[0].base if len(bases) == 1 else None,
        targets=tuple(sorted(targets)) if all(adapter.targets for adapter in adapters) else (),
        fan_in_fan_out=adapters[0].fan_in_fan_out,
        task_type=adapters[0].task_type,
    )


def low_rank_of(difference: Tensor, r: int, generator: Generator) -> tuple[Factors, float]:
    """The update of rank r nearest to a difference of weights [out, in], and the share of its energy that it keeps.

    Energy is the sum of the squares; both factors get the root of the singular values.
    """
    u, s, v = truncated_svd(difference, r, generator)
    root = s.sqrt()
    kept, energy = (tensor.double().square().sum().item() for tensor in (s, difference))
    return Factors((v * root).T.contiguous(), u * root, 1.0), (kept / energy if energy else 1.0)


def truncated_svd(matrix: Tensor, r: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """U [out, r], s [r], V [in, r] of the r largest singular values, in the matrix's precision.

    Exact where the matrix is small or r is not; else by subspace iteration on a keyed draw (Halko, Martinsson and Tropp
    2011, arXiv 0909.4061, algorithms 4.4 and 5.1).
    """
    width = r + _OVERSAMPLING
    if min(matrix.shape) <= max(_EXACT_SIDE, 4 * width):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :r], s[:r], vh[:r].T
    basis = torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(matrix.T @ torch.linalg.qr(matrix @ basis).Q).Q  # [in, width]
    u, s, vh = torch.linalg.svd(matrix @ basis, full_matrices=False)
    return u[:, :r], s[:r], basis @ vh[:r].T


def _combined(
    path: str, found: Mapping[int, Factors], weights: Mapping[int, float], method: str, mixing: _Mixing, r: int
) -> Factors:
    """One layer of those adapters that have it."""
    scaled = {number: weights[number] * factors.scaling for number, factors in found.items()}
    dtype = torch.float32
    for factors in found.values():
        dtype = torch.promote_types(dtype, factors.lora_A.dtype)
    a = {number: factors.lora_A.to(dtype) for number, factors in found.items()}
    b = {number: factors.lora_B.to(dtype) for number, factors in found.items()}
    if method in ("cat", "svd"):
        wide = torch.cat([scaled[number] * tensor for number, tensor in a.items()])  # [Σ r, in]
        tall = torch.cat(list(b.values()), dim=1)
        return Factors(wide, tall, 1.0) if method == "cat" else _reduced(wide, tall, r)
    if method.endswith("_svd"):
        deltas = {number: factors.delta(dtype) for number, factors in found.items()}
        mixed = mixing(deltas, weights, path)
        generator = keyed_generator(mixing.seed, "combine", path)
        return low_rank_of(mixed, min(r, *mixed.shape), generator)[0]
    if len({factors.r for factors in found.values()}) > 1:
        ranks = " and ".join(str(factors.r) for factors in found.values())
        raise UserError(f"{method}: {path} has ranks {ranks}; use cat, svd or a method with _svd")
    roots = {number: math.sqrt(abs(weight)) for number, weight in scaled.items()}
    signed = {number: math.copysign(root, scaled[number]) for number, root in roots.items()}
    return Factors(mixing(a, signed, path, "A"), mixing(b, roots, path, "B"), 1.0)


def _reduced(wide: Tensor, tall: Tensor, r: int) -> Factors:
    """The nearest of rank r to tall [out, R] times wide [R, in]: exact, by a decomposition of R x R."""
    left, upper = torch.linalg.qr(tall.double())
    right, lower = torch.linalg.qr(wide.double().T)
    u, s, vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    root = s[:r].sqrt()
    a, b = root[:, None] * (vh[:r] @ right.T), (left @ u[:, :r]) * root
    return Factors(a.to(wide.dtype).contiguous(), b.to(wide.dtype), 1.0)


def _check(
    adapters: Sequence[Adapter], weights: Sequence[float], method: str, r: int | None, density: float | None
) -> None:
    if method not in METHODS:
        raise UserError(f"method: {method!r} is none of {', '.join(METHODS)}")
    if not adapters:
        raise UserError("no adapters given")
    if len(weights) != len(adapters):
        raise UserError(f"weights: {len(weights)} for {len(adapters)} adapters; give one for each")
    if not all(map(math.isfinite, weights)):
        raise UserError("weights: must be finite numbers")
    if r is not None and (r < 1 or not method.endswith("svd")):
        raise UserError(f"r: {r} with {method}; only svd and methods with _svd take it, and it must be 1 or more")
    prunes = method.startswith(("ties", "dare"))
    if prunes != (density is not None):
        raise UserError(f"density: {method} {'needs' if prunes else 'does not take'} one (a share, e.g. 0.5)")
    if density is not None and not 0 < density <= 1:
        raise UserError(f"density: {density:g} is not above 0 and at most 1")
    for number, adapter in enumerate(adapters, 1):
        if adapter.dora:
            raise UserError(f"adapter {number} is DoRA, whose updates do not add up; merge it and extract one instead")
        if adapter.others:
            raise UserError(
                f"adapter {number} holds what was trained in full ({next(iter(adapter.others))}), which does not add up"
            )


def combine_adapters(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    method: str = "svd",
    r: int | None = None,
    density: float | None = None,
    seed: int = 0,
) -> Summary:
    """Write `out`, one adapter of several (see `relora.adapters.combine`).

    Raises:
        UserError: an adapter that cannot be read or combined, or `out` is there.
        RunStopped: the disk refuses the write.
    """
    adapters = [read_adapter(folder) for folder in folders]
    combined = combine(adapters, weights, method, r=r, density=density, seed=seed)
    return _summary(write_adapter(combined, out), Path(out).name)
