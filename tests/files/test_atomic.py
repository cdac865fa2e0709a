"""A target is written as a whole or not at all: after exceptions, full disks, kills and repeated writers."""

import errno
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tests.faults.mounted import Disk, can_mount
from tests.files.writers import WRITERS, Write, content_of, write_file, write_folder
from tests.paths import ROOT

from relora.files.atomic import atomic_file, atomic_folder, sync, write_json, write_text

needs_mount = pytest.mark.skipif(not can_mount(), reason="this process may not mount a file system")


def names_in(folder: str | Path) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


both = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


class Fault(Exception):
    """Whatever goes wrong in a caller's block."""


def raising(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@both
def test_a_target_appears_when_the_block_ends_and_nothing_else_is_left(tmp_path: Path, write: Write) -> None:
    write(tmp_path / "target", "first", lambda: holds(tmp_path / "target", None))
    assert content_of(tmp_path / "target") == "first"
    write(tmp_path / "target", "the second", lambda: holds(tmp_path / "target", "first"))
    assert content_of(tmp_path / "target") == "the second"
    assert names_in(tmp_path) == ["target"]


def holds(target: Path, content: str | None) -> None:
    assert content_of(target) == content


@both
@pytest.mark.parametrize("error", [Fault(), OSError(errno.EIO, "error"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
@pytest.mark.parametrize("before", [None, "the first"])
def test_after_an_exception_the_target_is_as_it_was(
    tmp_path: Path, write: Write, error: BaseException, before: str | None
) -> None:
    target = tmp_path / "target"
    if before:
        write(target, before)
    with pytest.raises(type(error)) as raised:
        write(target, "another", raising(error))
    assert raised.value is error and content_of(target) == before
    assert names_in(tmp_path) == (["target"] if before else [])


@both
def test_a_target_that_is_there_is_refused_unless_it_may_be_replaced(tmp_path: Path, write: Write) -> None:
    target = tmp_path / "target"
    write(target, "first", replace=False)
    with pytest.raises(FileExistsError, match="target"):
        write(target, "another", lambda: pytest.fail("the block was entered"), replace=False)
    assert content_of(target) == "first"
    target.rename(tmp_path / "other")
    target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        write(target, "another", replace=False)
    assert target.is_symlink() and names_in(tmp_path) == ["other", "target"]


@both
def test_a_target_that_appears_meanwhile_is_left_alone(tmp_path: Path, write: Write) -> None:
    with pytest.raises(FileExistsError):
        write(tmp_path / "target", "ours", lambda: (tmp_path / "target").write_text("theirs"), replace=False)
    assert (tmp_path / "target").read_text() == "theirs" and names_in(tmp_path) == ["target"]


@both
def test_parent_folders_are_created_only_if_asked_for(tmp_path: Path, write: Write) -> None:
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "a" / "b" / "target", "x")
    assert not names_in(tmp_path)
    write(tmp_path / "a" / "b" / "target", "x", parents=True)
    assert content_of(tmp_path / "a" / "b" / "target") == "x"


def test_a_file_does_not_take_the_place_of_a_folder_nor_a_folder_that_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("theirs")
    with pytest.raises(IsADirectoryError):
        write_file(tmp_path / "folder", "x")
    with pytest.raises(NotADirectoryError):
        write_folder(tmp_path / "file", "x")
    assert names_in(tmp_path) == ["file", "folder"]
    assert (tmp_path / "folder").is_dir() and (tmp_path / "file").read_text() == "theirs"


def test_the_folder_of_somebody_else_is_not_taken_for_a_leftover(tmp_path: Path) -> None:
    """A temporary name that a link or a file occupies: nothing is followed, and nothing is deleted."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "text").write_text("theirs")
    (tmp_path / ".target.partial").symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="symbolic link"):
        write_folder(tmp_path / "target", "x")
    write_file(tmp_path / "target", "x")  # replaces the link itself
    assert (tmp_path / "other" / "text").read_text() == "theirs" and content_of(tmp_path / "target") == "x"


def test_links_in_a_folder_are_kept_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").touch(0o600)
    with atomic_folder(tmp_path / "target", replace=True) as partial:
        (partial / "link").symlink_to(tmp_path / "other")
        (partial / "broken").symlink_to("nowhere")
    assert (tmp_path / "target" / "link").samefile(tmp_path / "other")
    assert stat.S_IMODE((tmp_path / "other").stat().st_mode) == 0o600


def test_a_link_to_a_folder_is_replaced_and_the_folder_is_not(tmp_path: Path) -> None:
    write_folder(tmp_path / "other", "theirs")
    for content in ("ours", "ours again"):
        (tmp_path / "target").symlink_to(tmp_path / "other")
        write_folder(tmp_path / "target", content)
        assert content_of(tmp_path / "target") == content and names_in(tmp_path) == ["other", "target"]
        (tmp_path / "target").rename(tmp_path / content)
        (tmp_path / content).rename(tmp_path.with_name(f"{tmp_path.name}-{content}"))
    assert content_of(tmp_path / "other") == "theirs"


# Permissions


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
        assert os.umask(mask) == mask  # the writer has left it alone
    finally:
        os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_get_the_mode_of_any_other(tmp_path: Path, mask: int, mode: int) -> None:
    """Those of safetensors, too, which creates its files as 0600."""
    tensors = {"x": torch.zeros(1)}
    with umask(mask):
        with atomic_file(tmp_path / "one", replace=True) as partial:
            save_file(tensors, partial)
            assert stat.S_IMODE(partial.stat().st_mode) == 0o600  # else there is nothing to do
        with atomic_folder(tmp_path / "folder", replace=True) as partial:
            (partial / "inner").mkdir()
            save_file(tensors, partial / "inner" / "two")
            (partial / "three").touch(0o777)
    files = [tmp_path / "one", tmp_path / "folder" / "inner" / "two", tmp_path / "folder" / "three"]
    assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [mode] * 3
    folders = [tmp_path / "folder", tmp_path / "folder" / "inner"]
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o777 & ~mask}


# Disks


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """Let every write of this process beyond `limit` bytes of a file fail with EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@both
def test_a_write_that_fails_in_the_middle_changes_nothing(tmp_path: Path, write: Write) -> None:
    write(tmp_path / "target", "first")
    with file_size_limit(100_000), pytest.raises(OSError) as raised:
        write(tmp_path / "target", "x" * 200_000)
    assert raised.value.errno == errno.EFBIG
    assert content_of(tmp_path / "target") == "first" and names_in(tmp_path) == ["target"]


@needs_mount
@both
def test_a_full_disk_changes_nothing(tmp_path: Path, write: Write) -> None:
    with Disk(tmp_path, 1 << 20) as disk:
        write(disk.path / "target", "first")
        with pytest.raises(OSError) as raised:
            write(disk.path / "target", "x" * (2 << 20))
        assert raised.value.errno == errno.ENOSPC
        assert content_of(disk.path / "target") == "first" and names_in(disk.path) == ["target"]
        disk.fill()
        with pytest.raises(OSError):
            write(disk.path / "target", "x" * 5000)
        assert content_of(disk.path / "target") == "first"


def test_all_is_synced_before_the_rename_and_the_parent_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []

    def note(descriptor: int) -> None:
        synced.append(os.path.relpath(Path(f"/proc/self/fd/{descriptor}").readlink(), tmp_path))

    monkeypatch.setattr(os, "fsync", note)
    write_file(tmp_path / "target", "x")
    assert synced == [".target.partial", "."]
    synced.clear()
    write_folder(tmp_path / "folder", "x")
    inner = {f".folder.partial/{name}" for name in ("inner", "inner/text", "only of 1")}
    assert {*synced[:-2]} == inner and synced[-2:] == [".folder.partial", "."]


def test_a_file_that_cannot_be_synced_is_an_error_and_a_folder_is_not(tmp_path: Path) -> None:
    sync(tmp_path)
    sync(Path("/proc/self"))  # EINVAL: its file system cannot
    with pytest.raises(OSError):
        sync(Path("/proc/self/status"))
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "nothing")


# Kills


def killed_writer(kind: str, target: Path, content: str, event: str, nth: int = 1) -> None:
    """Write in a process that kills itself in the block (`body`) or just before its nth event of that kind."""
    arguments = [kind, str(target), content, event, str(nth)]
    child = subprocess.run([sys.executable, "-m", "tests.files.writers", *arguments], cwd=ROOT, check=False)
    assert child.returncode == -signal.SIGKILL


@pytest.mark.parametrize("before", [None, "the first"])
@pytest.mark.parametrize("event", ["body", "os.rename"])
@pytest.mark.parametrize("kind", WRITERS)
def test_the_next_writer_clears_what_a_killed_one_left(
    tmp_path: Path, kind: str, event: str, before: str | None
) -> None:
    target, write = tmp_path / "target", WRITERS[kind]
    if before:
        write(target, before)
    killed_writer(kind, target, "of the killed", event)
    assert content_of(target) == before and (tmp_path / ".target.partial").exists()
    write(target, "of the next")
    assert content_of(target) == "of the next" and names_in(tmp_path) == ["target"]


@pytest.mark.parametrize("succeeds", [True, False])
def test_a_kill_between_the_two_renames_of_a_folder_loses_nothing(tmp_path: Path, succeeds: bool) -> None:
    target = tmp_path / "target"
    write_folder(target, "the first")
    killed_writer("folder", target, "of the killed", "os.rename", nth=2)
    assert not target.exists() and content_of(tmp_path / ".target.replaced") == "the first"
    if succeeds:
        write_folder(target, "of the next", lambda: holds(target, "the first"))
    else:
        with pytest.raises(Fault):
            write_folder(target, "of the next", raising(Fault()))
    assert content_of(target) == ("of the next" if succeeds else "the first")
    assert names_in(tmp_path) == ["target"]


def test_after_such_a_kill_the_old_folder_counts_as_there(tmp_path: Path) -> None:
    write_folder(tmp_path / "target", "the first")
    killed_writer("folder", tmp_path / "target", "of the killed", "os.rename", nth=2)
    with pytest.raises(FileExistsError):
        write_folder(tmp_path / "target", "of the next", replace=False)
    assert content_of(tmp_path / "target") == "the first"


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_rename_that_fails_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    write_folder(tmp_path / "target", "the first")
    rename, calls = os.rename, iter(range(1, 9))

    def fail(source: Path, target: Path) -> None:
        if next(calls) == fails_at:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
        patch.setattr(os, "rename", fail)
        write_folder(tmp_path / "target", "another")
    assert content_of(tmp_path / "target") == "the first" and names_in(tmp_path) == ["target"]


# Sequences

OUTCOMES = ["success", "error", "interrupt", "leftover", "between the renames"]
"""What becomes of one writer; the last two are what a kill leaves, laid there by hand, since a process takes long."""


@both
@given(steps=st.lists(st.tuples(st.sampled_from(OUTCOMES), st.text("abc\n", max_size=30)), max_size=12))
def test_a_target_always_holds_the_last_content_that_was_written_successfully(
    write: Write, steps: list[tuple[str, str]]
) -> None:
    with tempfile.TemporaryDirectory() as place, tempfile.TemporaryDirectory() as elsewhere:
        target, expected, renamed = Path(place) / "target", None, False
        for outcome, content in steps:
            if outcome == "leftover":
                write(Path(elsewhere) / "half", content)
                if not (Path(place) / ".target.partial").exists():
                    (Path(elsewhere) / "half").rename(Path(place) / ".target.partial")
                continue
            if outcome == "between the renames":
                if target.is_dir():
                    target.rename(Path(place) / ".target.replaced")
                    renamed = True
                continue
            error = {"error": Fault(), "interrupt": KeyboardInterrupt()}.get(outcome)
            if error is None:
                write(target, content)
                expected = content
            else:
                with pytest.raises(type(error)):
                    write(target, content, raising(error))
            renamed = False
            assert content_of(target) == expected
            assert names_in(place) == ([] if expected is None else ["target"])
        if renamed:  # until the next writer, whatever becomes of it
            assert content_of(Path(place) / ".target.replaced") == expected


# Short forms


def test_text_and_json(tmp_path: Path) -> None:
    write_text(tmp_path / "text", "é\n")
    assert (tmp_path / "text").read_bytes() == "é\n".encode()
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "text", "other", replace=False)
    value = {"b": "é", "a": [1]}
    write_json(tmp_path / "json", value)
    assert (tmp_path / "json").read_text() == json.dumps(value, indent=1) + "\n"
    write_json(tmp_path / "json", value, indent=None, ensure_ascii=False, sort_keys=True)
    assert (tmp_path / "json").read_text() == '{"a": [1], "b": "é"}\n'
    with pytest.raises(TypeError):
        write_json(tmp_path / "json", {1, 2})
    assert (tmp_path / "json").read_text() == '{"a": [1], "b": "é"}\n'
    assert names_in(tmp_path) == ["json", "text"]
