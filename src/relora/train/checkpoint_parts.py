"""Tensors of a checkpoint in several files, one for each process that held a part of them.

    weights.safetensors                     all tensors, whole
    weights-00001-of-00004.safetensors      own parts, and in the header what part of which tensor they are

The header's entry `parts` is JSON, {name: [dimension, first index, size of the whole tensor]}; a tensor without one
is whole, and stands in one file only. So any number of processes can read what any other number has written: each reads
the rows that it needs and no others. Files are mapped, so whole tensors need no memory twice.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from relora.errors import UserError
from relora.lowrank.division import Part
from relora.messages import first_line

Kind = Literal["weights", "frozen", "optimizer"]
KINDS: Final[tuple[Kind, ...]] = ("weights", "frozen", "optimizer")
_NAME = re.compile(r"(weights|frozen|optimizer)(?:-(\d{5})-of-(\d{5}))?\.safetensors")

PartOf = Callable[[str, Sequence[int]], Part | None]
"""(name, whole shape) -> the part of a saved tensor that this process wants; None: all of it."""


def file_name(kind: Kind, writer: int = 0, writers: int = 1) -> str:
    """Return the name of a file of tensors.

    Args:
        writer: number of the process that writes it, from 0, among `writers`.
    """
    return f"{kind}.safetensors" if writers == 1 else f"{kind}-{writer + 1:05d}-of-{writers:05d}.safetensors"


def files_of(kind: Kind, names: Iterable[str]) -> list[str] | None:
    """Return those of a checkpoint's files that hold one kind of tensors, in order; None if they are no full set."""
    found = sorted(name for name in names if (match := _NAME.fullmatch(name)) and match[1] == kind)
    if not found:
        return []
    match = _NAME.fullmatch(found[0])
    writers = int(match[3]) if match and match[3] else 1
    return found if found == [file_name(kind, writer, writers) for writer in range(writers)] else None


def is_tensor_file(name: str) -> bool:
    """Whether a checkpoint may have a file of tensors under this name."""
    return _NAME.fullmatch(name) is not None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], parts: Mapping[str, Part]) -> None:
    """Write the own parts of tensors; those without an entry in `parts` are whole."""
    ranges = {
        name: [part.dim, part.division.own(part.size).start, part.size]
        for name, part in parts.items()
        if name in tensors
    }
    metadata = {"parts": json.dumps(ranges)} if ranges else None
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


def read_tensors(paths: Sequence[Path], part_of: PartOf | None = None) -> dict[str, Tensor]:
    """Read tensors, or this process's parts of them, from the files that hold all of their parts.

    Raises:
        UserError: a file cannot be read, or the files do not hold the whole of a tensor.
    """
    found: dict[str, list[_Piece]] = {}
    path = Path()
    try:
        for path in paths:
            if part_of is None and len(paths) == 1:
                return load_file(path)
            with safe_open(path, framework="pt") as file:
                ranges = json.loads((file.metadata() or {}).get("parts", "{}"))
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    found.setdefault(name, []).append(_Piece(file.get_slice(name), *ranges.get(name, ())))
        return {name: _joined(pieces, part_of and part_of(name, _shape(pieces))) for name, pieces in found.items()}
    except (OSError, SafetensorError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read: {first_line(str(error))}") from None


@dataclass(frozen=True)
class _Piece:
    """A tensor in a file: a whole one, or a part of it."""

    content: Any
    """The tensor, not read yet."""
    dim: int = 0
    first: int = 0
    """Index of its first row in the whole tensor."""
    size: int | None = None
    """Size of the whole tensor in `dim`; None if this is all of it."""

    @property
    def shape(self) -> list[int]:
        """Shape of what is in the file."""
        return list(self.content.get_shape())

    def rows(self, start: int, stop: int) -> Tensor:
        """Read the rows of a range that are in this file."""
        here = self.shape[self.dim]
        low, high = (min(max(bound - self.first, 0), here) for bound in (start, stop))
        rows: Tensor = self.content[(slice(None),) * self.dim + (slice(low, high),)]
        return rows


def _shape(pieces: Sequence[_Piece]) -> list[int]:
    """Return the shape of the whole tensor."""
    shape = pieces[0].shape
    if pieces[0].size is not None:
        shape[pieces[0].dim] = pieces[0].size
    return shape


def _joined(pieces: Sequence[_Piece], part: Part | None) -> Tensor:
    """Read the part of a tensor, or all of it, from its pieces; `ValueError` if one is missing or there twice."""
    first, shape = pieces[0], _shape(pieces)
    if first.size is None:
        if len(pieces) > 1:
            raise ValueError("a whole tensor stands in two files")
        if part is None:
            whole: Tensor = first.content[...]
            return whole
        first = replace(first, dim=part.dim)
        pieces = [first]
    if part is not None and part.dim != first.dim:
        raise ValueError("a tensor is divided by another dimension")
    stop = 0
    for piece in pieces:
        if (piece.dim, piece.size, piece.first) != (first.dim, first.size, stop):
            raise ValueError("parts of a tensor do not fit together")
        stop += piece.shape[piece.dim]
    if stop != shape[first.dim]:
        raise ValueError("a part of a tensor is missing")
    wanted = slice(0, shape[first.dim]) if part is None else part.division.own(part.size)
    return torch.cat([piece.rows(wanted.start, wanted.stop) for piece in pieces], dim=first.dim)
