"""Extraction of a LoRA adapter from a model that was trained in full.

    W_tuned - W_base ≈ lora_B lora_A        the nearest matrix of rank r (`low_rank_approximation`), layer by layer

Weights are read from the files one layer at a time, so that, beside the adapter, memory holds a few copies of one
layer. The price: what changed beside the targets (embeddings, norms, biases) and what does not fit into rank r is lost;
the report says how much that is.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from relora.adapters.adapter import Adapter, Factors
from relora.adapters.compatibility import all_tensors, tied_names
from relora.adapters.low_rank_approximation import nearest_low_rank
from relora.adapters.peft_format import write_adapter
from relora.adapters.peft_reading import misreadings, warn_of_misreadings
from relora.adapters.stored_model import StoredModel, StoredTensor
from relora.errors import UserError
from relora.lowrank import LowRankConfig
from relora.lowrank.targets import find_targets
from relora.report.progress import with_progress
from relora.seeding import keyed_generator

_log = logging.getLogger(__name__)

_OF_NO_EFFECT = frozenset(
    {
        *("transformers_version", "dtype", "torch_dtype", "architectures", "_name_or_path", "use_cache"),
        *("tie_word_embeddings", "auto_map", "initializer_range"),
    }
)
"""Keys of config.json that do not change what a model computes, or only by weights, which are compared."""


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
    if settings := _other_settings(before, after):
        _log.warning(
            "warning: %s: its config.json differs from that of %s in %s, which is not in the adapter",
            *(tuned, base, ", ".join(settings)),
        )
    return Extraction(
        out=str(written),
        r=r,
        layers=shares,
        energy_kept=kept / total,
        unchanged=[path for path in paths if path not in layers],
        left_out=_other_differences(before, after, {f"{path}.weight" for path in paths}),
    )


def _check_alike(before: StoredModel, after: StoredModel, tuned: str | Path) -> None:
    """Raise `UserError` unless the tuned model has the tensors of the base, in the same shapes, and no others."""
    base_tensors, tuned_tensors = all_tensors(before.model), all_tensors(after.model)
    for name in tuned_tensors:
        if name not in base_tensors:
            raise UserError(f"{tuned}: of another architecture than the base (which has no {name})")
    for name, tensor in base_tensors.items():
        if name not in tuned_tensors:
            raise UserError(f"{tuned}: of another architecture than the base (it has no {name})")
        if tuned_tensors[name].shape != tensor.shape:
            sides = [" x ".join(map(str, shape)) for shape in (tuned_tensors[name].shape, tensor.shape)]
            raise UserError(f"{tuned}: {name} is {sides[0]}, in the base {sides[1]}")


def _other_differences(before: StoredModel, after: StoredModel, targets: set[str]) -> list[str]:
    """Return the names of the tensors that differ between the models and are not weights of targets."""
    names = dict.fromkeys([*all_tensors(before.model), *before.tensors])  # some are stored in another form
    pairs = {name: (_stored(before, name), _stored(after, name)) for name in names if name not in targets}
    differ = [name for name, (old, new) in pairs.items() if old and new and not _equal(old.read(), new.read())]
    # a weight that is tied in both models counts once
    same = {name: pairs[name] for name in differ}
    return [name for number, name in enumerate(differ) if same[name] not in [same[one] for one in differ[:number]]]


def _stored(model: StoredModel, name: str) -> StoredTensor | None:
    """Return a tensor of a model's files, a tied one under any of its names; None if they do not hold it as such."""
    names = (name, *tied_names(model.model, name)) if name in all_tensors(model.model) else (name,)
    return next((model.tensors[one] for one in names if one in model.tensors), None)


def _other_settings(before: StoredModel, after: StoredModel) -> list[str]:
    """Return the keys of config.json that differ and may change what a model computes."""
    old, new = (model.model.config.to_dict() for model in (before, after))
    keys = sorted({*old, *new} - _OF_NO_EFFECT)
    return [key for key in keys if not key.endswith("_token_id") and old.get(key) != new.get(key)]


def _equal(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors hold the same numbers, whatever their dtypes."""
    dtype = torch.promote_types(one.dtype, other.dtype)
    return torch.equal(one.to(dtype), other.to(dtype))
