"""Checkpoints of a sharded run: every process writes its own rows, and one manifest commits all of them or none.

    step-00000500/
        weights-00001-of-00002.safetensors   frozen-00001-of-00002.safetensors   optimizer-00001-of-00002.safetensors
        weights-00002-of-00002.safetensors   frozen-00002-of-00002.safetensors   optimizer-00002-of-00002.safetensors
        state.json   manifest.json

Rank 0 creates the hidden folder, on a disk that all ranks see. Each rank writes its files in a thread of its own and
posts their digests, or why it could not. When all have, rank 0 writes the manifest and renames the folder; if one could
not, it removes the folder, and all ranks raise the same line. A kill at any moment leaves the earlier checkpoints.

Tensors that every process has whole (scalars, buffers, counts of steps) are in the first file. In a hybrid run the
ranks of the first replica write. When a checkpoint is opened each rank verifies some of the files.
"""

import shutil
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from torch import nn

from relora.distributed.group import Group
from relora.errors import PeerFailed, RunStopped, UserError
from relora.files.atomic import sync
from relora.lowrank import low_rank_layers
from relora.lowrank.division import Part, part_of, whole_shape
from relora.train.checkpoint import Checkpoints, Content, complete, folder_name
from relora.train.checkpoint_format import SHARDED_FORMAT, Checkpoint, Digest, Manifest, Tensors, open_checkpoint
from relora.train.checkpoint_parts import Kind, PartOf, file_name
from relora.train.optim import named_state

_POLL_SECONDS = 0.02
_LOOK_SECONDS = 1.0
"""Pause between two looks whether the other ranks are alive."""


def parts_of(model: nn.Module) -> dict[str, Part]:
    """Return how each of the tensors that `exact_tensors` names is divided; without those that are whole."""
    parts = {name: part_of(parameter) for name, parameter in model.named_parameters()}
    for path, layer in low_rank_layers(model).items():
        if layer.division is not None:
            parts[f"{path}.weight"] = Part(layer.division, int(layer.base.transposed), layer.out_features)
    return {name: part for name, part in parts.items() if part is not None}


def parts_of_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Part]:
    """Return how the tensors that `named_state` names are divided: those of a parameter's shape like the parameter."""
    parameters = dict(model.named_parameters())
    found = {}
    for name, tensor in named_state(model, optimizer).items():
        parameter = parameters[name.rpartition(":")[0]]
        if (part := part_of(parameter)) is not None and tensor.shape == parameter.shape:
            found[name] = part
    return found


def wanted_parts(model: nn.Module) -> PartOf | None:
    """Return a function that tells what this process wants of a saved tensor; None for a model that it has whole."""
    parts = parts_of(model)
    if not parts:
        return None
    shapes = {name: tuple(whole_shape(parameter)) for name, parameter in model.named_parameters()}

    def wanted(name: str, shape: Any) -> Part | None:
        parameter, _, _ = name.rpartition(":")
        if not parameter:
            return parts.get(name)
        return parts.get(parameter) if shapes.get(parameter) == tuple(shape) else None

    return wanted


