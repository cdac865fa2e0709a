"""A run of thousands of steps and a hundred restarts uses as much memory, threads and files at its end as early on.

Seen from outside: the run is a process of its own, and /proc says what it holds while metrics.jsonl says where it is.
"""

import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.faults.cycles import started
from tests.faults.tiny import Outcome, TinyRun, tally

RESTART_EVERY = 20
WARM_UP = 0.2
"""Share of the steps in which allocators and caches find their size."""
GROWTH = 0.01
"""Of resident memory, at most."""


class Sample(NamedTuple):
    """What a process holds at a step."""

    step: int
    resident_bytes: int
    descriptors: int
    threads: int


def campaign(trials: int, seed: int) -> list[tuple[str, int, int]]:
    """A run of `trials` steps, with a restart every 20; `seed` is the run's."""
    with tempfile.TemporaryDirectory() as place:
        return tally(drift(samples(TinyRun(Path(place)), trials, seed), trials))


def samples(run: TinyRun, steps: int, seed: int = 0) -> list[Sample]:
    """What the process of a run of `steps` steps holds, some twenty times a second."""
    overrides = {
        "seed": seed,
        "schedule.total_steps": steps,
        "restart.every_steps": RESTART_EVERY,
        "checkpoint.every_steps": RESTART_EVERY,
        "evaluate.every_steps": steps,
        "log.every_steps": 5,
    }
    process = started(run, *(f"{key}={value}" for key, value in overrides.items()))
    taken = []
    try:
        while process.poll() is None:
            time.sleep(0.05)
            taken += _sample(process.pid, run.folder / "metrics.jsonl")
    finally:
        process.kill()
        _, err = process.communicate()
    assert process.returncode == 0, err
    restarts = (run.folder / "restarts.jsonl").read_bytes().count(b"\n")
    assert restarts >= steps // RESTART_EVERY - 2, restarts
    return taken


def drift(taken: list[Sample], steps: int) -> Iterator[Outcome]:
    """Between the warm-up and the last restart, before the model is exported."""
    steady = [sample for sample in taken if steps * WARM_UP < sample.step < steps - RESTART_EVERY]
    quarter = max(len(steady) // 4, 1)
    early, late = steady[:quarter], steady[-quarter:]
    grown = max(s.resident_bytes for s in late) / max(s.resident_bytes for s in early) - 1
    what = f"resident memory grows by at most {GROWTH:.0%} over {steps} steps"
    yield f"{what} ({grown:+.2%})", None if grown <= GROWTH else f"{early[0]} to {late[-1]}"
    for name in ("descriptors", "threads"):
        # the fewest: a file that is open for the moment of a save comes and goes, one that leaks stays
        few_early, few_late = (min(getattr(sample, name) for sample in part) for part in (early, late))
        complaint = None if few_late <= few_early else f"{few_early} early, {few_late} late"
        yield f"open {name} are constant", complaint


def _sample(pid: int, metrics: Path) -> list[Sample]:
    try:
        resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        descriptors, threads = (len(list(Path(f"/proc/{pid}/{kind}").iterdir())) for kind in ("fd", "task"))
        last = metrics.read_bytes().splitlines()[-1]
        return [Sample(json.loads(last)["step"], resident, descriptors, threads)]
    except (OSError, IndexError, ValueError):  # ending, or a line that is being written
        return []
