"""The layers of an adapter that PEFT reads as something else than what was trained.

PEFT 0.21 converts an adapter for models that transformers 5 stores in another form than transformers 4 did
(peft.utils.transformers_weight_conversion):

- A mixture of experts whose model type transformers converts like Mixtral or Qwen2-MoE has its experts fused into 3-D
  parameters. Whatever target ends in gate_proj, up_proj or down_proj (w1, w2, w3 with Mixtral's kind) is taken for the
  experts': PEFT puts new factors on the fused experts, and leaves out those of dense and shared layers of that name,
  also where target_modules holds whole paths or a regular expression. A router called `gate` is taken for a parameter,
  too, which makes the same function. Parameters get no dropout and no DoRA: PEFT refuses such an adapter.
- Every key is renamed as transformers renames the keys of old checkpoints (transformers.conversion_mapping).
- It refuses `out_proj` of some state-space models, whose fused kernels pass by the factors.

What is written is right, and this package reads and merges it rightly. An adapter cannot be written so that PEFT reads
these layers, so it is said where one is saved or shown.
"""

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from relora.adapters.adapter import Adapter
from relora.errors import UserError
from relora.model.load import open_model

_log = logging.getLogger(__name__)

PEFT_VERSION = "0.21"
"""Version of PEFT whose reading this module describes."""

EXPERT_TARGETS: Mapping[str, Mapping[str, str]] = {
    "mixtral": {"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"},
    "qwen2_moe": {
        "gate": "gate.weight",
        "gate_proj": "gate_up_proj",
        "up_proj": "gate_up_proj",
        "down_proj": "down_proj",
    },
}
"""Kind of conversion in transformers -> last part of a target -> the parameter that PEFT takes it for."""
STATE_SPACE_TYPES = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
"""Model types of which PEFT refuses adapters that hold a layer of `STATE_SPACE_LEAVES`."""
STATE_SPACE_LEAVES = ("out_proj", "conv1d")


@dataclass(frozen=True)
class Misreading:
    """Layers of an adapter that PEFT reads as something else."""

    layers: tuple[str, ...]
    """Paths of the layers, in the adapter's order."""
    refused: bool
    """Whether PEFT refuses the whole adapter; otherwise it loads it without these layers."""
    reason: str

    def __str__(self) -> str:
        kinds = dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", path) for path in self.layers)
        which = f"{len(self.layers)} layers ({', '.join(kinds)})" if len(self.layers) > 1 else self.layers[0]
        what = "refuses the adapter over" if self.refused else "loads the adapter without"
        return (
            f"PEFT {PEFT_VERSION} {what} {which}: {self.reason}; to use it outside relora, merge it (`relora adapters "
            "merge`), or train with lowrank.target_modules that leave these layers out"
        )


def misreadings(model: nn.Module, adapter: Adapter) -> list[Misreading]:
    """List what PEFT reads otherwise of an adapter for a model; nothing for a model that is not of transformers.

    Args:
        model: the base model, with or without low-rank layers; no tensor of it is read, so it may be on the meta
            device.
    """
    if not isinstance(model, PreTrainedModel):
        return []
    paths = tuple(adapter.layers)
    found = [_state_space(model, paths), _experts(model, paths, adapter.dora or adapter.dropout > 0)]
    left = tuple(path for path in paths if not any(one and path in one.layers for one in found))
    return [one for one in (*found, _renamed(model, left)) if one]


def misreadings_on_base(adapter: Adapter) -> list[Misreading] | None:
    """List what PEFT reads otherwise of an adapter, for the base that it names; None if that is no folder here.

    A base on the hub is not asked for, since this must not wait for a download.
    """
    if not adapter.base or not Path(adapter.base).is_dir():
        return None
    try:
        with torch.device("meta"):
            model = open_model(adapter.base)
    except UserError:  # a folder that is no model (any more)
        return None
    return misreadings(model, adapter)


def warn_of_misreadings(folder: Path, found: list[Misreading] | None) -> None:
    """Log a warning for each group of layers of the adapter in `folder` that PEFT reads otherwise."""
    for misreading in found or ():
        _log.warning("warning: %s: %s", folder, misreading)


def _state_space(model: PreTrainedModel, paths: tuple[str, ...]) -> Misreading | None:
    """Find the layers of a state-space model for which PEFT refuses the adapter."""
    if model.config.model_type not in STATE_SPACE_TYPES:
        return None
    layers = tuple(path for path in paths if _leaf(path) in STATE_SPACE_LEAVES)
    reason = f"fused kernels of {model.config.model_type} pass by the factors of {' and '.join(STATE_SPACE_LEAVES)}"
    return Misreading(layers, True, reason) if layers else None


def _experts(model: PreTrainedModel, paths: tuple[str, ...], special: bool) -> Misreading | None:
    """Find the layers that PEFT takes for experts, and whether it refuses the adapter over them."""
    parameter_of = EXPERT_TARGETS.get(_conversion_kind(model.config.model_type), {})
    layers = tuple(path for path in paths if _leaf(path) in parameter_of)
    found = {_leaf(path) for path in layers}
    left_out = tuple(path for path in layers if _leaf(path) != "gate")
    fused = {leaf for leaf, parameter in parameter_of.items() if parameter == "gate_up_proj"}
    if len(fused & found) == 1:
        needed = " and ".join(sorted(fused))
        return Misreading(left_out, True, f"it takes them for the experts', where {needed} are one parameter")
    wrapped = tuple(f".{parameter_of[leaf]}" for leaf in found)
    if special and wrapped and any(name.endswith(wrapped) for name, _ in model.named_parameters()):
        return Misreading(layers, True, "it takes them for parameters, which it gives no dropout and no DoRA")
    return Misreading(left_out, False, "it takes them for the experts'") if left_out else None


def _renamed(model: PreTrainedModel, paths: tuple[str, ...]) -> Misreading | None:
    """Find the layers whose keys PEFT renames as those of old checkpoints."""
    rename = _renamer(model)
    layers = tuple(path for path in paths if rename(path) != path)
    return Misreading(layers, False, "it renames their keys as those of an old checkpoint") if layers else None


def _renamer(model: PreTrainedModel) -> Callable[[str], str]:
    """Return the function from a layer's path to the path under which PEFT looks for it."""
    if conversion_mapping.get_checkpoint_conversion_mapping(model.config.model_type) is None:
        return str
    conversions = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    end = ".lora_A.default.weight"

    def rename(path: str) -> str:
        key, _ = rename_source_key(path + end, renamings, [])
        renamed = str(key).removesuffix(end)
        return path if path.endswith(renamed) else renamed  # PEFT takes back what only removed a prefix

    return rename


def _conversion_kind(model_type: str) -> str:
    """Return the type whose conversion transformers uses for a model type, as PEFT looks it up; "" if there is none."""
    if model_type == "mixtral":
        return model_type
    kinds: dict[str, str] = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    return kinds.get(model_type, "")


def _leaf(path: str) -> str:
    """Return the last part of a path."""
    return path.rpartition(".")[2]
