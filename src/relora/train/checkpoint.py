"""Checkpoints: folders that are written in the background, synced, renamed when complete, and verified when opened.

    checkpoints/step-00000500/, one folder for each checkpoint; its files are those of `checkpoint_format`

A folder is written under a hidden name first and renamed when it is whole, so a kill at any moment leaves either the
whole new checkpoint or the old ones alone.

Frozen weights change at restarts only. In between, a checkpoint has a hard link to the file of the checkpoint before:
it costs no bytes, and deleting the older folder does not break it. One damaged file would damage all checkpoints that
share it, so two copies are kept: there is always an older checkpoint that shares no file with the newest. The price of
writing in the background is a copy of the written tensors in main memory.
"""

import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from safetensors import SafetensorError

from relora.errors import RunStopped, UserError
from relora.files.atomic import atomic_folder, sync, write_text
from relora.lowrank.division import Part
from relora.train.checkpoint_format import (
    FORMAT,
    STATE,
    Checkpoint,
    Digest,
    Manifest,
    SavedState,
    Tensors,
    digest_of,
    open_checkpoint,
    parse_json,
)
from relora.train.checkpoint_parts import Kind, file_name, write_tensors


@dataclass(frozen=True)
class Content:
    """Everything that goes into one checkpoint from this process."""

    partial: Path
    """The hidden folder that it is written in."""
    state: SavedState
    tensors: Mapping[Kind, Tensors]
    linked: Digest | None
    """Digest of the frozen weights, if they are a link to the last checkpoint's file."""
    settings: dict[str, str | int]
    parts: Mapping[str, Part]


