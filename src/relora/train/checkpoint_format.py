"""The format of one checkpoint: its files, its manifest, and how they are verified.

    step-00000500/
        weights.safetensors      all that trains and the buffers, by name; factors as they are
        frozen.safetensors       frozen weights, exact; a hard link to the previous checkpoint's file until a restart
        optimizer.safetensors    `parameter name:key`
        state.json               position of the run, and the lengths of the metric files
        manifest.json            written last: length, crc32 and sha256 of the other files, and the numeric environment

Of a sharded run each file of tensors is one of a set, a file for each process (see `checkpoint_parts`).

Files hold plain tensors and JSON, nothing is pickled. A checkpoint is valid if its manifest verifies, not because its
folder exists.
"""

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Final, TypeVar

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from relora.errors import UserError
from relora.train.checkpoint_parts import (
    KINDS,
    Kind,
    PartOf,
    file_name,
    files_of,
    is_tensor_file,
    read_tensors,
)
from relora.train.state import Count, TrainState

FORMAT = 2


SHARDED_FORMAT = 3
"""Format of a checkpoint that several processes have written together."""


READABLE_FORMATS = (1, 2, 3)
"""Formats that can be opened. Format 1 (release 0.1) has no frozen.safetensors; weights.safetensors has all weights."""


FROZEN: Final = file_name("frozen")


STATE: Final = "state.json"


Tensors = Mapping[str, Tensor]


T = TypeVar("T")


@dataclass(frozen=True)
class Digest:
    """Length and checksums of a file."""

    bytes: int
    crc32: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Content of manifest.json."""

    format: int
    settings: dict[str, str | int]
    """Everything beside the configuration that changes numbers: versions, threads, device, dtype, the data."""
    files: dict[str, Digest]
    sha256: str | None = None
    """Checksum of the fields above; None in format 1."""

    def signed(self) -> "Manifest":
        """Return this manifest with `sha256` filled in."""
        content = json.dumps(asdict(replace(self, sha256=None)), sort_keys=True)
        return replace(self, sha256=hashlib.sha256(content.encode()).hexdigest())


@dataclass(frozen=True, kw_only=True)
class SavedState(TrainState):
    """Content of state.json."""

    positions: dict[str, Count]
    """Lengths of the metric files in bytes, by name."""
    frozen_since: Count | None = None
    """Step just before which the frozen weights last changed."""
    scheduled: bool = True
    """False where a signal asked for it. A rewind prefers scheduled ones, so its target does not depend on signals."""

    @property
    def progress(self) -> TrainState:
        """Return the fields of the training state alone."""
        return TrainState(**{field.name: getattr(self, field.name) for field in fields(TrainState)})


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose manifest has been verified."""

    folder: Path
    state: SavedState
    manifest: Manifest

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.state.step

    def weights(self, part_of: PartOf | None = None) -> dict[str, Tensor]:
        """Load parameters and buffers, frozen ones included, to the CPU: all of them, or the parts of this process."""
        return self._load("weights", part_of) | self._load("frozen", part_of)

    def optimizer(self, part_of: PartOf | None = None) -> dict[str, Tensor]:
        """Load the optimizer's tensors to the CPU, as copies: kept memory-mapped ones would keep the file alive."""
        return {name: tensor.clone() for name, tensor in self._load("optimizer", part_of).items()}

    def _load(self, kind: Kind, part_of: PartOf | None) -> dict[str, Tensor]:
        """Map the tensors of one kind; `UserError` if a file cannot be read."""
        return read_tensors([self.folder / name for name in files_of(kind, self.manifest.files) or ()], part_of)


def open_checkpoint(folder: Path, step: int, *, reader: int = 0, readers: int = 1) -> Checkpoint:
    """Verify and open the checkpoint in a folder.

    Args:
        reader: number of this process, from 0, among `readers` that verify the files together: each reads some.

    Raises:
        UserError: a file, which the message names, is missing, damaged, of an unknown format or of another step.
    """
    manifest = read_manifest(folder)
    for name, expected in list(manifest.files.items())[reader::readers]:
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise UserError(f"{path}: missing, or not a plain file")
        try:
            is_intact = path.stat().st_size == expected.bytes and digest_of(path) == expected
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        if not is_intact:
            raise UserError(f"{path}: damaged (its checksum differs from the manifest's)")
    state = parse_json(SavedState, folder / "state.json")
    if state.step != step:
        raise UserError(f"{folder / 'state.json'}: of step {state.step}, in the folder of step {step}")
    return Checkpoint(folder, state, manifest)


def read_manifest(folder: Path) -> Manifest:
    """Read and check manifest.json; `UserError` if its format is unknown, it is damaged, or a file is not listed."""
    path = folder / "manifest.json"
    number = parse_json(_Format, path).format
    if number not in READABLE_FORMATS:
        raise UserError(
            f"{path}: checkpoint format {number}, this version reads {' and '.join(map(str, READABLE_FORMATS))}; "
            "continue with the version that wrote it"
        )
    manifest = parse_json(Manifest, path)
    if number > 1 and manifest != manifest.signed():
        raise UserError(f"{path}: damaged (its own checksum differs)")
    if unknown := [name for name in manifest.files if name != STATE and not is_tensor_file(name)]:
        raise UserError(f"{path}: damaged (it lists {unknown[0]!r})")
    of_kinds = {kind: files_of(kind, manifest.files) for kind in KINDS}
    missing = [kind for kind, names in of_kinds.items() if names is None or (not names and kind != "frozen")]
    if missing or STATE not in manifest.files:
        raise UserError(f"{path}: damaged (it does not list {file_name(min(missing)) if missing else STATE})")
    return manifest


@dataclass(frozen=True)
class _Format:
    """The one field that the manifests of all formats have."""

    format: int


def parse_json(kind: type[T], path: Path) -> T:
    """Read a JSON file of a checkpoint as a dataclass; `UserError` if a field is missing or of another type."""
    if path.is_symlink() or not path.is_file():
        raise UserError(f"{path}: missing, or not a plain file")
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes(), strict=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValidationError:
        raise UserError(f"{path}: damaged") from None


def digest_of(path: Path) -> Digest:
    """Compute length, crc32 and sha256 of a file."""
    length, crc, sha = 0, 0, hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            length, crc = length + len(chunk), zlib.crc32(chunk, crc)
            sha.update(chunk)
    return Digest(length, crc, sha.hexdigest())
