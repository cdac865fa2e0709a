"""A disk that is full, or fills up: one line, and the same command continues once there is room."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cli.terminal import LONG_PHASES, assert_refused, done, start, wait_for
from tests.command import call


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB: room for the checkpoints of a tiny run, not for its report (5 MB)."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if (
        os.geteuid()
        or not shutil.which("mount")
        or subprocess.run(command, capture_output=True, check=False).returncode
    ):
        pytest.skip("this process may not mount a file system")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def enlarge(disk: Path, size: str = "64m") -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def fill(disk: Path) -> Path:
    """Write a file that takes all the free space, and return it."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return filler


def test_no_disk_space_for_a_run(config: Path, disk: Path) -> None:
    """The run is refused before it begins, and the same command starts it once there is room."""
    filler = fill(disk)
    arguments = ["pretrain", config, f"output_dir={disk / 'run'}"]
    assert_refused(call(*arguments), str(disk / "run"), "free")
    assert list(disk.iterdir()) == [filler]
    filler.unlink()
    enlarge(disk)
    done(*arguments)


def assert_stopped_itself(status: int, err: str, *words: str) -> None:
    assert status == 3 and err.startswith("relora: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err, err


def test_a_disk_that_fills_up_while_the_run_goes_on(config: Path, disk: Path) -> None:
    """The run ends with status 3 and one line; once there is room, the same command continues it."""
    enlarge(disk, "32m")
    overrides = [f"output_dir={disk / 'run'}", "schedule.total_steps=200", *LONG_PHASES]
    process = start(config, *overrides)
    wait_for(disk / "run", 15, process)  # past a checkpoint
    filler = fill(disk)
    _, err = process.communicate(timeout=60)
    assert_stopped_itself(process.returncode, err, str(disk / "run"), "space")
    filler.unlink()
    assert "continuing after step" in done("pretrain", config, *overrides)


def test_a_disk_that_has_no_room_for_the_report(config: Path, disk: Path) -> None:
    arguments = ["pretrain", config, f"output_dir={disk / 'run'}", "--quiet"]
    ended = call(*arguments)
    assert_stopped_itself(ended.status, ended.err, "report.html", "space")
    enlarge(disk)
    done(*arguments)


def test_continuing_needs_room_for_what_is_still_to_come_only(config: Path, disk: Path) -> None:
    """Room for files that the run has already written is not required again."""
    enlarge(disk)
    arguments = ["pretrain", config, f"output_dir={disk / 'run'}", "model.hidden_size=96", "model.vocab_size=4096"]
    done(*arguments)
    enlarge(disk, f"{(shutil.disk_usage(disk).used >> 10) + 17_000}k")  # 15 MB for one checkpoint and its swap
    done(*arguments)


def test_no_disk_space_to_prepare(disk: Path, tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"{name}: a page of words, and words again. " * 30)
    filler = fill(disk)
    pages = [tmp_path / f"{name}.txt" for name in "abc"]
    arguments = ["prepare", *pages, "--out", disk / "out", "--train-tokenizer", 300]
    ended = call(*arguments)
    assert ended.status in (2, 3) and ended.err.count("\n") == 1 and "space" in ended.err, ended.err
    filler.unlink()
    done(*arguments)
