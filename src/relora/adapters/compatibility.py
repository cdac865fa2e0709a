"""Checks whether an adapter fits a base model: layers, shapes, and weights that several modules share.

An adapter names layers by their paths in the base model, so it fits models of one structure only.
"""

from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor, nn

from relora.adapters.adapter import Adapter
from relora.errors import UserError
from relora.lowrank.targets import is_conv1d
from relora.messages import short_name


def check_fits(adapter: Adapter, model: nn.Module, source: str | Path) -> None:
    """Check that the model has every layer and tensor of an adapter, in the same shape.

    Args:
        source: the adapter's folder, for the message.

    Raises:
        UserError: a layer or a tensor is missing from the model, or has another shape there.
    """
    made_for = f" ({adapter.base})" if adapter.base else ""
    other = f"{source}: made for another base model{made_for}: "
    modules = dict(model.named_modules(remove_duplicate=False))
    for path in adapter.layers:
        if path not in modules or linear_shape(modules[path]) is None:
            raise UserError(f"{other}this one has no linear layer {short_name(path, 160)}")
    for path in (path for path in modules if path in adapter.layers):
        adapter_shape, model_shape = adapter.layers[path].shape, linear_shape(modules[path])
        if model_shape is not None and model_shape != adapter_shape:
            raise UserError(f"{other}{path} is {_format_shape(adapter_shape)} there, {_format_shape(model_shape)} here")
    tensors = all_tensors(model)
    for key, tensor in adapter.others.items():
        if key not in tensors:
            raise UserError(f"{other}this one has no {short_name(key, 160)}")
        if tensors[key].shape != tensor.shape:
            sides = f"{_format_shape(tensor.shape)} there, {_format_shape(tensors[key].shape)} here"
            raise UserError(f"{other}{short_name(key, 160)} is {sides}")


def check_ties(adapter: Adapter, model: nn.Module, source: str | Path) -> None:
    """Check that an adapter changes tied weights in the same way under all their names, or not at all.

    Such a weight is one tensor that several modules use (often the embedding and the output head). An adapter that
    changes it for one of them alone cannot be merged, and could not be trained further.

    Args:
        source: the adapter's folder, for the message.

    Raises:
        UserError: the adapter changes a tied weight under some of its names only, or to different values.
    """
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
    """Return (out, in) of an `nn.Linear` or a GPT-2 `Conv1D`; None for any other module."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if not is_conv1d(module):
        return None
    in_features, out_features = module.get_parameter("weight").shape
    return out_features, in_features


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers of a model; a tied one stands under each of its names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _format_shape(shape: tuple[int, ...]) -> str:
    """Write a shape as in `4 x 8`."""
    return " x ".join(map(str, shape)) or "a number"
