"""The one writer of files and folders: a target is written as a whole or not at all.

    with atomic_folder(Path("out/model"), replace=True) as partial:   # out/.model.partial, new and empty
        save_file(weights, partial / "model.safetensors")
        write_json(partial / "config.json", config)
    # out/model now holds these two files and nothing else; after any exception it is as it was before

`atomic_file` does the same for a single file, and `write_text` and `write_json` are short forms of it. The steps:

1. Remove what an earlier writer of the same target left behind when it was killed.
2. Let the caller write under a temporary name, `.NAME.partial`, beside the target: in the same folder, so that the
   rename does not cross file systems, and hidden, so that nobody who lists the folder takes it for a result.
3. Give every file the permissions that the umask leaves to new files (safetensors creates its files as 0600), and
   fsync every file and folder.
4. Rename the temporary to the target.
5. fsync the parent folder, so that the rename survives a power cut, too.

An exception in steps 1 to 4, `KeyboardInterrupt` and `SystemExit` included, removes the temporary and passes on.
SIGKILL and a power cut leave a temporary, which the next writer of the same target removes.

rename(2) replaces a file in one step, but not a folder with files in it. A folder that is replaced is therefore first
renamed to `.NAME.replaced` and deleted at the end. A process that is killed between the two renames leaves no target;
the next writer of the same target then puts the old folder back before it does anything else.

Price: one fsync per file and folder (about a millisecond each on an SSD), and for a while the disk holds both the old
and the new content.

Two processes that write one target at the same time use the same temporary name and destroy each other's work. A lock
that the kernel holds for each claimed output belongs at the beginning of `atomic_file` and `atomic_folder`, before
leftovers are removed. A manifest (names, sizes and checksums of a folder's files) belongs into `atomic_folder`, after
the caller's block and before `_make_durable`. Neither exists yet.
"""

import contextlib
import errno
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_file(path: Path, *, replace: bool, parents: bool = False) -> Iterator[Path]:
    """Yield a temporary path, where an empty file stands, and rename it to `path` when the block ends.

    Args:
        replace: take the place of a file that is there. Without it, a target that exists is an error.
        parents: create missing parent folders; they stay, whatever happens later.

    Raises:
        FileExistsError: `path` exists and `replace` is off.
        OSError: the disk refuses a write, or `path` is a folder. `path` is as it was.
    """
    partial = _hidden(path, "partial")
    _refuse_existing(path, replace)
    _create_parents(path, parents)
    try:
        partial.unlink(missing_ok=True)
        partial.touch(exist_ok=False)
        mode = stat.S_IMODE(partial.stat().st_mode)
        yield partial
        _make_durable(partial, mode)
        _refuse_existing(path, replace)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # the caller is to see the first error
            partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def atomic_folder(path: Path, *, replace: bool, parents: bool = False) -> Iterator[Path]:
    """Yield a temporary folder, new and empty, and rename it to `path` when the block ends.

    Args:
        replace: take the place of a folder that is there. Without it, a target that exists is an error.
        parents: create missing parent folders; they stay, whatever happens later.

    Raises:
        FileExistsError: `path` exists and `replace` is off.
        OSError: the disk refuses a write, or `path` is a file. `path` is as it was.
    """
    partial, replaced = _hidden(path, "partial"), _hidden(path, "replaced")
    if replaced.is_dir():  # left by a writer that was killed
        _restore(replaced, path)
        _remove(replaced)
    _refuse_existing(path, replace)
    _create_parents(path, parents)
    try:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.mkdir()
        mode = partial.stat().st_mode & 0o666  # the umask has taken the same bits from it as from a new file
        yield partial
        for entry in partial.rglob("*"):
            _make_durable(entry, mode)
        sync(partial)
        _refuse_existing(path, replace)
        if path.is_dir():
            path.rename(replaced)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):  # the caller is to see the first error
            _restore(replaced, path)
        raise
    sync(path.parent)
    if replaced.is_dir():
        _remove(replaced)


def write_text(path: Path, text: str, *, replace: bool = True) -> None:
    """Write a text file (UTF-8) through `atomic_file`; raises what that raises."""
    with atomic_file(path, replace=replace) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(
    path: Path, value: Any, *, indent: int | None = 1, ensure_ascii: bool = True, sort_keys: bool = False
) -> None:
    """Write `value` as JSON with a newline at its end, through `write_text`; the options are those of `json.dumps`."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, sort_keys=sort_keys) + "\n")


def sync(path: Path) -> None:
    """Make the content of a file, or the creations and renames in a folder, survive a power cut.

    Raises:
        OSError: the file could not be synced, so it must count as lost. For a folder this is ignored, since some file
            systems cannot sync folders and report that as an error.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hidden(path: Path, ending: str) -> Path:
    """Name a temporary of the target `path`: `.NAME.ending`, beside it."""
    return path.with_name(f".{path.name}.{ending}")


def _refuse_existing(path: Path, replace: bool) -> None:
    """Raise `FileExistsError` if the target is there, even as a broken link, and must not be replaced."""
    if not replace and os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


def _create_parents(path: Path, parents: bool) -> None:
    """Create the parent folders of the target if the caller asked for them."""
    if parents:
        path.parent.mkdir(parents=True, exist_ok=True)


def _make_durable(path: Path, mode: int) -> None:
    """Sync a file or a folder; a file is first given the permissions `mode`. A symbolic link is left alone."""
    if path.is_symlink():
        return
    # some file systems have one mode for all files and refuse chmod, so it is called only if the mode differs
    if path.is_file() and stat.S_IMODE(path.stat().st_mode) != mode:
        path.chmod(mode)
    sync(path)


def _restore(replaced: Path, path: Path) -> None:
    """Put a folder that was renamed to make room for its successor back to its place, if that is free."""
    if replaced.is_dir() and not os.path.lexists(path):
        replaced.rename(path)


def _remove(replaced: Path) -> None:
    """Delete a folder that has been replaced, or the link to it; what cannot be deleted stays for the next writer."""
    if replaced.is_symlink():
        replaced.unlink()
    else:
        shutil.rmtree(replaced, ignore_errors=True)
