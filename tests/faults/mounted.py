"""Small disks of their own, mounted for a test."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self


class Disk:
    """A tmpfs of its own, mounted while entered."""

    def __init__(self, place: Path, size: int, options: str = "") -> None:
        self.path = place / "disk"
        self.path.mkdir(exist_ok=True)
        self.options = f"size={size}{options}"

    def __enter__(self) -> Self:
        command = ["mount", "-t", "tmpfs", "-o", self.options, "tmpfs", str(self.path)]
        subprocess.run(command, check=True, capture_output=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        subprocess.run(["umount", "--lazy", str(self.path)], check=True)

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.path)], check=True, capture_output=True)

    def fill(self, spare: int = 0) -> None:
        """Leave `spare` bytes, in whole pages."""
        with (self.path / "filler").open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while shutil.disk_usage(self.path).free > spare:
                file.write(bytes(4096))


def can_mount() -> bool:
    """Whether this process may mount a file system."""
    if os.geteuid() or not shutil.which("mount"):
        return False
    try:
        with tempfile.TemporaryDirectory() as place, Disk(Path(place), 1 << 20):
            return True
    except subprocess.CalledProcessError:
        return False
