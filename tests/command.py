"""The command line in this process: what a person at the terminal would see."""

import contextlib
import io
import sys
from typing import NamedTuple

from relora.cli import main


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str

    def complaint(self, status: int, *words: str) -> str | None:
        """None if it ended with `status` and, unless that is 0, with one line on stderr that has all of `words`."""
        if self.status != status:
            return f"status {self.status}, not {status}: {self.err or self.out}"
        line = self.err if status else ""
        if status and not (line.startswith("relora: ") and line.count("\n") == 1):
            return f"not one line: {line}"
        return next((f"{word!r} is not in {line!r}" for word in words if word not in line), None)


def call(*arguments: object) -> Ended:
    """`relora ARGUMENTS...`; an exception that would be a traceback comes out."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    previous, sys.argv = sys.argv, ["relora", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        assert isinstance(end.code, int | None)
        status = end.code or 0
    finally:
        sys.argv = previous
    return Ended(status, out.getvalue(), err.getvalue())
