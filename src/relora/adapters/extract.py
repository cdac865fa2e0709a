"""Extraction of a LoRA adapter from a model that was trained in full.

    W_tuned - W_base ≈ lora_B lora_A        the nearest matrix of rank r (`low_rank_approximation`), layer by layer

Weights are read from the files one layer at a time, so that, beside the adapter, memory holds a few copies of one
layer. The price: what changed beside the targets (embeddings, norms, biases) and what does not fit into rank r is lost;
the report says how much that is.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from relora.adapters.adapter import Adapter, Factors
from relora.adapters.compatibility import all_tensors
from relora.adapters.low_rank_approximation import nearest_low_rank
from relora.adapters.peft_format import write_adapter
from relora.adapters.peft_reading import misreadings, warn_of_misreadings
from relora.adapters.stored_model import StoredModel
from relora.errors import UserError
from relora.lowrank import LowRankConfig
from relora.lowrank.targets import find_targets
from relora.report.progress import with_progress
from relora.seeding import keyed_generator


@dataclass(frozen=True)
class Extraction:
    """Report on an extracted adapter: which part of the difference between the two models it keeps.

    The energy of a difference is the sum of the squares of its entries.
    """

    out: str
    r: int
    layers: dict[str, float]
    """Share of a layer's energy that the adapter keeps, by the layer's path."""
    energy_kept: float
    """Share of the energy of all these layers together."""
    unchanged: list[str]
    """Target layers whose weights are the same in both models; they are not in the adapter."""
    left_out: list[str]
    """Other weights that differ (embeddings, norms, biases); they are not in the adapter."""


def extract_adapter(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    r: int,
    target_modules: str | tuple[str, ...] = "all-linear",
    seed: int = 0,
) -> Extraction:
    """Write the folder `out`: the adapter of rank r with which the model `base` comes nearest to the model `tuned`.

    Args:
        base: folder or hub id of the model before the training.
        tuned: folder or hub id of the model after it.
        target_modules: the layers that the adapter has; see `LowRankConfig`.
        seed: keys the random draws of the decomposition of large layers.

    Raises:
        UserError: the models have different shapes or are alike in all targets, r is too large, or `out` exists.
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
            factors, shares[path] = nearest_low_rank(difference, r, keyed_generator(seed, "extract", path))
            layers[path] = factors
            kept += shares[path] * energy
            total += energy
    if not layers:
        raise UserError(f"{tuned}: its linear layers are those of {base}; there is nothing to extract")
    adapter = Adapter(
        layers=layers,
        base=str(base),
        fan_in_fan_out=any(before.is_transposed(path) for path in layers),
        task_type="CAUSAL_LM",
    )
    written = write_adapter(adapter, out)
    warn_of_misreadings(written, misreadings(before.model, adapter))
    return Extraction(
        out=str(written),
        r=r,
        layers=shares,
        energy_kept=kept / total,
        unchanged=[path for path in paths if path not in layers],
        left_out=_other_differences(before, after, {f"{path}.weight" for path in paths}),
    )


def _check_alike(before: StoredModel, after: StoredModel, tuned: str | Path) -> None:
    """Raise `UserError` unless the tuned model has every tensor of the base, in the same shape."""
    tuned_tensors = all_tensors(after.model)
    for name, tensor in all_tensors(before.model).items():
        if name not in tuned_tensors:
            raise UserError(f"{tuned}: of another architecture than the base (it has no {name})")
        if tuned_tensors[name].shape != tensor.shape:
            sides = [" x ".join(map(str, shape)) for shape in (tuned_tensors[name].shape, tensor.shape)]
            raise UserError(f"{tuned}: {name} is {sides[0]}, in the base {sides[1]}")


def _other_differences(before: StoredModel, after: StoredModel, targets: set[str]) -> list[str]:
    """Return the names of the tensors that differ between the models and are not weights of targets."""
    names = [name for name in before.tensors if name not in targets and name in after.tensors]
    return [name for name in names if not _equal(before.tensors[name].read(), after.tensors[name].read())]


def _equal(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors hold the same numbers, whatever their dtypes."""
    dtype = torch.promote_types(one.dtype, other.dtype)
    return torch.equal(one.to(dtype), other.to(dtype))
