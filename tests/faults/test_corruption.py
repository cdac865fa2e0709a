"""Damage is noticed, named and survived; the whole campaign is `python benchmarks/faults.py corruption`."""

from pathlib import Path
from random import Random

import pytest
from tests.faults import corruption
from tests.faults.corruption import IN_PLACE, Snapshot, files
from tests.faults.lies import lies
from tests.faults.tiny import TinyRun, complaints

from relora.train.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A finished run; every test leaves it as it was."""
    return TinyRun(tmp_path_factory.mktemp("corruption")).finished()


def test_the_run_has_all_that_can_be_damaged(run: TinyRun) -> None:
    """Frozen weights that the newest shares with one older checkpoint and not with another."""
    names = ["frozen.safetensors", "manifest.json", "optimizer.safetensors", "state.json", "weights.safetensors"]
    assert files(run) == names
    newest, *older = sorted(run.checkpoints.glob("step-*/frozen.safetensors"), reverse=True)
    assert {True, False} == {newest.samefile(file) for file in older}


def test_damaged_files(run: TinyRun) -> None:
    assert not complaints(corruption.damaged_files(run, 36, Random(0)))


def test_misplaced_files(run: TinyRun) -> None:
    assert not complaints(corruption.misplaced_files(run, Random(0)))


def test_a_damaged_shared_file_leaves_the_older_copy(run: TinyRun) -> None:
    """The frozen weights of the two newest checkpoints are one file."""
    snapshot = Snapshot(run.checkpoints)
    IN_PLACE["bit flipped"](max(run.checkpoints.glob("step-*")) / "frozen.safetensors", Random(0))
    newest, broken = Checkpoints(run.checkpoints).latest()
    assert newest is not None and newest.step == 10 and ["step-000000" in line for line in broken] == [True, True]
    snapshot.restore()
    assert snapshot.sound() == [14, 12, 10]


def test_checkpoints_that_lie(run: TinyRun) -> None:
    assert not complaints(lies(run, every=4))


def test_whole_runs(run: TinyRun) -> None:
    assert not complaints(corruption.whole_runs(run, 3, Random(0)))


def test_damaged_models(run: TinyRun) -> None:
    assert not complaints(corruption.damaged_models(run, Random(0), every=7))


def test_damaged_records(run: TinyRun) -> None:
    assert not complaints(corruption.damaged_records(run, Random(0), every=7))


def test_the_campaign_notices_what_goes_unnoticed(run: TinyRun, tmp_path: Path) -> None:
    """Its judge is no yes-man: a checkpoint that is taken though it is not the newest sound one is a complaint."""
    checkpoints = Checkpoints(run.checkpoints)
    assert corruption.unnoticed(checkpoints, [12, 10], "weights.safetensors") == "took 14, the newest sound one is [12]"
    assert corruption.unnoticed(checkpoints, [14, 12, 10], "weights.safetensors") is not None
