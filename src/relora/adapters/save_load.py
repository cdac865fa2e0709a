"""Adapters in and out of a model: what its low-rank layers have learned, to a folder and back.

The folder is PEFT's (`adapter_files`). An update is kept relative to the original base, whatever the factors began
from; what a restart has merged into the weights is in the weights, and not in an adapter.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from relora.adapters.peft_format import Adapter as Adapter
from relora.adapters.peft_format import Factors as Factors
from relora.adapters.peft_format import alphas, common_and_patterns, write_adapter
from relora.adapters.peft_format import read_adapter as read_adapter
from relora.errors import UserError
from relora.lowrank.config import LowRankConfig
from relora.lowrank.gradient_init import update_factors
from relora.lowrank.inject import InjectReport, inject, is_conv1d, low_rank_layers
from relora.messages import short_name

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
}
"""PEFT's task_type by the end of a model class's name in transformers."""


def save_adapter(model: nn.Module, folder: str | Path, *, base: str | None = None, overwrite: bool = False) -> Path:
    """Write what a model with low-rank layers has learned, and nothing else; the model stays as it is.

    What is trained beside the factors goes along in full, as PEFT's `modules_to_save`. Factors that began from the
    weight itself or from its gradient become a plain update of the original weight, of twice the rank.

    Args:
        base: what the base model is called, for whoever loads the adapter: a folder or a hub id.
        overwrite: replace an adapter that is there.

    Raises:
        UserError: no low-rank layers, something trained that PEFT's format has no place for, or `folder` is there.
        RunStopped: the disk refuses the write.
    """
    return write_adapter(adapter_of(model, base=base), folder, overwrite=overwrite)


def load_adapter(
    model: nn.Module, folder: str | Path, *, like: LowRankConfig | None = None, seed: int = 0
) -> InjectReport:
    """Put an adapter into its base model, in place, as low-rank layers to continue from; the rest is frozen.

    Args:
        like: what an adapter does not say, such as the storage of frozen weights; its ranks and targets do not count.

    Raises:
        UserError: not an adapter (`read_adapter`), or one of another base. The model is left untouched.
    """
    adapter = read_adapter(folder)
    check_fits(adapter, model, folder)
    check_ties(adapter, model, folder)
    r, rank_pattern = common_and_patterns({path: factors.r for path, factors in adapter.layers.items()})
    alpha, alpha_pattern = common_and_patterns(alphas(adapter))
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
    report = inject(model, config, seed=seed)
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
    """The adapter that a model's low-rank layers, and what else it trains, amount to; see `save_adapter`."""
    layers = low_rank_layers(model)
    if not layers:
        raise UserError("the model has no low-rank layers, so there is no adapter to save")
    factors = {}
    for path, layer in layers.items():
        a, b, scaling = update_factors(layer)
        magnitude = None if layer.magnitude is None else layer.magnitude.detach()
        factors[path] = Factors(a.detach(), b.detach(), float(scaling), magnitude)
    others, tied = _trained_in_full(model, set(layers))
    name = type(model).__name__
    return Adapter(
        layers=factors,
        others=others,
        base=base,
        targets=_targets(model, set(layers)),
        rslora=all(layer.rslora for layer in layers.values()),
        dropout=max(layer.lora_dropout for layer in layers.values()),
        fan_in_fan_out=any(layer.fan_in_fan_out for layer in layers.values()),
        tied=tied,
        task_type=next((task for end, task in _TASKS.items() if name.endswith(end)), None),
    )


def check_fits(adapter: Adapter, model: nn.Module, source: str | Path) -> None:
    """`UserError` unless every part of an adapter has its place in the model; `source` names the adapter."""
    made_for = f" ({adapter.base})" if adapter.base else ""
    other = f"{source}: made for another base model{made_for}: "
    modules = dict(model.named_modules(remove_duplicate=False))
    for path in adapter.layers:
        if path not in modules or linear_shape(modules[path]) is None:
            raise UserError(f"{other}this one has no linear layer {short_name(path, 160)}")
    for path in (path for path in modules if path in adapter.layers):
        there, here = adapter.layers[path].shape, linear_shape(modules[path])
        if here is not None and here != there:
            raise UserError(f"{other}{path} is {_by(there)} there, {_by(here)} here")
    tensors = all_tensors(model)
    for key, tensor in adapter.others.items():
        if key not in tensors:
            raise UserError(f"{other}this one has no {short_name(key, 160)}")
        if tensors[key].shape != tensor.shape:
            raise UserError(
                f"{other}{short_name(key, 160)} is {_by(tensor.shape)} there, {_by(tensors[key].shape)} here"
            )


def check_ties(adapter: Adapter, model: nn.Module, source: str | Path) -> None:
    """`UserError` where the adapter's change to a tied weight would change its other user in another way."""
    groups: dict[int, list[str]] = defaultdict(list)
    tensors = all_tensors(model)
    for key, tensor in tensors.items():
        groups[id(tensor)].append(key)
    touched = {f"{path}.weight" for path in adapter.layers} | adapter.others.keys()
    for names in groups.values():
        if len(names) > 1 and touched & set(names):
            values = [adapter.others[name] for name in names if name in adapter.others]
            if len(values) < len(names) or not all(torch.equal(value, values[0]) for value in values):
                changed = " or ".join(sorted(touched & set(names)))
                raise UserError(
                    f"{source}: changes {changed} alone, but {' and '.join(names)} are one tied weight here; "
                    "untie the base first (`tie_word_embeddings: false` and a head of its own)"
                )


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear layer of any kind, None of anything else."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if not is_conv1d(module):
        return None
    inn, out = module.get_parameter("weight").shape
    return out, inn


def _trained_in_full(model: nn.Module, targets: set[str]) -> tuple[dict[str, Tensor], bool]:
    """All that is trained beside the factors by every name it has, in whole modules; whether a weight is tied."""
    found: dict[str, Tensor] = {}
    trained: dict[str, Tensor] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        path, _, name = key.rpartition(".")
        if not parameter.requires_grad or (path in targets and name != "bias"):
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
    """Copy what was trained in full, to be trained on; its number of parameters."""
    tensors, trained = all_tensors(model), {}
    with torch.no_grad():
        for key, value in others.items():
            tensors[key].copy_(value)
            if isinstance(tensors[key], nn.Parameter):
                trained[id(tensors[key])] = tensors[key].requires_grad_(True)
    return sum(parameter.numel() for parameter in trained.values())


def _targets(model: nn.Module, paths: set[str]) -> tuple[str, ...]:
    """The last parts of the layers' names if they select these layers alone; else nothing."""
    names = {path.rpartition(".")[2] for path in paths}
    selected = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in names}
    return tuple(sorted(names)) if selected == paths else ()


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under every name they have."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a number"


def _exactly(paths: Iterable[str]) -> str:
    """A regular expression that matches these paths and no other."""
    return "|".join(map(re.escape, paths))