class ShardedCheckpoints(Checkpoints):
    """The `checkpoints/` folder of a run whose ranks each hold a part of the model."""

    def __init__(
        self, folder: Path, keep_last: int = 2, *, background: bool = True, group: Group, writers: int
    ) -> None:
        """Open the folder.

        Args:
            writers: number of ranks, the first of all, that together have the whole model.
        """
        super().__init__(folder, keep_last, background=background)
        self._group, self._writers = group, writers
        self._saves = 0
        self._abandoned = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._abandoned = kind is not None  # others may have ended, so nobody waits for what they have not written
        super().__exit__(kind, error, traceback)

    @property
    def _writes(self) -> bool:
        """Whether this rank writes: it belongs to the first replica of the model."""
        return self._group.rank < self._writers

    def latest(self) -> tuple[Checkpoint | None, list[str]]:
        """Return the newest checkpoint of which all ranks have verified their files, and what is damaged, on rank 0."""
        return self._newest(self._group.broadcast(self.steps()))

    def go_back(self, step: int) -> tuple[Checkpoint | None, list[str]]:
        """Go back as `Checkpoints.go_back` does, on all ranks; rank 0 deletes the newer ones."""
        steps = [earlier for earlier in self._group.broadcast(self.steps()) if earlier <= step]
        scheduled = self._group.broadcast([earlier for earlier in steps if self._is_scheduled(earlier)])
        checkpoint, broken = self._newest(scheduled)
        if checkpoint is None:
            checkpoint, _ = self._newest(steps)
        if self._group.is_first and checkpoint is not None:
            for newer in self.steps():
                if newer > checkpoint.step:
                    shutil.rmtree(self.folder / folder_name(newer), ignore_errors=True)
        self._group.meet("an earlier checkpoint")
        return checkpoint, broken

    def open(self, step: int) -> Checkpoint:
        """Verify a checkpoint, each rank some of its files, and open it.

        Raises:
            UserError: a file, which the message names, is missing, damaged or of an unknown format; on all ranks alike.
        """
        checkpoint, failure = None, None
        try:
            folder = self.folder / folder_name(step)
            checkpoint = open_checkpoint(folder, step, reader=self._group.rank, readers=self._group.world)
        except UserError as error:
            failure = str(error)
        failures = [line for line in self._group.gather(failure) if line is not None]
        if failures:
            raise UserError(failures[0])
        self._last = checkpoint
        assert checkpoint is not None
        return checkpoint

    def _begun(self, open_folder: ExitStack, step: int) -> Path:
        """Let rank 0 create the hidden folder; the others look whether they see it."""
        self._saves += 1
        partial = self.folder
        with self._group.stage("a checkpoint"):
            if self._group.is_first:
                try:
                    partial = super()._begun(open_folder, step)  # the folder as the disk names it
                except OSError as error:
                    raise self._not_written(step, error) from None
        name: str = self._group.broadcast(partial.name)
        partial = self.folder / name
        with self._group.stage("a checkpoint"):
            if not partial.is_dir():
                raise RunStopped(f"{self.folder}: not seen by rank {self._group.rank}; all ranks need one disk")
        return partial

    def _write(self, open_folder: ExitStack, content: Content) -> Checkpoint:
        """Write this rank's files, let rank 0 complete the checkpoint, and wait until it has."""
        step, place = content.state.step, f"checkpoint/{self._saves}"
        self._group.post(f"{place}/{self._group.rank}", self._own_files(content))
        if not self._group.is_first:
            outcome = self._awaited(f"{place}/complete", step)
            if "failed" in outcome:
                raise PeerFailed(outcome["failed"], RunStopped.exit_status)
            manifest = TypeAdapter(Manifest).validate_python(outcome["manifest"])
            return Checkpoint(self.folder / folder_name(step), content.state, manifest)
        try:
            with open_folder:
                manifest = complete(content, self._files_of_all(place, step), SHARDED_FORMAT)
            sync(self.folder.parent)
        except (OSError, RunStopped) as error:
            failure = error if isinstance(error, RunStopped) else self._not_written(step, error)
            self._group.post(f"{place}/complete", {"failed": str(failure)})
            raise failure from None
        self._group.post(f"{place}/complete", {"manifest": asdict(manifest)})
        self._prune(step)
        return Checkpoint(self.folder / folder_name(step), content.state, manifest)

    def _files_of_all(self, place: str, step: int) -> dict[str, Digest]:
        """Wait for the files of all ranks, and return their digests; `RunStopped` if a rank could not write."""
        files: dict[str, Digest] = {}
        for rank in range(self._group.world):
            written = self._awaited(f"{place}/{rank}", step)
            if "failed" in written:
                raise RunStopped(written["failed"] if rank == 0 else f"rank {rank}: {written['failed']}")
            files |= {name: Digest(**digest) for name, digest in written["files"].items()}
        return dict(sorted(files.items()))

    def _awaited(self, key: str, step: int) -> dict[str, Any]:
        """Wait for what another rank posts; raise if it cannot any more, or this run has ended with an error."""
        looked = time.monotonic()
        while (value := self._fetched(key, step)) is None:
            if self._abandoned:
                raise self._not_written(step, OSError("the run ended while it was written"))
            if time.monotonic() - looked > _LOOK_SECONDS:
                looked = time.monotonic()
                if (lost := self._group.lost()) is not None:
                    raise self._not_written(step, OSError(lost))
            time.sleep(_POLL_SECONDS)
        return value

    def _fetched(self, key: str, step: int) -> dict[str, Any] | None:
        """Look whether something has been posted; `RunStopped` if rank 0, which keeps it, is gone."""
        try:
            value: dict[str, Any] | None = self._group.fetch(key)
        except RuntimeError:
            raise self._not_written(step, OSError("rank 0 is gone")) from None
        return value

    def _own_files(self, content: Content) -> dict[str, Any]:
        """Write this rank's files; return their digests, or the line that says why they could not be written."""
        if not self._writes:
            return {"files": {}}
        parts = content.parts
        tensors: dict[Kind, Tensors] = {
            kind: {name: tensor for name, tensor in held.items() if name in parts or self._group.is_first}
            for kind, held in content.tensors.items()
        }
        try:
            files = self._write_tensors(replace(content, tensors=tensors))
            for name in files:
                sync(content.partial / name)
        except (OSError, SafetensorError) as error:
            return {"failed": str(self._not_written(content.state.step, error))}
        return {"files": {name: asdict(digest) for name, digest in files.items()}}

    def _file(self, kind: Kind) -> str:
        return file_name(kind, self._group.rank % self._writers, self._writers)
