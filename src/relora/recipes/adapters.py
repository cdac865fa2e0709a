"""Adapter folders: what is there, what is in one, one out of several, one out of what a full training changed."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from relora.draws import keyed_generator
from relora.errors import UserError
from relora.lowrank.adapter_files import (
    CONFIG,
    TENSORS,
    Adapter,
    Factors,
    alphas,
    read_adapter,
    read_config,
    shapes,
    write_adapter,
)
from relora.lowrank.adapters import all_tensors
from relora.lowrank.combine import combine, low_rank_of
from relora.lowrank.inject import find_targets
from relora.lowrank.linear import LowRankConfig
from relora.mistakes import shown_line, shown_name
from relora.recipes.merging import MergeReport, UnmergeReport
from relora.recipes.stored import StoredModel

T = TypeVar("T")


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


@dataclass(frozen=True)
class Extraction:
    """What an extracted adapter keeps of a difference of models; energy is the sum of its squares."""

    out: str
    r: int
    layers: dict[str, float]
    """Share of the energy kept, by layer."""
    energy_kept: float
    """Of all these layers."""
    unchanged: list[str]
    """Layers that are the same in both models; not in the adapter."""
    left_out: list[str]
    """Other weights that differ (embeddings, norms, biases); not in the adapter."""


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


def combine_adapters(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    method: str = "svd",
    r: int | None = None,
    density: float | None = None,
    seed: int = 0,
) -> Summary:
    """Write `out`, one adapter of several (see `relora.lowrank.combine`).

    Raises:
        UserError: an adapter that cannot be read or combined, or `out` is there.
        RunStopped: the disk refuses the write.
    """
    adapters = [read_adapter(folder) for folder in folders]
    combined = combine(adapters, weights, method, r=r, density=density, seed=seed)
    return _summary(write_adapter(combined, out), Path(out).name)


def extract_adapter(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    r: int,
    target_modules: str | tuple[str, ...] = "all-linear",
    seed: int = 0,
) -> Extraction:
    """Write `out`, the adapter of rank r nearest to what a full training made of `base`, one layer at a time.

    Raises:
        UserError: models of different shapes, or alike in all targets, r too large, or `out` is there.
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
    for path in _with_progress(paths, "layers"):
        weight = before.weight(path)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        difference = after.weight(path).to(dtype) - weight.to(dtype)
        energy = difference.double().square().sum().item()
        if energy:
            factors, shares[path] = low_rank_of(difference, r, keyed_generator(seed, "extract", path))
            layers[path] = factors
            kept, total = kept + shares[path] * energy, total + energy
    if not layers:
        raise UserError(f"{tuned}: its linear layers are those of {base}; there is nothing to extract")
    adapter = Adapter(
        layers=layers,
        base=str(base),
        fan_in_fan_out=any(before.is_transposed(path) for path in layers),
        task_type="CAUSAL_LM",
    )
    return Extraction(
        out=str(write_adapter(adapter, out)),
        r=r,
        layers=shares,
        energy_kept=kept / total,
        unchanged=[path for path in paths if path not in layers],
        left_out=_other_differences(before, after, {f"{path}.weight" for path in paths}),
    )


def print_list(summaries: Sequence[Summary], console: Console | None = None) -> None:
    """Adapters as a table, one a row."""
    table = Table(box=None, pad_edge=False)
    for column in ("adapter", "type", "r", "targets", "parameters", "size", "base"):
        table.add_column(column, justify="right" if column in ("r", "parameters", "size") else "left", overflow="fold")
    for one in summaries:
        if one.problem is not None:
            table.add_row(one.name, one.kind, "-", one.problem, "-", _size(one.bytes), one.base or "-")
            continue
        ranks = f"{min(one.r)} ... {max(one.r)}" if len(one.r) > 1 else "".join(map(str, one.r)) or "-"
        targets = " ".join(one.targets) or "-"
        table.add_row(one.name, one.kind, ranks, targets, f"{one.parameters:,}", _size(one.bytes), one.base or "-")
    _console(console).print(table)


def print_contents(contents: Contents) -> None:
    """One adapter as tables."""
    print_list([contents.summary])
    table = Table(box=None, pad_edge=False)
    for column in ("layer", "out x in", "r", "lora_alpha", "scaling", "norm of the update"):
        table.add_column(column, justify="left" if column == "layer" else "right", overflow="fold")
    for layer in contents.layers:
        sides, norm = f"{layer.out} x {layer.inn}", f"{layer.update_norm:.4g}"
        table.add_row(layer.path, sides, str(layer.r), f"{layer.lora_alpha:g}", f"{layer.scaling:g}", norm)
    _console().print(table)
    for name, shape in contents.full_tensors.items():
        _console().print(f"trained in full: {name} ({' x '.join(map(str, shape))})")


