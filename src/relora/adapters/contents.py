"""A list of the adapters below a folder, each in a line."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relora.adapters.peft_format import CONFIG, TENSORS, read_config, shapes
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


def _is_hidden(path: Path) -> bool:
    """Tell whether a part of the path begins with a dot, as the temporary folders do in which adapters are written."""
    return any(part.startswith(".") for part in path.parts)
