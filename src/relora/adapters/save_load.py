"""Saving the low-rank layers of a model as an adapter folder, and loading such a folder into its base model.

The format is PEFT's (`peft_format`). An adapter holds the update relative to the original base weights, whatever values
the factors were initialised with. Updates that restarts have merged are part of the weights, and not of an adapter.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from relora.adapters.adapter import Adapter, Factors
from relora.adapters.compatibility import all_tensors, check_fits, check_ties, warn_of_notes
from relora.adapters.peft_format import common_and_patterns, read_adapter, write_adapter
from relora.adapters.peft_reading import misreadings, warn_of_misreadings
from relora.errors import UserError
from relora.lowrank.config import LowRankConfig
from relora.lowrank.gradient_init import update_factors
from relora.lowrank.inject import InjectReport, inject, low_rank_layers
from relora.lowrank.token_rows import trained_rows

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
}
"""PEFT's `task_type`, by the ending of the model's class name in transformers."""


def save_adapter(model: nn.Module, folder: str | Path, *, base: str | None = None, overwrite: bool = False) -> Path:
    """Write what a model with low-rank layers trains as an adapter folder; the model does not change.

    Tensors that train beside the factors are written in full, as PEFT's `modules_to_save`. Factors that were
    initialised from the weight or its gradient (`init: pissa`, `gradient-svd`) are written as an update of the original
    weight, which has twice the rank.

    Layers that PEFT would read as something else are logged as a warning (see `peft_reading`).

    Args:
        base: folder or hub id of the base model, to be named in the adapter's configuration.
        overwrite: replace an adapter that exists in `folder`.

    Returns:
        The folder.

    Raises:
        UserError: the model has no low-rank layers, trains a parameter that PEFT's format cannot hold, or `folder`
            exists (with `overwrite`: and is not an adapter).
        RunStopped: the disk refuses the write.
    """
    adapter = adapter_of(model, base=base)
    written = write_adapter(adapter, folder, overwrite=overwrite)
    warn_of_misreadings(written, misreadings(model, adapter))
    return written


def load_adapter(
    model: nn.Module, folder: str | Path, *, like: LowRankConfig | None = None, seed: int = 0
) -> InjectReport:
    """Inject an adapter into its base model, in place, as low-rank layers that can be trained further.

    Tensors that the adapter holds in full are copied into the model and train, too; everything else is frozen.

    Args:
        like: settings that an adapter does not contain, such as the storage of frozen weights. Ranks, scalings,
            targets, dropout and variant are always those of the adapter.
        seed: seed of the low-rank layers, for their later restarts.

    Raises:
        UserError: the folder holds no adapter (see `read_adapter`), or one for another base. The model is unchanged.
    """
    adapter = read_adapter(folder)
    check_fits(adapter, model, folder)
    check_ties(adapter, model, folder)
    warn_of_notes(folder, adapter, model)
    if adapter.beyond_linear:
        raise UserError(
            f"{folder}: {adapter.beyond_linear} can be merged and used, but not trained further; merge the adapter "
            "first (`relora adapters merge`)"
        )
    tensors = all_tensors(model)
    for key, copy in adapter.base_copies.items():
        if not torch.equal(tensors[key].detach().to(copy), copy):
            raise UserError(
                f"{folder}: its copy of the base's {key} differs from that of this base; merge the adapter first "
                "(`relora adapters merge`), and train on the merged model"
            )
    r, rank_pattern = common_and_patterns({path: factors.r for path, factors in adapter.layers.items()})
    alpha, alpha_pattern = common_and_patterns(adapter.alphas())
    config = replace(
        like or LowRankConfig(),
        r=r,
        lora_alpha=alpha,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        rslora=adapter.rslora,
        dora=adapter.dora,
        lora_dropout=adapter.dropout,
        target_modules=_exactly(adapter.layers),
        init="kaiming",
        rest="frozen",
        trained_modules=(),
    )
    report = inject(model, config, seed=seed, named_exactly=True)
    with torch.no_grad():
        for path, layer in low_rank_layers(model).items():
            factors = adapter.layers[path]
            layer.lora_A.copy_(factors.lora_A)
            layer.lora_B.copy_(factors.lora_B)
            if layer.magnitude is not None and factors.magnitude is not None:
                layer.magnitude.copy_(factors.magnitude)
    trained = _load_others(model, adapter.others)
    return replace(report, frozen=report.frozen - trained, full_rank=report.full_rank + trained)


def adapter_of(model: nn.Module, *, base: str | None = None) -> Adapter:
    """Collect what a model with low-rank layers trains as an adapter in memory; see `save_adapter`."""
    layers = low_rank_layers(model)
    if not layers:
        raise UserError("the model has no low-rank layers, so there is no adapter to save")
    factors = {}
    for path, layer in layers.items():
        lora_A, lora_B, scaling = update_factors(layer)
        magnitude = None if layer.magnitude is None else layer.magnitude.detach()
        factors[path] = Factors(lora_A.detach(), lora_B.detach(), float(scaling), magnitude)
    others, tied = _trained_in_full(model, set(layers))
    name = type(model).__name__
    return Adapter(
        layers=factors,
        others=others,
        rows=trained_rows(model),
        base=base,
        targets=_targets(model, set(layers)),
        rslora=all(layer.rslora for layer in layers.values()),
        dropout=max(layer.lora_dropout for layer in layers.values()),
        fan_in_fan_out=any(layer.fan_in_fan_out for layer in layers.values()),
        tied=tied,
        task_type=next((task for end, task in _TASKS.items() if name.endswith(end)), None),
    )


def _trained_in_full(model: nn.Module, targets: set[str]) -> tuple[dict[str, Tensor], bool]:
    """Collect the tensors that train beside the factors.

    PEFT stores whole modules, so the frozen tensors of a module that trains in part are collected, too. Of a target
    layer, only the bias can train beside its factors.

    Args:
        targets: paths of the low-rank layers.

    Returns:
        The tensors by name, tied ones under each of their names; and whether one of the trained tensors is tied.

    Raises:
        UserError: a parameter trains that belongs to a module with children, which PEFT's format cannot hold.
    """
    found: dict[str, Tensor] = {}
    trained: dict[str, Tensor] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        path, _, name = key.rpartition(".")
        if not parameter.requires_grad or (path in targets and name != "bias"):
            continue
        if ".parametrizations." in key:  # some rows of a weight (see `trained_rows`)
            continue
        trained[key] = parameter
        if path in targets:
            found[key] = parameter
            continue
        module = model.get_submodule(path)
        if not path or any(module.children()):
            raise UserError(f"{key} is trained, but PEFT's format has a place for whole innermost modules alone")
        found |= {f"{path}.{name}": tensor for name, tensor in module.state_dict().items()}
    return found, len({id(parameter) for parameter in trained.values()}) < len(trained)


def _load_others(model: nn.Module, others: Mapping[str, Tensor]) -> int:
    """Copy the tensors that were trained in full into the model, let them train, and return their parameter count."""
    tensors, trained = all_tensors(model), {}
    with torch.no_grad():
        for key, value in others.items():
            tensors[key].copy_(value)
            if isinstance(tensors[key], nn.Parameter):
                trained[id(tensors[key])] = tensors[key].requires_grad_(True)
    return sum(parameter.numel() for parameter in trained.values())


def _targets(model: nn.Module, paths: set[str]) -> tuple[str, ...]:
    """Return the last parts of the paths if no other module's path ends in one of them; otherwise nothing."""
    names = {path.rpartition(".")[2] for path in paths}
    selected = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in names}
    return tuple(sorted(names)) if selected == paths else ()


def _exactly(paths: Iterable[str]) -> str:
    """Return a regular expression that matches these paths and no other."""
    return "|".join(map(re.escape, paths))