def print_merge(report: MergeReport) -> None:
    """What a merge did, in lines."""
    print(f"{report.out}: {report.adapter} merged into {report.layers} layers of {report.base}", end="")
    print(f", {report.full_tensors} tensors replaced" if report.full_tensors else "", end="")
    print(f" ({_size(report.bytes)})")
    if report.largest_logit_difference is None:
        print("logits not compared")
    else:
        print(
            f"largest logit difference between base + adapter and merged, on {report.tokens} tokens: "
            f"{report.largest_logit_difference:.2e}"
        )


def print_unmerge(report: UnmergeReport) -> None:
    """What was taken out, in one line."""
    how = "bit for bit" if report.exact else f"every weight within {report.error_bound:.1e} of it"
    print(f"{report.out}: {report.base} again without {report.adapter}, {how}")


def print_extraction(report: Extraction) -> None:
    """What an extraction kept, as a table."""
    table = Table(box=None, pad_edge=False)
    table.add_column("layer", overflow="fold")
    table.add_column("energy kept", justify="right")
    for path, share in report.layers.items():
        table.add_row(path, f"{share:.1%}")
    table.add_row(f"all {len(report.layers)} layers, r = {report.r}", f"{report.energy_kept:.1%}")
    _console().print(table)
    if report.left_out:
        others = ", ".join(report.left_out[:4]) + (" ..." if len(report.left_out) > 4 else "")
        print(f"not in the adapter: {len(report.left_out)} other weights that differ ({others})")
    print(report.out)


def _summary(folder: Path, name: str) -> Summary:
    """From the configuration and the header alone."""
    kind, base, size = "?", None, 0
    try:
        config = read_config(folder)
        kind, base = shown_name(str(config.get("peft_type"))), config.get("base_model_name_or_path")
        base = None if base is None else shown_name(str(base), 160)
        there = shapes(folder)
        size = (folder / TENSORS).stat().st_size
    except (UserError, OSError) as error:
        return Summary(name, kind, [], [], 0, size, base, problem=shown_line(str(error)))
    if kind == "LORA":
        kind = "DoRA" if config.get("use_dora") else "rsLoRA" if config.get("use_rslora") else "LoRA"
    factors = {key: shape for key, shape in there.items() if ".lora_A" in key and len(shape) == 2}
    targets = {key.partition(".lora_A")[0].rpartition(".")[2] for key in factors}
    ranks = sorted({shape[0] for shape in factors.values()})
    parameters = sum(torch.Size(shape).numel() for shape in there.values())
    return Summary(name, kind, ranks, sorted(map(shown_name, targets)), parameters, size, base)


def _norm(factors: Factors) -> float:
    """|s·B A|, without forming it: the trace of (BᵀB)(AAᵀ)."""
    a, b = factors.lora_A.double(), factors.lora_B.double()
    return abs(factors.scaling) * ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt().item()


def _check_alike(before: StoredModel, after: StoredModel, tuned: str | Path) -> None:
    there, here = all_tensors(after.model), all_tensors(before.model)
    for name, tensor in here.items():
        if name not in there:
            raise UserError(f"{tuned}: of another architecture than the base (it has no {name})")
        if there[name].shape != tensor.shape:
            sides = [" x ".join(map(str, shape)) for shape in (there[name].shape, tensor.shape)]
            raise UserError(f"{tuned}: {name} is {sides[0]}, in the base {sides[1]}")


def _other_differences(before: StoredModel, after: StoredModel, targets: set[str]) -> list[str]:
    """Tensors beside the targets that are not the same."""
    names = [name for name in before.places if name not in targets and name in after.places]
    return [name for name in names if not _equal(before.places[name].read(), after.places[name].read())]


def _equal(one: Tensor, other: Tensor) -> bool:
    dtype = torch.promote_types(one.dtype, other.dtype)
    return torch.equal(one.to(dtype), other.to(dtype))


def _with_progress(items: Sequence[T], what: str) -> Iterable[T]:
    """A progress bar on a terminal, gone at the end; nothing elsewhere."""
    console = Console(stderr=True, force_terminal=sys.stderr.isatty())
    return track(items, what, len(items), console=console, transient=True, disable=not console.is_terminal)


def _hidden(path: Path) -> bool:
    """Written aside, and not there yet or not any more."""
    return any(part.startswith(".") for part in path.parts)


def _size(size: float) -> str:
    for unit in ("bytes", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _console(console: Console | None = None) -> Console:
    return console or Console(highlight=False)
