"""Checkpoints: snapshot, written aside in the background, made sure of, renamed; only a manifest that verifies counts.

    checkpoints/step-00000500/
        weights.safetensors      all that trains and the buffers, by name; factors as they are
        frozen.safetensors       frozen weights, exact; the previous checkpoint's file where nothing was merged since
        optimizer.safetensors    `parameter name:key`
        state.json               where the run stands, and the lengths of the metric files
        manifest.json            written last: length, crc32 and sha256 of the other files, and what changes numbers

Plain tensors and JSON, nothing pickled. A kill at any moment leaves either the whole new checkpoint or the old ones.

Frozen weights change at restarts only, so in between they are a hard link to the file that is there: no bytes, and no
chain that could break, since a file lives as long as one checkpoint holds it. One damaged file would damage all that
share it, so two copies are kept: there is always an older checkpoint that shares nothing with the newest.
"""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from relora.errors import RunStopped, UserError
from relora.files.atomic import sync, write_durably
from relora.messages import first_line
from relora.train.state import Count, TrainState

FORMAT = 2
READABLE_FORMATS = (1, 2)
"""1 (release 0.1) has no frozen.safetensors: every weight is in weights.safetensors."""

FileName = Literal["weights.safetensors", "frozen.safetensors", "optimizer.safetensors", "state.json"]
FROZEN: Final = "frozen.safetensors"
Tensors = Mapping[str, Tensor]
T = TypeVar("T")


@dataclass(frozen=True)
class Digest:
    """What a file must be."""

    bytes: int
    crc32: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What manifest.json holds."""

    format: int
    settings: dict[str, str | int]
    """What changes numbers: versions, threads, device, dtype, the data."""
    files: dict[FileName, Digest]
    sha256: str | None = None
    """Of the three above; format 1 has none."""

    def signed(self) -> "Manifest":
        """The same, with its own checksum."""
        content = json.dumps(asdict(replace(self, sha256=None)), sort_keys=True)
        return replace(self, sha256=hashlib.sha256(content.encode()).hexdigest())


@dataclass(frozen=True, kw_only=True)
class SavedState(TrainState):
    """What state.json holds."""

    positions: dict[str, Count]
    """Bytes of the metric files, by name."""
    frozen_since: Count | None = None
    """The step before which the frozen weights last changed."""
    scheduled: bool = True
    """False where a signal asked for it: a run that goes back goes to one that every run of its kind has."""

    @property
    def progress(self) -> TrainState:
        """Without what is there for the files' sake."""
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

    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers, frozen ones included, on the CPU."""
        frozen = self._load(FROZEN) if FROZEN in self.manifest.files else {}
        return self._load("weights.safetensors") | frozen

    def optimizer(self) -> dict[str, Tensor]:
        """The optimizer's tensors, on the CPU; copies, since an optimizer keeps what it gets, and the file with it."""
        return {name: tensor.clone() for name, tensor in self._load("optimizer.safetensors").items()}

    def _load(self, name: FileName) -> dict[str, Tensor]:
        try:
            return load_file(self.folder / name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.folder / name}: cannot be read: {first_line(str(error))}") from None


