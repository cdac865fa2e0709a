"""The contents of adapter folders: a list of the adapters below a folder, and one adapter shown layer by layer."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from relora.adapters.adapter import Factors
from relora.adapters.peft_format import (
    CONFIG,
    TENSORS,
    read_adapter,
    read_config,
    shapes,
)
from relora.adapters.peft_reading import misreadings_on_base
from relora.errors import UserError
from relora.messages import first_line, short_name

_LORA_A = re.compile(r"\.lora_(?:embedding_)?A\b")
_BASE_COPY = ".base_layer.weight"
"""Ending of the key of a copy of the base's weight, which is no parameter of the adapter."""


@dataclass(frozen=True)
class Summary:
    """One adapter in a line."""

    name: str
    """Path of its folder below the listed one."""
    kind: str
    """LoRA, rsLoRA, DoRA, or PEFT's name of another method; `?` if that cannot be read."""
    r: list[int]
    """Ranks of its layers, each rank once, in increasing order."""
    targets: list[str]
    """Last parts of the layers' paths, such as `q_proj`, each once, sorted."""
    parameters: int
    bytes: int
    """Size of its tensor file."""
    base: str | None
    """Folder or hub id of the base model, as the adapter names it."""
    problem: str | None = None
    """Reason why the adapter cannot be read; None if it can."""


@dataclass(frozen=True)
class LayerSummary:
    """The update of one linear layer [out, inn] in an adapter."""

    path: str
    out: int
    inn: int
    r: int
    lora_alpha: float
    scaling: float
    update_norm: float
    """Frobenius norm of the update s·B A."""


@dataclass(frozen=True)
class Contents:
    """One adapter in full."""

    summary: Summary
    layers: list[LayerSummary]
    full_tensors: dict[str, list[int]]
    """Shapes of the tensors that were trained in full (PEFT's `modules_to_save`), by name."""
    base_copies: list[str] = field(default_factory=list)
    """Names of the base's weights that PEFT copied into the adapter (see `whole_tensors`)."""
    rows: dict[str, list[int]] = field(default_factory=dict)
    """Ids of the tokens whose rows were trained in full, by the name of their embedding."""
    misread_by_peft: list[str] | None = None
    """Lines on layers that PEFT reads otherwise (see `peft_reading`); None if the base is not here to tell by."""


def list_adapters(folder: str | Path) -> list[Summary]:
    """List every adapter in a folder and its subfolders, sorted by path; tensors are not loaded.

    Folders whose names begin with a dot are passed over: they hold adapters that are being written.

    Raises:
        UserError: no such folder, or no adapter in it. An adapter that cannot be read is listed with its `problem`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    found = sorted(file.parent for file in folder.rglob(CONFIG) if not _is_hidden(file.relative_to(folder)))
    if not found:
        raise UserError(f"{folder}: holds no adapter (no {CONFIG}, here or below)")
    return [summarize(path, str(path.relative_to(folder))) for path in found]


def show_adapter(folder: str | Path) -> Contents:
    """Read an adapter and describe it layer by layer.

    Raises:
        UserError: the folder holds no adapter, or one that cannot be read.
    """
    folder = Path(folder)
    adapter = read_adapter(folder)
    alphas = adapter.alphas()
    layers = [
        LayerSummary(path, *factors.shape, factors.r, alphas[path], factors.scaling, _update_norm(factors))
        for path, factors in adapter.layers.items()
    ]
    full = {key: list(tensor.shape) for key, tensor in adapter.others.items()}
    found = misreadings_on_base(adapter)
    return Contents(
        summarize(folder, folder.name),
        layers,
        full,
        base_copies=list(adapter.base_copies),
        rows={key: list(rows) for key, rows in adapter.rows.items()},
        misread_by_peft=None if found is None else list(map(str, found)),
    )


def summarize(folder: Path, name: str) -> Summary:
    """Describe the adapter in a folder from its configuration and the header of its tensor file alone.

    An adapter that cannot be read gives a summary that says so in `problem`; nothing is raised.

    Args:
        name: the `name` of the summary.
    """
    kind, base, size = "?", None, 0
    try:
        config = read_config(folder)
        kind, base = short_name(str(config.get("peft_type"))), config.get("base_model_name_or_path")
        base = None if base is None else short_name(str(base), 160)
        shape_by_name = shapes(folder)
        size = (folder / TENSORS).stat().st_size
    except (UserError, OSError) as error:
        return Summary(name, kind, [], [], 0, size, base, problem=first_line(str(error)))
    if kind == "LORA":
        kind = _lora_variant(config)
    lora_A = {key: shape for key, shape in shape_by_name.items() if _LORA_A.search(key) and len(shape) == 2}
    targets = {_LORA_A.split(key)[0].rpartition(".")[2] for key in lora_A}
    ranks = sorted({shape[0] for shape in lora_A.values()})
    parameters = sum(math.prod(shape) for key, shape in shape_by_name.items() if not key.endswith(_BASE_COPY))
    return Summary(name, kind, ranks, sorted(map(short_name, targets)), parameters, size, base)


def _lora_variant(config: Mapping[str, Any]) -> str:
    """Name the variant of LoRA that an adapter's configuration describes."""
    if config.get("use_dora"):
        return "DoRA"
    return "rsLoRA" if config.get("use_rslora") else "LoRA"


def _update_norm(factors: Factors) -> float:
    """Return the Frobenius norm |s·B A| without forming B A: |B A|² is the trace of (BᵀB)(AAᵀ)."""
    a, b = factors.lora_A.double(), factors.lora_B.double()
    return abs(factors.scaling) * ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt().item()


def _is_hidden(path: Path) -> bool:
    """Tell whether a part of the path begins with a dot, as the temporary folders do in which adapters are written."""
    return any(part.startswith(".") for part in path.parts)