class Checkpoints:
    """The `checkpoints/` folder of a run.

    Writes one checkpoint at a time, in a thread of its own unless `background` is False. As a context manager it waits
    at the end for the checkpoint that is being written, also where an error ends the run.
    """

    def __init__(self, folder: Path, keep_last: int = 2, *, background: bool = True) -> None:
        self.folder, self.keep_last, self.background = folder, keep_last, background
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[Checkpoint] | None = None
        self._last: Checkpoint | None = None  # the last one that was written or opened by this object

    def save(
        self,
        state: SavedState,
        weights: Tensors,
        frozen: Tensors,
        optimizer: Tensors,
        settings: Mapping[str, str | int],
        parts: Mapping[str, Part] | None = None,
    ) -> None:
        """Start writing the checkpoint of `state.step`; return as soon as the tensors are copied, so training goes on.

        Waits first until the previous checkpoint is written. Once the new one is written, only the last `keep_last`
        are kept, and besides them the newest scheduled one and one that shares no file with those that are kept.
        Does nothing if the last checkpoint written or opened is of this step.

        Args:
            weights: trainable tensors and buffers, by name.
            frozen: frozen weights, by name; empty where checkpoints do not hold them.
            optimizer: the optimizer's tensors, by `parameter name:key`.
            settings: everything beside the configuration that changes numbers; goes into the manifest.
            parts: those of the tensors that this process has a part of, by name.

        Raises:
            RunStopped: this or the previous checkpoint could not be written; earlier ones are untouched.
        """
        self.wait()
        if self._last is not None and self._last.step == state.step:
            return
        with ExitStack() as open_folder:
            try:
                partial = self._begun(open_folder, state.step)
                linked = self._link_frozen(partial, state) if frozen else None
            except OSError as error:
                raise self._not_written(state.step, error) from None
            snapshot: dict[Kind, Tensors] = {"weights": weights, "optimizer": optimizer}
            if frozen and linked is None:
                snapshot["frozen"] = frozen
            if self.background:
                snapshot = {kind: _copied(part) for kind, part in snapshot.items()}
            opened = open_folder.pop_all()  # from here on `_write` renames or removes the folder, in its own thread
            content = Content(partial, state, snapshot, linked, dict(settings), parts or {})
            self._writing = self._writer.submit(self._write, opened, content)
        if not self.background:
            self.wait()

    def _begun(self, open_folder: ExitStack, step: int) -> Path:
        """Create the hidden folder of a checkpoint, and let `open_folder` rename it, or remove it after an error."""
        for leftover in self.folder.glob(".step-*"):  # left by a run that was killed while it saved
            shutil.rmtree(leftover)
        self.folder.mkdir(exist_ok=True)  # without parents: a run folder that was deleted is not created again
        return open_folder.enter_context(atomic_folder(self.folder / folder_name(step), replace=True))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._writer.shutdown()

    def wait(self) -> None:
        """Wait until nothing is being written; raise the error of the last `save` if it failed."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self._last = writing.result()

    def check(self) -> None:
        """Raise the error of the last `save` if it has failed already; do not wait for one that is being written."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def steps(self) -> list[int]:
        """Return the steps of all checkpoint folders, ascending, without verifying the folders."""
        names = [path.name.removeprefix("step-") for path in self.folder.glob("step-*") if path.is_dir()]
        return sorted(int(name) for name in names if name.isascii() and name.isdigit() and len(name) == 8)

    def latest(self) -> tuple[Checkpoint | None, list[str]]:
        """Return the newest checkpoint that verifies, and one message for every newer one that does not."""
        return self._newest(self.steps())

    def go_back(self, step: int) -> tuple[Checkpoint | None, list[str]]:
        """Open the newest scheduled checkpoint at or before `step`, or else the newest of any kind; delete newer ones.

        The newer ones belong to a part of the run that is discarded.

        Returns:
            The checkpoint, None if none verifies, and one message for every newer scheduled one that does not.
        """
        steps = [earlier for earlier in self.steps() if earlier <= step]
        checkpoint, broken = self._newest([earlier for earlier in steps if self._is_scheduled(earlier)])
        if checkpoint is None:
            checkpoint, _ = self._newest(steps)
        for newer in self.steps():
            if checkpoint is not None and newer > checkpoint.step:
                shutil.rmtree(self.folder / folder_name(newer), ignore_errors=True)
        return checkpoint, broken

    def _newest(self, steps: list[int]) -> tuple[Checkpoint | None, list[str]]:
        """Return the newest of these checkpoints that verifies, and one message for every newer one that does not."""
        broken: list[str] = []
        for step in reversed(steps):
            try:
                return self.open(step), broken
            except UserError as error:
                broken.append(str(error))
        return None, broken

    def _is_scheduled(self, step: int) -> bool:
        """Whether a checkpoint was scheduled; True for a damaged one, so that `open` is tried and reports it."""
        try:
            return parse_json(SavedState, self.folder / folder_name(step) / "state.json").scheduled
        except UserError:
            return True

    def open(self, step: int) -> Checkpoint:
        """Verify and open one checkpoint.

        Raises:
            UserError: a file, which the message names, is missing, damaged or of an unknown format.
        """
        self._last = open_checkpoint(self.folder / folder_name(step), step)
        return self._last

    def _link_frozen(self, partial: Path, state: SavedState) -> Digest | None:
        """Link the last checkpoint's frozen weights into `partial` and return their digest.

        Returns None without a link if they have changed since, if all checkpoints share that copy (a second one is
        due), or if the file system has no hard links.
        """
        last, name = self._last, self._file("frozen")
        if last is None or name not in last.manifest.files or last.state.frozen_since != state.frozen_since:
            return None
        if all(self._copy_id(step) == self._copy_id(last.step) for step in self.steps()):
            return None
        try:
            os.link(last.folder / name, partial / name)
        except OSError:  # the file was deleted, or the file system has no hard links
            return None
        return last.manifest.files[name]

    def _write(self, open_folder: ExitStack, content: "Content") -> Checkpoint:
        """Write all files, the manifest last, close the folder and delete old checkpoints.

        A checkpoint of this step that is there already is replaced: it is damaged, or of a discarded part of the run.
        """
        state = content.state
        try:
            with open_folder:
                files = self._write_tensors(content)
                manifest = complete(content, files, FORMAT)
            sync(self.folder.parent)
        except (OSError, SafetensorError) as error:  # safetensors wraps errors of the disk in its own class
            raise self._not_written(state.step, error) from None
        self._prune(state.step)
        return Checkpoint(self.folder / folder_name(state.step), state, manifest)

    def _write_tensors(self, content: "Content") -> dict[str, Digest]:
        """Write this process's files of tensors; return their digests, with that of a linked one."""
        files = {}
        for kind, tensors in content.tensors.items():
            path = content.partial / self._file(kind)
            write_tensors(path, tensors, content.parts)
            files[path.name] = digest_of(path)
        return files if content.linked is None else files | {self._file("frozen"): content.linked}

    def _file(self, kind: Kind) -> str:
        """Return the name of the file in which this process saves tensors of a kind."""
        return file_name(kind)

    def _prune(self, newest: int) -> None:
        """Delete checkpoints that `save` does not keep; one that cannot be deleted is tried again next time."""
        steps = [step for step in self.steps() if step <= newest]  # later ones, if any, failed to verify
        scheduled = [step for step in steps if self._is_scheduled(step)]
        kept = {*steps[-self.keep_last :], *scheduled[-1:]}
        copies = {self._copy_id(step) for step in kept}
        if len(kept) > 1 and len(copies) == 1:  # all share one file: keep the newest that has another copy as well
            others = [step for step in steps if self._copy_id(step) not in copies]
            kept.update(others[-1:])
        for step in steps:
            if step not in kept:
                shutil.rmtree(self.folder / folder_name(step), ignore_errors=True)

    def _copy_id(self, step: int) -> int:
        """Inode of the frozen weights of a checkpoint, the same for all that share them; -step where there are none."""
        try:
            return (self.folder / folder_name(step) / self._file("frozen")).stat().st_ino
        except OSError:
            return -step

    def _not_written(self, step: int, error: Exception) -> RunStopped:
        """Build the error for a checkpoint that could not be written."""
        reason = getattr(error, "strerror", None) or str(error)
        folder = self.folder / folder_name(step)
        return RunStopped(f"{folder}: checkpoint not written ({reason}); make room and run the same command again")


def complete(content: Content, files: Mapping[str, Digest], number: int) -> Manifest:
    """Write the state and, last, the manifest of a checkpoint whose tensors are all written."""
    state = content.partial / STATE
    write_text(state, json.dumps(asdict(content.state), indent=1))
    manifest = Manifest(number, content.settings, {**files, STATE: digest_of(state)}).signed()
    write_text(content.partial / "manifest.json", json.dumps(asdict(manifest), indent=1))
    return manifest


def folder_name(step: int) -> str:
    """Return the name of a checkpoint's folder."""
    return f"step-{step:08d}"


def _copied(tensors: Tensors) -> Tensors:
    """Copy tensors to the CPU, so that the next training steps do not change what is saved."""
    plain = torch.contiguous_format
    return {key: tensor.detach().to("cpu", copy=True, memory_format=plain) for key, tensor in tensors.items()}