class Checkpoints:
    """The `checkpoints/` folder of a run; writes one checkpoint at a time, in a thread unless `background` is off."""

    def __init__(self, folder: Path, keep_last: int = 2, *, background: bool = True) -> None:
        self.folder, self.keep_last, self.background = folder, keep_last, background
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[Checkpoint] | None = None
        self._last: Checkpoint | None = None  # written or opened here

    def save(
        self,
        state: SavedState,
        weights: Tensors,
        frozen: Tensors,
        optimizer: Tensors,
        settings: Mapping[str, str | int],
    ) -> None:
        """Begin to write the checkpoint of `state.step`; returns when a snapshot is taken, so that training goes on.

        Waits for the checkpoint before to be done. Afterwards the oldest beyond `keep_last` are dropped, but for the
        newest scheduled one and for one that shares no file with those that stay.

        Raises:
            RunStopped: this or the last checkpoint could not be written; earlier ones are untouched.
        """
        self.wait()
        if self._last is not None and self._last.step == state.step:
            return
        aside = self.folder / f".{_name(state.step)}.partial"
        try:
            for leftover in self.folder.glob(".step-*"):  # of a run that was killed while it saved
                shutil.rmtree(leftover)
            self.folder.mkdir(exist_ok=True)  # not its parent: a run folder that is gone is not made anew
            aside.mkdir()
            linked = self._link_frozen(aside, state) if frozen else None
        except OSError as error:
            raise self._not_written(state.step, error) from None
        snapshot: dict[FileName, Tensors] = {"weights.safetensors": weights, "optimizer.safetensors": optimizer}
        if frozen and linked is None:
            snapshot[FROZEN] = frozen
        if self.background:
            snapshot = {name: {key: _copied(tensor) for key, tensor in part.items()} for name, part in snapshot.items()}
        self._writing = self._writer.submit(self._write, aside, state, snapshot, linked, settings)
        if not self.background:
            self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """What is being written is finished, also where an error ends the run."""
        self._writer.shutdown()

    def wait(self) -> None:
        """Until nothing is being written; raises what went wrong with the last `save`."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self._last = writing.result()

    def check(self) -> None:
        """Raise what went wrong with the last `save`, if that is known by now; never waits."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def steps(self) -> list[int]:
        """Steps of the folders that look like checkpoints, ascending; not yet verified."""
        names = [path.name.removeprefix("step-") for path in self.folder.glob("step-*") if path.is_dir()]
        return sorted(int(name) for name in names if name.isascii() and name.isdigit() and len(name) == 8)

    def latest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that verifies, and one line for every newer one that does not."""
        return self._newest(self.steps())

    def go_back(self, step: int) -> tuple[Checkpoint | None, list[str]]:
        """The newest scheduled checkpoint at or before `step`, else the newest of any kind; newer ones are deleted.

        They belong to a part of the run that does not count any more.
        """
        steps = [earlier for earlier in self.steps() if earlier <= step]
        checkpoint, broken = self._newest([earlier for earlier in steps if self._is_scheduled(earlier)])
        if checkpoint is None:
            checkpoint, _ = self._newest(steps)
        for newer in self.steps():
            if checkpoint is not None and newer > checkpoint.step:
                shutil.rmtree(self.folder / _name(newer), ignore_errors=True)
        return checkpoint, broken

    def _newest(self, steps: list[int]) -> tuple[Checkpoint | None, list[str]]:
        broken: list[str] = []
        for step in reversed(steps):
            try:
                return self.open(step), broken
            except UserError as error:
                broken.append(str(error))
        return None, broken

    def _is_scheduled(self, step: int) -> bool:
        try:
            return _parse(SavedState, self.folder / _name(step) / "state.json").scheduled
        except UserError:
            return True  # damaged: to be found out, and said, when it is opened

    def open(self, step: int) -> Checkpoint:
        """Verify and open one checkpoint; `UserError` names the file that is missing or damaged."""
        folder = self.folder / _name(step)
        manifest = _read_manifest(folder)
        for name, expected in manifest.files.items():
            path = folder / name
            if path.is_symlink() or not path.is_file():
                raise UserError(f"{path}: missing, or not a plain file")
            try:
                sound = path.stat().st_size == expected.bytes and _digest(path) == expected
            except OSError as error:
                raise UserError(f"{path}: cannot be read: {error.strerror}") from None
            if not sound:
                raise UserError(f"{path}: damaged (its checksum differs from the manifest's)")
        state = _parse(SavedState, folder / "state.json")
        if state.step != step:
            raise UserError(f"{folder / 'state.json'}: of step {state.step}, in the folder of step {step}")
        self._last = Checkpoint(folder, state, manifest)
        return self._last

    def _link_frozen(self, aside: Path, state: SavedState) -> Digest | None:
        """The last checkpoint's frozen weights as those of the next, if they are the same; None if not, or no link.

        Not either if no other checkpoint would be left with a copy of its own.
        """
        last = self._last
        if last is None or FROZEN not in last.manifest.files or last.state.frozen_since != state.frozen_since:
            return None
        if all(self._copy(step) == self._copy(last.step) for step in self.steps()):
            return None
        try:
            os.link(last.folder / FROZEN, aside / FROZEN)
        except OSError:  # gone, or a file system without hard links
            return None
        return last.manifest.files[FROZEN]

    def _write(
        self,
        aside: Path,
        state: SavedState,
        tensors: Mapping[FileName, Tensors],
        linked: Digest | None,
        settings: Mapping[str, str | int],
    ) -> Checkpoint:
        final, old = self.folder / _name(state.step), self.folder / f".{_name(state.step)}.replaced"
        try:
            for name, part in tensors.items():
                save_file({key: tensor.contiguous() for key, tensor in part.items()}, aside / name)
                sync(aside / name)
            write_durably(aside / "state.json", json.dumps(asdict(state), indent=1))
            files: dict[FileName, Digest] = {name: _digest(aside / name) for name in (*tensors, "state.json")}
            if linked is not None:
                files[FROZEN] = linked
            manifest = Manifest(FORMAT, dict(settings), files).signed()
            write_durably(aside / "manifest.json", json.dumps(asdict(manifest), indent=1))
            if final.exists():  # of a part of the run that did not count, or damaged
                final.rename(old)
            aside.rename(final)
            for folder in (self.folder, self.folder.parent):
                sync(folder)
        except (OSError, SafetensorError) as error:  # safetensors wraps what the disk says
            shutil.rmtree(aside, ignore_errors=True)
            raise self._not_written(state.step, error) from None
        shutil.rmtree(old, ignore_errors=True)
        self._prune(state.step)
        return Checkpoint(final, state, manifest)

    def _prune(self, newest: int) -> None:
        """What cannot be deleted now stays until the next time."""
        steps = [step for step in self.steps() if step <= newest]  # a later one that is there failed to verify
        scheduled = [step for step in steps if self._is_scheduled(step)]
        kept = {*steps[-self.keep_last :], *scheduled[-1:]}
        copies = {self._copy(step) for step in kept}
        if len(kept) > len(copies) == 1:  # they share one file
            kept |= set([step for step in steps if self._copy(step) not in copies][-1:])
        for step in steps:
            if step not in kept:
                shutil.rmtree(self.folder / _name(step), ignore_errors=True)

    def _copy(self, step: int) -> int:
        """Which copy of the frozen weights a checkpoint holds: its inode; one without is like no other."""
        try:
            return (self.folder / _name(step) / FROZEN).stat().st_ino
        except OSError:
            return -step

    def _not_written(self, step: int, error: Exception) -> RunStopped:
        reason = getattr(error, "strerror", None) or str(error)
        return RunStopped(
            f"{self.folder / _name(step)}: checkpoint not written ({reason}); make room and run the same command again"
        )


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _copied(tensor: Tensor) -> Tensor:
    """On the CPU, and not touched by what training does next."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _read_manifest(folder: Path) -> Manifest:
    path = folder / "manifest.json"
    number = _parse(_Format, path).format
    if number not in READABLE_FORMATS:
        raise UserError(
            f"{path}: checkpoint format {number}, this version reads {' and '.join(map(str, READABLE_FORMATS))}; "
            "continue with the version that wrote it"
        )
    manifest = _parse(Manifest, path)
    if number > 1 and manifest != manifest.signed():
        raise UserError(f"{path}: damaged (its own checksum differs)")
    missing = {"weights.safetensors", "optimizer.safetensors", "state.json"} - manifest.files.keys()
    if missing:
        raise UserError(f"{path}: damaged (it does not list {min(missing)})")
    return manifest


@dataclass(frozen=True)
class _Format:
    format: int


def _parse(kind: type[T], path: Path) -> T:
    """A JSON file of ours as a checked dataclass."""
    if path.is_symlink() or not path.is_file():
        raise UserError(f"{path}: missing, or not a plain file")
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes(), strict=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValidationError:
        raise UserError(f"{path}: damaged") from None


def _digest(path: Path) -> Digest:
    """Length, crc32 and sha256 of a file."""
    length, crc, sha = 0, 0, hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            length, crc = length + len(chunk), zlib.crc32(chunk, crc)
            sha.update(chunk)
    return Digest(length, crc, sha.hexdigest())
