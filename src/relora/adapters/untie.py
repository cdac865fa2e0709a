"""Untying a model folder, where an adapter changes a tied weight under one of its names alone.

PEFT computes with such an adapter as if the weights were two: factors on the head leave the embedding as it is, and the
other way round. A merged model must hold both. The tensors under the other names go into a weight file of their own,
and config.json says `tie_word_embeddings: false`. The price: the model is larger by the head.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from relora.adapters.compatibility import all_tensors, tied_groups
from relora.adapters.stored_model import INDEX, StoredModel
from relora.errors import UserError
from relora.files.atomic import write_json
from relora.files.untrusted import INDEX_BYTES, MB, read_json
from relora.model.load import open_model

_TIES = "tie_word_embeddings"


def untied_tensors(stored: StoredModel, changed: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
    """Return the tied tensors that the files do not hold, by those of their names that are not stored.

    Args:
        changed: the tensor that the merged model has under a name, from the base's.
    """
    found = {}
    for names in tied_groups(stored.model):
        kept = [name for name in names if name in stored.tensors]
        for name in names:
            if name not in stored.tensors:
                found[name] = changed(name, stored.find((kept or names)[0]).read()).contiguous()
    return found


def write_untied(folder: Path, tensors: Mapping[str, Tensor], stored: StoredModel) -> list[str]:
    """Add tensors to the copy of a model in `folder`, and let its configuration say that nothing is tied.

    Returns:
        The names of all weight files of the model.

    Raises:
        UserError: the model is tied whatever its configuration says.
    """
    index: dict[str, Any] = {"metadata": {}, "weight_map": {}}
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX, INDEX_BYTES)
    names = [file.name for file in stored.files]
    weight_map: dict[str, str] = index["weight_map"] or {one.name: one.file.name for one in stored.tensors.values()}
    renamed = {
        "model.safetensors": "model-00001-of-00002.safetensors"
    }  # transformers reads that name alone, if it is there
    for old, new in renamed.items():
        if old in names:
            (folder / old).rename(folder / new)
    added = "model-untied.safetensors"
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / added, metadata={"format": "pt"})
    weight_map = {name: renamed.get(file, file) for name, file in weight_map.items()} | dict.fromkeys(tensors, added)
    size = sum((folder / file).stat().st_size for file in set(weight_map.values()))
    metadata = {**index.get("metadata", {}), "total_size": size}
    write_json(folder / INDEX, {"metadata": metadata, "weight_map": weight_map}, indent=2)
    config = read_json(folder / "config.json", MB)
    (folder / "config.json").write_text(json.dumps(_untied(config), indent=2) + "\n", encoding="utf-8")
    with torch.device("meta"):
        again = open_model(folder)
    held = all_tensors(again)
    if any(
        held[one] is held[other]
        for group in tied_groups(stored.model)
        for one in group
        for other in group[:1]
        if one != other
    ):
        raise UserError(
            f"{stored.folder}: its weights stay tied whatever config.json says, so the adapter cannot be merged"
        )
    return sorted({renamed.get(name, name) for name in names} | {added})


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration that ties nothing, in itself and in its parts."""
    parts = {key: _untied(value) for key, value in config.items() if isinstance(value, dict) and _TIES in value}
    return {**config, **parts, _TIES: False}
