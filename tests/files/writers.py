"""The two atomic writers behind one signature, and a process that is killed while it writes.

python -m tests.files.writers KIND TARGET CONTENT EVENT NTH
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from relora.files.atomic import atomic_file, atomic_folder


def nothing() -> None:
    """Run where a test does not interfere."""


class Write(Protocol):
    """Write `content` to `target`; `then` runs inside the block, after the content."""

    def __call__(
        self,
        target: Path,
        content: str,
        then: Callable[[], object] = ...,
        *,
        replace: bool = ...,
        parents: bool = ...,
    ) -> None: ...


def write_file(
    target: Path,
    content: str,
    then: Callable[[], object] = nothing,
    *,
    replace: bool = True,
    parents: bool = False,
) -> None:
    """Write a file that holds `content`."""
    with atomic_file(target, replace=replace, parents=parents) as partial:
        partial.write_text(content)
        then()


def write_folder(
    target: Path,
    content: str,
    then: Callable[[], object] = nothing,
    *,
    replace: bool = True,
    parents: bool = False,
) -> None:
    """Write a folder with `content` in a file of an inner folder, and a file named for the length of the content."""
    with atomic_folder(target, replace=replace, parents=parents) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "text").write_text(content)
        (partial / f"only of {len(content)}").touch()  # stays behind where two contents are mixed up
        then()


WRITERS: dict[str, Write] = {"file": write_file, "folder": write_folder}


def content_of(target: Path) -> str | None:
    """Return what one of the writers wrote, None if there is nothing; fail if the content is not whole."""
    if target.is_dir():
        text = (target / "inner" / "text").read_text()
        assert sorted(path.name for path in target.iterdir()) == ["inner", f"only of {len(text)}"]
        return text
    return target.read_text() if target.exists() else None


def main(kind: str, target: str, content: str, event: str, nth: str) -> None:
    """Write, and die by SIGKILL in the block (EVENT `body`) or just before the NTH audit event of that name."""
    left = int(nth)

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def count(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if name == event:
            left -= 1
            if left == 0:
                die()

    sys.addaudithook(count)
    WRITERS[kind](Path(target), content, die if event == "body" else nothing)


if __name__ == "__main__":
    main(*sys.argv[1:])
