"""Tensors that replace those of the base, from what an adapter of PEFT holds beside the factors of linear layers.

    PATH.lora_embedding_A [r, rows], .lora_embedding_B [width, r]    E' = E + s (B A)^T, of an embedding E [rows, width]
    PATH.token_adapter.trainable_tokens_delta [n, width]             n rows of E are replaced (trainable_token_indices)
    PATH.base_layer.weight                                           a copy of the base's weight: PEFT adds one where an
                                                                     embedding or the head has factors

PEFT puts the copy into the base when it loads the adapter, so a copy that differs from the base counts, not the base.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from relora.adapters.adapter import Adapter, Factors

_log = logging.getLogger(__name__)


def settled(
    adapter: Adapter,
    tensor_of: Callable[[str], Tensor],
    tied_names: Callable[[str], Iterable[str]],
    source: str | Path,
) -> Adapter:
    """Return the same adapter with nothing but factors of linear layers and tensors in full.

    Args:
        tensor_of: returns the base's tensor of a name.
        tied_names: returns all names that the base has for the tensor of a name.
        source: the adapter's folder, for a warning about a base that is not the adapter's.
    """
    others = dict(adapter.others)
    for key, copy in adapter.base_copies.items():
        if torch.equal(tensor_of(key).to(copy), copy):
            continue
        _log.warning("warning: %s: its copy of the base's %s differs from that of this base, and is used", source, key)
        others[key] = copy
    for key, rows in adapter.rows.items():
        # PEFT trains the rows of a tied weight under all of its names
        for name in {key, *tied_names(key)}:
            if name == key or name not in adapter.rows:
                values = others[name] if name in others else tensor_of(name)
                indices = torch.tensor(list(rows), device=values.device)
                others[name] = values.index_copy(0, indices, torch.stack(list(rows.values())).to(values))
    for path, factors in adapter.layers.items():
        if factors.of_embedding:
            key = f"{path}.weight"
            weight = others[key] if key in others else tensor_of(key)
            others[key] = factors.added_to(weight.T).T.contiguous()
    return replace(adapter, layers=_linear(adapter.layers), others=others, base_copies={}, rows={})


def _linear(layers: Mapping[str, Factors]) -> dict[str, Factors]:
    """Return the factors of linear layers."""
    return {path: factors for path, factors in layers.items() if not factors.of_embedding}
