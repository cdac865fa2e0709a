"""The adapter of rank r nearest to what full training changed in a model."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from relora.adapters.combine import low_rank_of
from relora.adapters.peft_format import Adapter, Factors, write_adapter
from relora.adapters.save_load import all_tensors
from relora.adapters.stored_model import StoredModel
from relora.errors import UserError
from relora.lowrank import LowRankConfig
from relora.lowrank.inject import find_targets
from relora.report.progress import with_progress
from relora.seeding import keyed_generator


@dataclass(frozen=True)
class Extraction:
    """What an extracted adapter keeps of a difference of models; energy is the sum of its squares."""

    out: str
    r: int
    layers: dict[str, float]
    """Share of the energy kept, by layer."""
    energy_kept: float
    """Of all these layers."""
    unchanged: list[str]
    """Layers that are the same in both models; not in the adapter."""
    left_out: list[str]
    """Other weights that differ (embeddings, norms, biases); not in the adapter."""


def extract_adapter(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    r: int,
    target_modules: str | tuple[str, ...] = "all-linear",
    seed: int = 0,
) -> Extraction:
    """Write `out`, the adapter of rank r nearest to what a full training made of `base`, one layer at a time.

    Raises:
        UserError: models of different shapes, or alike in all targets, r too large, or `out` is there.
        RunStopped: the disk refuses the write.
    """
    if Path(out).exists():
        raise UserError(f"{out}: is there already and was left as it is; give another folder")
    before, after = StoredModel(base), StoredModel(tuned)
    _check_alike(before, after, tuned)
    paths = find_targets(before.model, LowRankConfig(r=r, target_modules=target_modules))
    layers: dict[str, Factors] = {}
    shares: dict[str, float] = {}
    kept = total = 0.0
    for path in with_progress(paths, len(paths), "layers"):
        weight = before.weight(path)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        difference = after.weight(path).to(dtype) - weight.to(dtype)
        energy = difference.double().square().sum().item()
        if energy:
            factors, shares[path] = low_rank_of(difference, r, keyed_generator(seed, "extract", path))
            layers[path] = factors
            kept, total = kept + shares[path] * energy, total + energy
    if not layers:
        raise UserError(f"{tuned}: its linear layers are those of {base}; there is nothing to extract")
    adapter = Adapter(
        layers=layers,
        base=str(base),
        fan_in_fan_out=any(before.is_transposed(path) for path in layers),
        task_type="CAUSAL_LM",
    )
    return Extraction(
        out=str(write_adapter(adapter, out)),
        r=r,
        layers=shares,
        energy_kept=kept / total,
        unchanged=[path for path in paths if path not in layers],
        left_out=_other_differences(before, after, {f"{path}.weight" for path in paths}),
    )


def _check_alike(before: StoredModel, after: StoredModel, tuned: str | Path) -> None:
    there, here = all_tensors(after.model), all_tensors(before.model)
    for name, tensor in here.items():
        if name not in there:
            raise UserError(f"{tuned}: of another architecture than the base (it has no {name})")
        if there[name].shape != tensor.shape:
            sides = [" x ".join(map(str, shape)) for shape in (there[name].shape, tensor.shape)]
            raise UserError(f"{tuned}: {name} is {sides[0]}, in the base {sides[1]}")


def _other_differences(before: StoredModel, after: StoredModel, targets: set[str]) -> list[str]:
    """Tensors beside the targets that are not the same."""
    names = [name for name in before.places if name not in targets and name in after.places]
    return [name for name in names if not _equal(before.places[name].read(), after.places[name].read())]


def _equal(one: Tensor, other: Tensor) -> bool:
    dtype = torch.promote_types(one.dtype, other.dtype)
    return torch.equal(one.to(dtype), other.to(dtype))
