"""Combination of several LoRA adapters for the same base model into one adapter.

Adapter i has the update s_i B_i A_i (s: its scaling) and the weight w_i in the combination. The methods:

    linear        A = Σ √(w s) A_i, B = Σ √(w s) B_i: cheap, but B A contains products across adapters
    cat           A = [w s A_i; ...], B = [B_i, ...]: exactly the weighted sum Σ w s B_i A_i, at the sum of the ranks
    svd           the update of rank r nearest to the weighted sum (`low_rank_approximation`)
    ties          keep the largest entries of each adapter, the share `density` of them; in each position, elect the
                  sign of the sum of the kept entries, and take the mean of the weighted entries that have this sign
                  (Yadav et al. 2023, arXiv 2306.01708, section 4)
    dare_linear   keep random entries of each adapter, the share `density` of them, divide them by `density`, and take
                  the weighted sum (Yu et al. 2023, arXiv 2311.03099, section 3)
    dare_ties     keep random entries as in dare_linear, then elect signs and take means as in ties (section 4.3)

`ties` and the `dare` methods work on A and on B separately, as `linear` does. Their variants that end in `_svd` work on
the update s B A itself, for which the papers define them, and then reduce the result to rank r. Definitions and names
are those of PEFT's `add_weighted_adapter`. Entries are pruned tensor by tensor and drawn by key (`relora.seeding`), so
that the same seed gives the same adapter. All arithmetic is in fp32 or better.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from relora.adapters.adapter import Adapter, Factors
from relora.adapters.base_model import is_same_base
from relora.adapters.compatibility import warn_of_notes
from relora.adapters.contents import Summary, summarize
from relora.adapters.low_rank_approximation import nearest_low_rank, nearest_low_rank_of_product
from relora.adapters.peft_format import read_adapter, write_adapter
from relora.adapters.peft_reading import misreadings_on_base, warn_of_misreadings
from relora.errors import UserError
from relora.seeding import keyed_generator

_log = logging.getLogger(__name__)

COMBINATION_METHODS = (
    "linear",
    "cat",
    "svd",
    *(f"{kind}{end}" for kind in ("ties", "dare_linear", "dare_ties") for end in ("", "_svd")),
)
"""Names of the methods; see the module."""


@dataclass(frozen=True)
class _WeightedSum:
    """The weighted sum of tensors of one shape, with the pruning and the election of signs of a method."""

    density: float
    """Share of the entries of each tensor that is kept; 1 keeps all."""
    random: bool
    """Keep entries at random and divide them by `density`; otherwise keep the largest ones."""
    elect: bool
    """Elect one sign in each position, and take the mean of the entries that have it instead of the sum of all."""
    seed: int
    """Seed of the random draws."""

    def __call__(self, tensors: Mapping[int, Tensor], weights: Mapping[int, float], *key: str) -> Tensor:
        """Sum the tensors of the adapters with their weights.

        Args:
            tensors: one tensor for each adapter, by the adapter's number.
            weights: by the adapter's number, too.
            key: names the tensors (layer, A or B), to key the random draws.
        """
        kept = torch.stack([self._prune(tensor, number, *key) for number, tensor in tensors.items()])
        by_adapter = kept.new_tensor([weights[number] for number in tensors])
        by_adapter = by_adapter.view(-1, *(1 for _ in kept.shape[1:]))  # broadcast over the entries of each tensor
        if not self.elect:
            return (kept * by_adapter).sum(0)
        sign = torch.where(kept.sum(0) >= 0, 1.0, -1.0)
        agrees = kept.sign() == sign
        return (kept * by_adapter * agrees).sum(0) / agrees.sum(0).clamp(min=1)

    def _prune(self, tensor: Tensor, number: int, *key: str) -> Tensor:
        """Set all entries of the tensor of adapter `number` to zero but the share `density`."""
        if self.density == 1:
            return tensor
        if self.random:
            generator = keyed_generator(self.seed, "dare", number, *key)
            drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float32)
            return tensor * (drawn < self.density) / self.density
        flat = tensor.flatten()
        kept = flat.abs().topk(int(self.density * flat.numel())).indices
        return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).view_as(tensor)


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
    """Read the adapters in `folders`, combine them (see `combine` for the other arguments), and write the folder `out`.

    Returns:
        A summary of the adapter in `out`.

    Raises:
        UserError: an adapter cannot be read or combined, or `out` exists already.
        RunStopped: the disk refuses the write.
    """
    adapters = [read_adapter(folder) for folder in folders]
    for folder, adapter in zip(folders, adapters, strict=True):
        warn_of_notes(folder, adapter)
        named = adapters[0].base
        if adapter.base is None or named is None or not is_same_base(adapter.base, named):
            sides = f"{folder} names the base {adapter.base}, {folders[0]} {named}"
            _log.warning("warning: %s; the sum of two models' adapters fits neither, and the result names none", sides)
    combined = combine(adapters, weights, method, r=r, density=density, seed=seed)
    written = write_adapter(combined, out)
    warn_of_misreadings(written, misreadings_on_base(combined))
    return summarize(written, Path(out).name)


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    method: str = "svd",
    *,
    r: int | None = None,
    density: float | None = None,
    seed: int = 0,
) -> Adapter:
    """Combine several LoRA adapters for the same base model into one, of scaling 1.

    Args:
        weights: one weight for each adapter, of any sign; by default each is 1 / (number of adapters).
        method: one of `COMBINATION_METHODS`; see the module.
        r: rank of the result of `svd` and the `_svd` methods; by default, in each layer, the largest rank of the
            adapters.
        density: share of entries that `ties` and the `dare` methods keep, above 0 and at most 1.
        seed: keys the random draws of the `dare` methods.

    Raises:
        UserError: the adapters have layers of different sizes, one of them is DoRA or holds modules that were trained
            in full, or the settings do not fit the method.
    """
    weights = [1 / len(adapters) for _ in adapters] if weights is None else weights
    _check(adapters, weights, method, r, density)
    kind = method.removesuffix("_svd")
    weighted_sum = _WeightedSum(density or 1.0, kind.startswith("dare"), kind.endswith("ties"), seed)
    layers = {}
    for path in dict.fromkeys(path for adapter in adapters for path in adapter.layers):
        found = {number: adapter.layers[path] for number, adapter in enumerate(adapters) if path in adapter.layers}
        if len({factors.shape for factors in found.values()}) > 1:
            raise UserError(f"{path} is of another size in another adapter; they were made for different base models")
        found_weights = {number: weights[number] for number in found}
        rank = r or max(factors.r for factors in found.values())
        layers[path] = _combine_layer(path, found, found_weights, method, weighted_sum, rank)
    first = adapters[0]
    one_base = all(first.base and other.base and is_same_base(first.base, other.base) for other in adapters)
    targets = {name for adapter in adapters for name in adapter.targets}
    return Adapter(
        layers=layers,
        base_copies=adapters[0].base_copies,
        base=first.base if one_base else None,
        revision=first.revision if one_base else None,
        targets=tuple(sorted(targets)) if all(adapter.targets for adapter in adapters) else (),
        fan_in_fan_out=adapters[0].fan_in_fan_out,
        task_type=adapters[0].task_type,
    )


def _combine_layer(
    path: str,
    found: Mapping[int, Factors],
    weights: Mapping[int, float],
    method: str,
    weighted_sum: _WeightedSum,
    r: int,
) -> Factors:
    """Combine the updates of the layer at `path`.

    Args:
        found: factors of the adapters that have this layer, by the adapter's number.
        weights: weights of these adapters, by the adapter's number.
        r: rank of the result of `svd` and the `_svd` methods.
    """
    scaled = {number: weights[number] * factors.scaling for number, factors in found.items()}  # w s
    dtype = torch.float32
    for factors in found.values():
        dtype = torch.promote_types(dtype, factors.lora_A.dtype)
    lora_A = {number: factors.lora_A.to(dtype) for number, factors in found.items()}
    lora_B = {number: factors.lora_B.to(dtype) for number, factors in found.items()}
    if method in ("cat", "svd"):
        wide = torch.cat([scaled[number] * tensor for number, tensor in lora_A.items()])  # [Σ r, in]
        tall = torch.cat(list(lora_B.values()), dim=1)  # [out, Σ r]
        return Factors(wide, tall, 1.0) if method == "cat" else nearest_low_rank_of_product(tall, wide, r)
    if method.endswith("_svd"):
        deltas = {number: factors.delta(dtype) for number, factors in found.items()}
        combined = weighted_sum(deltas, weights, path)
        generator = keyed_generator(weighted_sum.seed, "combine", path)
        return nearest_low_rank(combined, min(r, *combined.shape), generator)[0]
    if len({factors.r for factors in found.values()}) > 1:
        ranks = " and ".join(str(factors.r) for factors in found.values())
        raise UserError(f"{method}: {path} has ranks {ranks}; use cat, svd or a method with _svd")
    # √|w s| goes to both factors, and the sign of w s to A
    roots = {number: math.sqrt(abs(weight)) for number, weight in scaled.items()}
    signed_roots = {number: math.copysign(root, scaled[number]) for number, root in roots.items()}
    return Factors(weighted_sum(lora_A, signed_roots, path, "A"), weighted_sum(lora_B, roots, path, "B"), 1.0)


def _check(
    adapters: Sequence[Adapter], weights: Sequence[float], method: str, r: int | None, density: float | None
) -> None:
    """Check the arguments of `combine`; see there.

    Raises:
        UserError: they do not fit the method or each other, or an adapter cannot be combined.
    """
    if method not in COMBINATION_METHODS:
        raise UserError(f"method: {method!r} is none of {', '.join(COMBINATION_METHODS)}")
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
        if adapter.beyond_linear:
            raise UserError(f"adapter {number} holds {adapter.beyond_linear}, which does not add up; merge it instead")
        if adapter.base_copies.keys() != adapters[0].base_copies.keys() or not all(
            torch.equal(copy, adapters[0].base_copies[key]) for key, copy in adapter.base_copies.items()
        ):
            raise UserError(
                f"adapter {number} holds other copies of the base's weights than adapter 1; merge it instead"
            )
        if adapter.others:
            raise UserError(
                f"adapter {number} holds what was trained in full ({next(iter(adapter.others))}), which does not add up"
            )
