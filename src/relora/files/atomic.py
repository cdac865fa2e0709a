"""Files that survive a kill and a power cut: written aside, synced, renamed.

After a crash a file holds what it held before or all that was to be written, never a part.
"""

import contextlib
import os
from pathlib import Path


def write_durably(file: Path, text: str) -> None:
    """Replace the content of `file` in one step; raises `OSError` as the disk does, and then `file` is as it was."""
    aside = file.with_name(f"{file.name}.partial")
    try:
        with aside.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(file)
    except OSError:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            aside.unlink(missing_ok=True)
        raise
    sync(file.parent)


def sync(path: Path) -> None:
    """Make a file's content, or what was created and renamed in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # some file systems cannot sync a folder and say so by OSError; a file that cannot be synced is lost
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def apply_umask(file: Path) -> None:
    """Give a file the mode of the user's other files; those of safetensors are private, and models are passed on."""
    mask = os.umask(0)
    os.umask(mask)
    file.chmod(0o666 & ~mask)
