"""Adapter folders: what is there, what is in one, one out of several, one out of what a full training changed."""

from dataclasses import dataclass
from pathlib import Path

import torch

from relora.adapters.peft_format import (
    CONFIG,
    TENSORS,
    Factors,
    alphas,
    read_adapter,
    read_config,
    shapes,
)
from relora.errors import UserError
from relora.messages import first_line, short_name


@dataclass(frozen=True)
class Summary:
    """One adapter of a list."""

    name: str
    """Path below the listed folder."""
    kind: str
    """LoRA, rsLoRA, DoRA, or PEFT's name of another method."""
    r: list[int]
    """The ranks of its layers, each once."""
    targets: list[str]
    """Last parts of the layers' names."""
    parameters: int
    bytes: int
    """Of its tensor file."""
    base: str | None
    problem: str | None = None
    """Why it cannot be read."""


@dataclass(frozen=True)
class LayerSummary:
    """One layer of an adapter."""

    path: str
    out: int
    inn: int
    r: int
    lora_alpha: float
    scaling: float
    update_norm: float
    """Frobenius norm of s·B A."""


@dataclass(frozen=True)
class Contents:
    """What is in one adapter."""

    summary: Summary
    layers: list[LayerSummary]
    full_tensors: dict[str, list[int]]
    """Shape by name of what was trained in full."""


def list_adapters(folder: str | Path) -> list[Summary]:
    """Every adapter in a folder and below it, by name; one that cannot be read says why. Tensors are not loaded."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    found = sorted(file.parent for file in folder.rglob(CONFIG) if not _hidden(file.relative_to(folder)))
    if not found:
        raise UserError(f"{folder}: holds no adapter (no {CONFIG}, here or below)")
    return [_summary(place, str(place.relative_to(folder))) for place in found]


def show_adapter(folder: str | Path) -> Contents:
    """What is in an adapter, layer by layer.

    Raises:
        UserError: not an adapter, or one that cannot be read.
    """
    folder = Path(folder)
    adapter = read_adapter(folder)
    alpha = alphas(adapter)
    layers = [
        LayerSummary(path, *factors.shape, factors.r, alpha[path], factors.scaling, _norm(factors))
        for path, factors in adapter.layers.items()
    ]
    full = {key: list(tensor.shape) for key, tensor in adapter.others.items()}
    return Contents(_summary(folder, folder.name), layers, full)


def _summary(folder: Path, name: str) -> Summary:
    """From the configuration and the header alone."""
    kind, base, size = "?", None, 0
    try:
        config = read_config(folder)
        kind, base = short_name(str(config.get("peft_type"))), config.get("base_model_name_or_path")
        base = None if base is None else short_name(str(base), 160)
        there = shapes(folder)
        size = (folder / TENSORS).stat().st_size
    except (UserError, OSError) as error:
        return Summary(name, kind, [], [], 0, size, base, problem=first_line(str(error)))
    if kind == "LORA":
        kind = "DoRA" if config.get("use_dora") else "rsLoRA" if config.get("use_rslora") else "LoRA"
    factors = {key: shape for key, shape in there.items() if ".lora_A" in key and len(shape) == 2}
    targets = {key.partition(".lora_A")[0].rpartition(".")[2] for key in factors}
    ranks = sorted({shape[0] for shape in factors.values()})
    parameters = sum(torch.Size(shape).numel() for shape in there.values())
    return Summary(name, kind, ranks, sorted(map(short_name, targets)), parameters, size, base)


def _norm(factors: Factors) -> float:
    """|s·B A|, without forming it: the trace of (BᵀB)(AAᵀ)."""
    a, b = factors.lora_A.double(), factors.lora_B.double()
    return abs(factors.scaling) * ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt().item()


def _hidden(path: Path) -> bool:
    """Written aside, and not there yet or not any more."""
    return any(part.startswith(".") for part in path.parts)
