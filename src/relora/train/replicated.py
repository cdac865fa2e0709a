"""Checkpoints of a run whose ranks all have the whole model: rank 0 writes them, and all ranks read the same one."""

from pathlib import Path
from typing import Any

from relora.distributed.group import Group
from relora.train.checkpoint import Checkpoints
from relora.train.checkpoint_format import Checkpoint


class ReplicatedCheckpoints(Checkpoints):
    """The `checkpoints/` folder of a run of several processes, on a disk that all of them see."""

    def __init__(self, folder: Path, keep_last: int = 2, *, background: bool = True, group: Group) -> None:
        super().__init__(folder, keep_last, background=background)
        self._group = group

    def save(self, *args: Any, **kwargs: Any) -> None:
        """Write on rank 0 as `Checkpoints.save` does; the others wait until its part in the foreground is done."""
        if self._group.is_first:
            super().save(*args, **kwargs)
        self._group.meet("a checkpoint")

    def latest(self) -> tuple[Checkpoint | None, list[str]]:
        """Return the checkpoint that rank 0 finds, on all ranks, and what is damaged, on rank 0."""
        return self._of_first(super().latest() if self._group.is_first else (None, []))

    def go_back(self, step: int) -> tuple[Checkpoint | None, list[str]]:
        """Open the checkpoint that rank 0 goes back to, on all ranks; rank 0 deletes the newer ones."""
        return self._of_first(super().go_back(step) if self._group.is_first else (None, []))

    def _of_first(self, found: tuple[Checkpoint | None, list[str]]) -> tuple[Checkpoint | None, list[str]]:
        """Return what rank 0 has found, with the checkpoint opened on this rank as well."""
        checkpoint, broken = found
        step = self._group.broadcast(checkpoint.step if checkpoint else None)
        if step is None or self._group.is_first:
            return checkpoint, broken
        return self.open(step), []
