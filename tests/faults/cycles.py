"""Housekeeping over a thousand saves: never too many checkpoints, never none that is sound, nothing left behind.

And one process at a time in a run folder, whatever became of the one before.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from tests.faults.disk import Calls
from tests.faults.tiny import Outcome, TinyRun, tally

from relora.train.checkpoint import Checkpoints
from relora.train.checkpoint_format import SavedState

KEEP = 2
MERGED_EVERY = 7
"""Saves between two changes of the frozen weights."""
CONTINUED_EVERY = 10
"""Saves between two starts of the process."""


def campaign(trials: int, seed: int) -> list[tuple[str, int, int]]:
    """`trials` saves; then the lock."""
    with tempfile.TemporaryDirectory() as place:
        return tally(save_cycles(Path(place), trials, Random(seed))) + tally(locks(Path(place)))


def save_cycles(place: Path, trials: int, draw: Random) -> Iterator[Outcome]:
    """Saves with continued runs and the strays of killed ones in between, looked at before every call of theirs."""
    folder = place / "checkpoints"
    seen: dict[tuple[str, ...], tuple[int, bool]] = {}
    """All that was there before a call -> how many checkpoint folders, and whether one is sound."""

    def look() -> None:
        there = tuple(sorted(str(path) for path in folder.glob("step-*/*")))
        if there not in seen:
            reader = Checkpoints(folder, background=False)
            seen[there] = len(reader.steps()), reader.latest()[0] is not None

    checkpoints = Checkpoints(folder, KEEP)
    _save(checkpoints, 1)
    descriptors = open_descriptors()
    for step in range(2, trials + 2):
        seen.clear()
        with Calls(folder, 0, look, lasting=True):
            _save(checkpoints, step)
        most, always = max(count for count, _ in seen.values()), all(sound for _, sound in seen.values())
        # the third is the copy of the frozen weights that is not the newest's; between rename and pruning, one more
        yield "at most keep + 1 checkpoints", _unless(len(checkpoints.steps()) <= KEEP + 1, checkpoints.steps())
        yield "at most one more while the oldest is deleted", _unless(most <= KEEP + 2, most)
        yield "one is sound at every moment", _unless(always, seen)
        left = [path.name for path in folder.iterdir() if not path.name.startswith("step-")]
        yield "strays are swept", _unless(not left, left)
        yield (
            "open descriptors are constant",
            _unless(open_descriptors() <= descriptors + 1, open_descriptors()),
        )
        if step % CONTINUED_EVERY == 0:
            checkpoints = Checkpoints(folder, KEEP)
            found, broken = checkpoints.latest()
            yield "the newest is the one that was saved", _unless(not broken and found and found.step == step, broken)
            stray = folder / f".step-{draw.randrange(10**8):08d}.partial"
            stray.mkdir()
            (stray / "weights.safetensors").write_bytes(draw.randbytes(99))


def _save(checkpoints: Checkpoints, step: int) -> None:
    merges = step // MERGED_EVERY
    checkpoints.save(
        SavedState(step=step, tokens=step * 10, positions={}, frozen_since=merges),
        weights={"a": torch.full((8, 8), float(step))},
        frozen={"w": torch.full((8, 8), float(merges))},
        optimizer={"a:exp_avg": torch.full((8, 8), float(-step))},
        settings={"torch": "x"},
    )
    checkpoints.wait()


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _unless(good: object, shown: object) -> str | None:
    return None if good else str(shown)


# The lock


def started(run: TinyRun, *arguments: str) -> subprocess.Popen[str]:
    """`relora pretrain` in a process of its own, once it has written a line of metrics."""
    command = [sys.executable, "-c", "from relora.cli import main; main()", "pretrain", str(run.config), "--quiet"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    metrics = run.folder / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.05)
    return process


def locks(place: Path) -> Iterator[Outcome]:
    """A second process in a run folder is refused; one whose owner was killed is taken over."""
    run = TinyRun(place, "locked")
    longer = "schedule.total_steps=100000"
    process = started(run, longer)
    try:
        before = (run.folder / "config.yaml").read_bytes()
        for arguments in ((longer,), (longer, "--fresh")):
            complaint = run.pretrain(*arguments).complaint(2, str(run.folder), "another process")
            yield "a second process is refused", complaint
        unchanged = (run.folder / "config.yaml").read_bytes() == before and process.poll() is None
        yield "the first goes on", _unless(unchanged, process.returncode)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    # the end is brought near, so that the run that takes over comes to it
    yield "the folder of a killed process is taken over", run.pretrain("--fresh").complaint(0)
