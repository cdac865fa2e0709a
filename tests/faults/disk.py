"""Disks that are full, read-only, broken or gone: the run stops with one line and loses nothing.

Whatever a disk does to a run, and at whatever moment, it ends with status 3 (2 before it began) and one line, keeps
its last sound checkpoint, and the same command, once the disk is well, ends with the bytes of a run that had no such
luck. A fault is either real (a small tmpfs, a read-only mount, a deleted folder) or an `OSError` raised in place of
the n-th file system call on the run folder.
"""

import builtins
import contextlib
import errno
import io
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Any, Self

import safetensors.torch
from tests.faults.mounted import Disk, can_mount
from tests.faults.tiny import Ended, Outcome, TinyRun, contents, tally

from relora.train.checkpoint import Checkpoints

ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS)
CALLS = [
    *((os, name) for name in ("open", "mkdir", "rename", "replace", "link", "unlink", "rmdir", "fsync", "truncate")),
    (io, "open"),
    (builtins, "open"),
    (safetensors.torch, "serialize_file"),
]
"""What a run writes and reads its files through."""


def campaign(trials: int, seed: int) -> list[tuple[str, int, int]]:
    """20 sizes of a small disk; every kind of fault at `trials` calls; the folders that cannot be written."""
    draw = Random(seed)
    with tempfile.TemporaryDirectory() as place:
        whole = TinyRun(Path(place), "whole").finished().result()
        rows = tally(failing_calls(Path(place), whole, trials, draw))
        rows += tally(removed_folders(Path(place), whole, max(trials // 4, 1), draw))
        if not can_mount():
            return rows
        rows += tally(small_disks(Path(place), whole, 20))
        rows += tally(disks_that_fill_up(Path(place), whole, trials, draw))
        return rows + tally(unwritable_folders(Path(place)))


class Calls:
    """While entered, counts the file system calls below a folder; before the one numbered `at`, runs `then`.

    With `lasting`, before every one from there on.
    """

    def __init__(
        self, folder: Path, at: int = -1, then: Callable[[], object] = lambda: None, *, lasting: bool = False
    ) -> None:
        self.folder, self.at, self.then, self.lasting = f"{folder}/", at, then, lasting
        self.count = 0
        self._lock = threading.RLock()  # a checkpoint is written by a thread
        self._inside = False

    def __enter__(self) -> Self:
        self._originals = [(module, name, getattr(module, name)) for module, name in CALLS]
        for module, name, original in self._originals:
            setattr(module, name, self._counted(original, first=1 if name == "serialize_file" else 0))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for module, name, original in self._originals:
            setattr(module, name, original)

    def _counted(self, original: Callable[..., Any], first: int) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            with self._lock:
                if not self._inside and self._is_below(arguments[first], options.get("dir_fd")):
                    number, self.count = self.count, self.count + 1
                    if number == self.at or (self.lasting and number > self.at >= 0):
                        self._inside = True  # what `then` does is not counted
                        try:
                            self.then()
                        finally:
                            self._inside = False
            return original(*arguments, **options)

        return call

    def _is_below(self, file: object, folder_descriptor: int | None) -> bool:
        if isinstance(file, int):
            with contextlib.suppress(OSError):
                return f"{Path(f'/proc/self/fd/{file}').readlink()}/".startswith(self.folder)
            return False
        path = Path(os.fsdecode(file))  # type: ignore[arg-type]
        if folder_descriptor is not None:
            path = Path(f"/proc/self/fd/{folder_descriptor}").readlink() / path
        return f"{path}/".startswith(self.folder)


def raising(number: int) -> Callable[[], None]:
    def fail() -> None:
        raise OSError(number, os.strerror(number))

    return fail


def calls_of(run: TinyRun) -> int:
    """How many calls an undisturbed run makes; a good deal more than that is never reached."""
    with Calls(run.folder) as calls:
        run.finished()
    shutil.rmtree(run.folder)
    return calls.count


def lost(run: TinyRun, ended: Ended, whole: dict[str, object], mend: Callable[[], object]) -> str | None:
    """What is wrong after a fault: how it ended, what is left, or what the same command makes of it after `mend`."""
    found, broken = Checkpoints(run.checkpoints).latest()
    there = Checkpoints(run.checkpoints).steps()
    mend()
    if ended.status not in (0, 3) and not (ended.status == 2 and found is None):
        return f"status {ended.status}: {ended.err}"
    complaint = ended.complaint(ended.status, *([str(run.folder)] if ended.status else []))
    if complaint:
        return complaint
    if broken or (there and found is None):
        return f"unsound checkpoints: {broken}"
    return after(run, whole)


def after(run: TinyRun, whole: dict[str, object]) -> str | None:
    """What the same command makes of it on a disk that is well."""
    ended = run.pretrain()
    complaint = ended.complaint(0)
    if complaint:
        return f"not continued: {complaint}"
    left = [path.name for path in run.checkpoints.iterdir() if not path.name.startswith("step-")]
    if left:
        return f"not swept: {left}"
    return None if run.result() == whole else "other bytes than the uninterrupted run"


def failing_calls(place: Path, whole: dict[str, object], trials: int, draw: Random) -> Iterator[Outcome]:
    """One call fails, or every call from one on; `trials` calls spread over the whole run, every error in turn."""
    run = TinyRun(place, "failing")
    total = calls_of(run)
    for trial in range(trials):
        at, number = trial * total // trials + draw.randrange(max(total // trials, 1)), ERRORS[trial % len(ERRORS)]
        for lasting in (False, True):
            with Calls(run.folder, at, raising(number), lasting=lasting):
                ended = run.pretrain()
            complaint = lost(run, ended, whole, lambda: None)
            what = "all calls from one on fail" if lasting else "one call fails"
            yield what, complaint and f"call {at} of {total}, {errno.errorcode[number]}: {complaint}"
            shutil.rmtree(run.folder, ignore_errors=True)


def removed_folders(place: Path, whole: dict[str, object], trials: int, draw: Random) -> Iterator[Outcome]:
    """The run folder is deleted while the run goes on: it stops, and does not leave half a folder behind."""
    run = TinyRun(place, "removed")
    total = calls_of(run)
    for trial in range(trials):
        at = total // 20 + trial * (total - total // 20) // trials
        with Calls(run.folder, at, lambda: shutil.rmtree(run.folder)):
            ended = run.pretrain()
        complaint = ended.complaint(3, str(run.folder)) or after(run, whole)
        yield "the run folder is removed", complaint and f"at call {at} of {total}: {complaint}"
        shutil.rmtree(run.folder, ignore_errors=True)


# Real disks


def small_disks(place: Path, whole: dict[str, object], levels: int) -> Iterator[Outcome]:
    """Disks from nothing to all that a run needs, half of them within what its checkpoints need; one without inodes."""
    peak = 6 << 20  # of which the report takes nearly all
    sizes = [(index + 1) * (1 << 20) // (levels // 2) for index in range(levels // 2)]
    sizes += [(1 << 20) + (index + 1) * (peak - (1 << 20)) // (levels - levels // 2) for index in range(levels // 2)]
    for size in sizes:
        with Disk(place, size) as disk:
            run = TinyRun(disk.path.parent, "disk/run")
            complaint = lost(run, run.pretrain(), whole, lambda: disk.remount("size=64m"))
            yield "a small disk", complaint and f"{size} bytes: {complaint}"
    for inodes in range(5, 60, 60 // levels * 3):
        with Disk(place, 64 << 20, f",nr_inodes={inodes}") as disk:
            run = TinyRun(disk.path.parent, "disk/run")
            complaint = lost(run, run.pretrain(), whole, lambda: disk.remount("nr_inodes=1000"))
            yield "a disk of few files", complaint and f"{inodes} inodes: {complaint}"


def disks_that_fill_up(place: Path, whole: dict[str, object], trials: int, draw: Random) -> Iterator[Outcome]:
    """Somebody else fills the disk at some call, but for up to 30 pages."""
    with Disk(place, 64 << 20) as disk:
        run = TinyRun(disk.path.parent, "disk/run")
        total = calls_of(run)
        for trial in range(trials):
            at, spare = trial * total // trials, draw.randrange(30) * 4096
            with Calls(run.folder, at, lambda spare=spare: disk.fill(spare)):
                ended = run.pretrain()
            complaint = lost(run, ended, whole, (disk.path / "filler").unlink)
            yield "a disk that fills up", complaint and f"at call {at} of {total}, but for {spare} bytes: {complaint}"
            shutil.rmtree(run.folder, ignore_errors=True)


def unwritable_folders(place: Path) -> Iterator[Outcome]:
    """A run folder, or the folder it would be made in, on a disk mounted read-only: status 2, nothing changed."""
    with Disk(place, 64 << 20) as disk:
        run = TinyRun(disk.path.parent, "disk/run").finished()
        before = contents(disk.path)
        disk.remount("ro")
        yield "a read-only run folder", run.pretrain().complaint(2, str(run.folder))
        other = f"output_dir={disk.path / 'another'}"
        yield "an unwritable parent", run.pretrain(other).complaint(2, str(disk.path / "another"))
        disk.remount("rw")
        complaint = None if contents(disk.path) == before else "something was changed"
        yield "nothing changed on a read-only disk", complaint
