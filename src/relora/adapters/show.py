"""One adapter shown layer by layer, with what PEFT reads otherwise of it.

It is apart from the list of adapters, which does without transformers and its import.
"""

from dataclasses import dataclass, field
from pathlib import Path

from relora.adapters.adapter import Factors
from relora.adapters.compatibility import warn_of_notes
from relora.adapters.contents import Summary, summarize
from relora.adapters.peft_format import read_adapter
from relora.adapters.peft_reading import misreadings_on_base


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


def show_adapter(folder: str | Path) -> Contents:
    """Read an adapter and describe it layer by layer.

    Raises:
        UserError: the folder holds no adapter, or one that cannot be read.
    """
    folder = Path(folder)
    adapter = read_adapter(folder)
    warn_of_notes(folder, adapter)
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


def _update_norm(factors: Factors) -> float:
    """Return the Frobenius norm |s·B A| without forming B A: |B A|² is the trace of (BᵀB)(AAᵀ)."""
    a, b = factors.lora_A.double(), factors.lora_B.double()
    return abs(factors.scaling) * ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt().item()
