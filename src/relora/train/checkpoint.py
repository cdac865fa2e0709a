"""Checkpoints: written aside, made sure of, renamed; a folder counts only if its manifest verifies.

    checkpoints/step-00000500/
        weights.safetensors      parameters and buffers by name, frozen weights exact, factors as they are
        optimizer.safetensors    `parameter name:key`
        state.json               step, tokens, lengths of the metric files
        manifest.json            written last: length, crc32 and sha256 of the other files, and what changes numbers

Plain tensors and JSON, nothing pickled. A kill at any moment leaves either the whole new checkpoint or the old ones.
"""

import contextlib
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from relora.errors import RunStopped, UserError

FORMAT = 1
_TENSOR_FILES = ("weights", "optimizer")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose manifest has been verified."""

    folder: Path
    step: int
    state: dict[str, Any]
    settings: dict[str, Any]
    """What changes numbers: versions, threads, device, dtype."""

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """`weights` or `optimizer`, on the CPU."""
        return load_file(self.folder / f"{kind}.safetensors")


class Checkpoints:
    """The `checkpoints/` folder of a run."""

    def __init__(self, folder: Path, keep_last: int = 2) -> None:
        self.folder, self.keep_last = folder, keep_last

    def save(
        self,
        state: Mapping[str, Any],
        weights: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        settings: Mapping[str, Any],
    ) -> Path:
        """Write the checkpoint of `state["step"]`, then drop the oldest beyond `keep_last`.

        Raises:
            RunStopped: the disk is full or cannot be written; earlier checkpoints are untouched.
        """
        final = self.folder / f"step-{state['step']:08d}"
        aside = self.folder / f".{final.name}.partial"
        try:
            for leftover in self.folder.glob(".step-*.partial"):  # of a run that was killed while it saved
                shutil.rmtree(leftover)
            aside.mkdir(parents=True)
            for kind, tensors in zip(_TENSOR_FILES, (weights, optimizer), strict=True):
                save_file(
                    {name: tensor.contiguous() for name, tensor in tensors.items()}, aside / f"{kind}.safetensors"
                )
            (aside / "state.json").write_text(json.dumps(dict(state), indent=1), encoding="utf-8")
            files = {path.name: _digest(path) for path in sorted(aside.iterdir())}
            manifest = {"format": FORMAT, "settings": dict(settings), "files": files}
            (aside / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            for path in (*aside.iterdir(), aside):
                _sync(path)
            if final.exists():  # the same step again, after a resume: same bytes
                shutil.rmtree(final)
            aside.rename(final)
            _sync(self.folder)
        except (OSError, SafetensorError) as error:  # safetensors wraps what the disk says
            shutil.rmtree(aside, ignore_errors=True)
            reason = getattr(error, "strerror", None) or str(error)
            raise RunStopped(
                f"{final}: checkpoint not written ({reason}); make room and run the same command again"
            ) from None
        # a later step that is there failed to verify, or this one would not be trained again: it counts for nothing
        for step in [step for step in self.steps() if step <= state["step"]][: -self.keep_last]:
            shutil.rmtree(self.folder / f"step-{step:08d}")
        return final

    def steps(self) -> list[int]:
        """Steps of the folders that look like checkpoints, ascending; not yet verified."""
        names = [path.name for path in self.folder.glob("step-*") if path.is_dir()]
        return sorted(int(name.removeprefix("step-")) for name in names if name.removeprefix("step-").isdigit())

    def latest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that verifies, and one line for every newer one that does not."""
        broken: list[str] = []
        for step in reversed(self.steps()):
            try:
                return self.open(step), broken
            except UserError as error:
                broken.append(str(error))
        return None, broken

    def open(self, step: int) -> Checkpoint:
        """Verify and open one checkpoint; `UserError` names the file that is missing or damaged."""
        folder = self.folder / f"step-{step:08d}"
        manifest = _read_json(folder / "manifest.json")
        if manifest.get("format") != FORMAT:
            raise UserError(f"{folder}: checkpoint format {manifest.get('format')}; this version reads format {FORMAT}")
        for name, expected in manifest["files"].items():
            path = folder / name
            if not path.is_file() or _digest(path) != expected:
                raise UserError(f"{path}: missing or damaged (its checksum differs from the manifest's)")
        return Checkpoint(folder, step, _read_json(folder / "state.json"), manifest["settings"])


def _digest(path: Path) -> dict[str, int | str]:
    """Length, crc32 and sha256 of a file."""
    length, crc, sha = 0, 0, hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            length, crc = length + len(chunk), zlib.crc32(chunk, crc)
            sha.update(chunk)
    return {"bytes": length, "crc32": crc, "sha256": sha.hexdigest()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{path}: missing or damaged") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: damaged (not a JSON object)")
    return value


def _sync(path: Path) -> None:
    """Make a file, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # some file systems cannot sync a folder and say so by OSError; a file that cannot be synced is a lost
        # checkpoint
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
