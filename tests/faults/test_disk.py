"""Whatever a disk does, nothing is lost; the whole campaign is `python benchmarks/faults.py disk`."""

import errno
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from tests.faults import disk
from tests.faults.disk import Calls, raising
from tests.faults.mounted import can_mount
from tests.faults.tiny import TinyRun, complaints

needs_mount = pytest.mark.skipif(not can_mount(), reason="this process may not mount a file system")
Result = dict[str, object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """What an undisturbed run ends with."""
    return TinyRun(tmp_path_factory.mktemp("whole")).finished().result()


def test_calls_that_fail(tmp_path: Path, whole: Result) -> None:
    assert not complaints(disk.failing_calls(tmp_path, whole, 6, Random(0)))


def test_a_removed_run_folder(tmp_path: Path, whole: Result) -> None:
    assert not complaints(disk.removed_folders(tmp_path, whole, 2, Random(0)))


@needs_mount
def test_small_disks(tmp_path: Path, whole: Result) -> None:
    assert not complaints(disk.small_disks(tmp_path, whole, 4))


@needs_mount
def test_disks_that_fill_up(tmp_path: Path, whole: Result) -> None:
    assert not complaints(disk.disks_that_fill_up(tmp_path, whole, 4, Random(0)))


@needs_mount
def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    assert not complaints(disk.unwritable_folders(tmp_path))


@pytest.mark.parametrize(
    "use",
    [
        lambda file: file.write_text("x"),
        lambda file: file.with_name("b").mkdir(),
        lambda file: file.rename(file.with_name("c")),
        lambda file: file.unlink(),
    ],
    ids=["write", "mkdir", "rename", "unlink"],
)
def test_calls_are_counted_and_fail_where_they_are_told_to(tmp_path: Path, use: Callable[[Path], object]) -> None:
    file = tmp_path / "folder" / "file"
    file.parent.mkdir()
    file.write_text("there")
    with Calls(tmp_path / "elsewhere", 0, raising(errno.EIO)) as calls:
        use(file)
    file.write_text("there")
    assert calls.count == 0
    with Calls(file.parent, 0, raising(errno.EIO)), pytest.raises(OSError, match="Input/output error"):
        use(file)
    assert file.read_text() == "there"
