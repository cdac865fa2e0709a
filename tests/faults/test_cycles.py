"""Nothing grows: checkpoints, files, memory, threads. At length: `python benchmarks/faults.py cycles` and `drift`."""

from pathlib import Path
from random import Random

from tests.faults import cycles, drift
from tests.faults.tiny import TinyRun, complaints


def test_save_cycles(tmp_path: Path) -> None:
    assert not complaints(cycles.save_cycles(tmp_path, 30, Random(0)))


def test_the_lock(tmp_path: Path) -> None:
    assert not complaints(cycles.locks(tmp_path))


def test_nothing_drifts(tmp_path: Path) -> None:
    """Files and threads here; memory needs a longer run to show more than noise."""
    taken = drift.samples(TinyRun(tmp_path), 100)
    assert len(taken) > 10 and not [line for line in complaints(drift.drift(taken, 100)) if "memory" not in line]


def test_drift_is_noticed() -> None:
    steady = [drift.Sample(step, 1000, 10, 2) for step in range(1000)]
    assert not complaints(drift.drift(steady, 1000))
    leaking = [drift.Sample(step, 1000 + step // 10, 10 + step // 100, 2) for step in range(1000)]
    assert [line.split()[0] for line in complaints(drift.drift(leaking, 1000))] == ["resident", "open"]
