"""Ranks that are lost: one of two processes under `torchrun --max-restarts`, killed or stopped at a random step.

A trial passes if the run ends with status 0 without anybody's help and its last checkpoint equals, bit for bit, that of
one process that nobody disturbed (`distributed.deterministic`).
"""

import os
import random
import signal
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tests.command import call
from tests.distributed.launched import STEPS, settings, tensors_of, torchrun, written
from tests.faults.tiny import DATA

from relora.report.metrics import read_json_lines

Rows = list[tuple[str, int, int]]
TIMEOUT_SECONDS = 8
LONGEST_SECONDS = 240


def campaign(trials: int, seed: int) -> Rows:
    """Kill one of two ranks `trials` times."""
    return [(f"SIGKILL of rank {rank}", *counted(trials // 2, seed + rank, rank, signal.SIGKILL)) for rank in (0, 1)]


def stops(trials: int, seed: int) -> Rows:
    """Stop one of two ranks `trials` times; the launcher waits 30 seconds before it kills a stopped process."""
    return [("SIGSTOP of rank 1", *counted(trials, seed, 1, signal.SIGSTOP))]


def counted(trials: int, seed: int, rank: int, number: int) -> tuple[int, int]:
    """How many of the trials passed, of how many."""
    draw = random.Random(seed)
    with TemporaryDirectory() as place:
        alone = Path(place) / "alone"
        call("pretrain", written(tree(alone), Path(place) / "alone.yaml"), "--quiet")
        expected = tensors_of(alone)
        passed = 0
        for trial in range(trials):
            folder = Path(place) / f"{trial}"
            seconds = disturbed(folder, rank, number, draw.randrange(1, STEPS), draw.random() * 0.1)
            passed += seconds is not None and same(tensors_of(folder), expected)
    return passed, trials


def tree(folder: Path) -> dict[str, object]:
    """The run of the tests, on data that is at hand."""
    return settings(
        DATA,
        folder,
        distributed={"deterministic": True, "timeout_seconds": TIMEOUT_SECONDS},
        checkpoint={"every_steps": 3},
    )


def disturbed(folder: Path, rank: int, number: int, step: int, delay: float) -> float | None:
    """Send a signal to a rank once a step is logged; seconds until the run has ended, None if it did not end well."""
    process = torchrun(
        2, "-m", "relora", "pretrain", written(tree(folder), folder.with_suffix(".yaml")), "--quiet", restarts=3
    )
    started, sent = time.monotonic(), False
    while process.poll() is None and time.monotonic() - started < LONGEST_SECONDS:
        if not sent and steps_of(folder) >= step:
            time.sleep(delay)
            child = process_of(process.pid, rank)
            sent = child is not None
            if child is not None:
                os.kill(child, number)
        time.sleep(0.01)
    if process.poll() is None:
        process.terminate()
    process.communicate()
    return time.monotonic() - started if sent and process.returncode == 0 else None


def steps_of(folder: Path) -> int:
    """Last step that a run has logged."""
    file = folder / "metrics.jsonl"
    return max((record["step"] for record in read_json_lines(file)), default=0) if file.exists() else 0


def process_of(launcher: int, rank: int) -> int | None:
    """Process of a rank that a launcher has started; None if it has none at the moment."""
    try:
        for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
            if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                return int(child)
    except OSError:
        pass
    return None


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two runs have the same bits."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
