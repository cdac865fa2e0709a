"""Checks whether an adapter fits a base model: layers, shapes, and weights that several modules share.

An adapter names layers by their paths in the base model, so it fits models of one structure only.
"""

import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from relora.adapters.adapter import Adapter, Factors
from relora.errors import UserError
from relora.lowrank.targets import is_conv1d
from relora.messages import short_name

_log = logging.getLogger(__name__)


def check_fits(adapter: Adapter, model: nn.Module, source: str | Path) -> None:
    """Check that the model has every layer and tensor of an adapter, in the same shape.

    Args:
        source: the adapter's folder, for the message.

    Raises:
        UserError: a layer or a tensor is missing from the model, or has another shape there.
    """
    made_for = f" ({adapter.base})" if adapter.base else ""
    other = f"{source}: made for another base model{made_for}: "
    if adapter.task_type and adapter.task_type.endswith("_CLS"):
        other = (
            f"{source}: made for a classifier (task_type {short_name(adapter.task_type)}), which is merged in PEFT: "
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, factors in adapter.layers.items():
        if path not in modules or layer_shape(modules[path], factors) is None:
            kind = "embedding" if factors.of_embedding else "linear layer"
            raise UserError(f"{other}this one has no {kind} {short_name(path, 160)}")
    for path in (path for path in modules if path in adapter.layers):
        adapter_shape, model_shape = adapter.layers[path].shape, layer_shape(modules[path], adapter.layers[path])
        if model_shape is not None and model_shape != adapter_shape:
            raise UserError(f"{other}{path} is {_format_shape(adapter_shape)} there, {_format_shape(model_shape)} here")
    tensors = all_tensors(model)
    for key in (*adapter.others, *adapter.base_copies, *adapter.rows):
        if key not in tensors:
            raise UserError(f"{other}this one has no {short_name(key, 160)}")
    for key, tensor in (*adapter.others.items(), *adapter.base_copies.items()):
        if tensors[key].shape != tensor.shape:
            sides = f"{_format_shape(tensor.shape)} there, {_format_shape(tensors[key].shape)} here"
            resized = (
                "; add the tokens to the base first (`resize_token_embeddings`)"
                if _is_resized(tensor, tensors[key])
                else ""
            )
            raise UserError(f"{other}{short_name(key, 160)} is {sides}{resized}")
    for key, rows in adapter.rows.items():
        count, width = tensors[key].shape
        if not all(0 <= row < count and len(value) == width for row, value in rows.items()):
            sides = f"rows {min(rows)} to {max(rows)} of {len(next(iter(rows.values())))} there, {count} x {width} here"
            raise UserError(f"{other}{short_name(key, 160)}: {sides}")


def check_ties(adapter: Adapter, model: nn.Module, source: str | Path) -> None:
    """Check that an adapter changes tied weights in the same way under all their names, or not at all.

    Such a weight is one tensor that several modules use (often the embedding and the output head). An adapter that
    changes it for one of them alone could not be trained further; merging it unties them.

    Args:
        source: the adapter's folder, for the message.

    Raises:
        UserError: the adapter changes a tied weight under some of its names only, or to different values.
    """
    touched = {f"{path}.weight" for path in adapter.layers} | adapter.others.keys()
    for names in tied_groups(model):
        if touched & set(names) and not changes_alike(adapter, names):
            changed = " or ".join(sorted(touched & set(names)))
            raise UserError(
                f"{source}: changes {changed} alone, but {' and '.join(names)} are one tied weight here, so it "
                "cannot be trained further; merge it (`relora adapters merge`), which unties them"
            )


def changes_alike(adapter: Adapter, names: Sequence[str]) -> bool:
    """Tell whether an adapter replaces a tied weight by the same values under all its names."""
    values = [adapter.others.get(name) for name in names]
    factors = any(name.removesuffix(".weight") in adapter.layers for name in names)
    first = values[0]
    return not factors and first is not None and all(v is not None and torch.equal(v, first) for v in values)


def warn_of_notes(folder: str | Path, adapter: Adapter, model: nn.Module | None = None) -> None:
    """Log a warning for each note on the adapter in `folder` and, of its model, on layers that have no factors."""
    for note in (*adapter.notes, *(_without_factors(adapter, model) if model is not None else ())):
        _log.warning("warning: %s: %s", folder, note)


def _without_factors(adapter: Adapter, model: nn.Module) -> list[str]:
    """Find the layers of a model that an adapter's `target_modules` name and its file has no factors of."""
    ends = tuple(f".{name}" for name in adapter.targets)
    missing = [
        path
        for path, module in model.named_modules()
        if ends and f".{path}".endswith(ends) and path not in adapter.layers and linear_shape(module) is not None
    ]
    if not missing:
        return []
    which = missing[0] if len(missing) == 1 else f"{len(missing)} layers ({missing[0]}, ...)"
    return [f"`target_modules` names {which}, of which its file has no factors; these layers stay the base's"]


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return (out, in) of an `nn.Linear` or a GPT-2 `Conv1D`; None for any other module."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if not is_conv1d(module):
        return None
    in_features, out_features = module.get_parameter("weight").shape
    return out_features, in_features


def layer_shape(module: nn.Module, factors: Factors) -> tuple[int, int] | None:
    """Return the (out, in) that a module has for factors of their kind; None if it is not of this kind."""
    if not factors.of_embedding:
        return linear_shape(module)
    return (module.embedding_dim, module.num_embeddings) if isinstance(module, nn.Embedding) else None


def tied_groups(model: nn.Module) -> list[list[str]]:
    """Return the names of each tensor that has several, in model order."""
    groups: dict[int, list[str]] = defaultdict(list)
    for key, tensor in all_tensors(model).items():
        groups[id(tensor)].append(key)
    return [names for names in groups.values() if len(names) > 1]


def tied_names(model: nn.Module, key: str) -> list[str]:
    """Return all names that a model has for its tensor `key`, that name among them.

    Names that the model's configuration ties count even if its files hold two values, by which transformers unties
    them: PEFT goes by the configuration.
    """
    source_of = model.get_expanded_tied_weights_keys(all_submodels=True) if isinstance(model, PreTrainedModel) else {}
    source = source_of.get(key, key)
    by_configuration = [name for name in source_of if source_of[name] == source]
    same = next((names for names in tied_groups(model) if key in names), [key])
    return list(dict.fromkeys([*same, *([source, *by_configuration] if by_configuration else [])]))


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers of a model; a tied one stands under each of its names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _is_resized(theirs: Tensor, ours: Tensor) -> bool:
    """Tell whether two tensors differ in the number of their rows alone, as after tokens were added."""
    return theirs.dim() == 2 and theirs.shape[1:] == ours.shape[1:]


def _format_shape(shape: tuple[int, ...]) -> str:
    """Write a shape as in `4 x 8`."""
    return " x ".join(map(str, shape)) or "a number"
