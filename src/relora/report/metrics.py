"""The figures of a run as lines of JSON: `metrics.jsonl` and `restarts.jsonl`.

One record is one line, written at once and whole, so that a run killed anywhere leaves at most one torn line,
the last. A checkpoint stores the byte length of the file at its time; a resumed run cuts the file back to it,
so that no step stands twice. NaN and the infinities are not JSON: they are written as null (a loss that is
not finite stops the run anyway, and null keeps every line readable by any tool).
"""

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from typing import Any

from relora.errors import RunStopped, UserError
from relora.files.untrusted import inside

Record = Mapping[str, Any]
"""One line: a flat or nested mapping of JSON values."""

_BLOCK_BYTES = 1 << 16
_LARGEST = 1e100
"""Beyond what fp32 holds, and what sums and squares of float64 can bear."""


class JsonLines:
    """An append-only file of records. Opening it drops a torn last line; the folder must exist.

    Raises `UserError` if the file cannot be opened or is a link out of its folder, `RunStopped` if a line cannot be
    written (a full disk).
    """

    def __init__(self, path: Path) -> None:
        self.path = inside(path.parent, path.name)
        try:
            with ExitStack() as opened:
                # what cannot be written now is not tried again by close()
                self._file = opened.enter_context(path.open("ab", buffering=0))
                _drop_torn_line(path)
                self._file.seek(0, os.SEEK_END)
                opened.pop_all()
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}; give a writable output_dir") from None

    @property
    def size(self) -> int:
        """Bytes written so far, the ones of earlier runs included."""
        return self._file.tell()

    def append(self, record: Record) -> None:
        """Write one record as one line, at once."""
        line = json.dumps(_finite(record), ensure_ascii=False, allow_nan=False).encode() + b"\n"
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise self._stopped(error) from None

    def sync(self) -> None:
        """Make what was appended survive a power cut."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._stopped(error) from None

    def truncate(self, size: int) -> bool:
        """Cut the file back to `size` bytes and whole lines; False if it is shorter (somebody deleted or cut it)."""
        is_shorter = self.size < size
        if self.size > size:
            self._file.truncate(size)
            _drop_torn_line(self.path)  # where somebody edited the file, `size` may lie within a line
            self._file.seek(0, os.SEEK_END)
        return not is_shorter

    def close(self) -> None:
        self._file.close()

    def _stopped(self, error: OSError) -> RunStopped:
        return RunStopped(f"{self.path}: cannot be written: {error.strerror}; free some space and resume")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All records of a file; see `iter_json_lines`."""
    return list(iter_json_lines(path))


def iter_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file, one at a time. A torn last line is ignored.

    Raises `UserError` for a file that cannot be read and for any other line that is not a JSON object.
    """
    torn = 0
    try:
        with inside(path.parent, path.name).open("rb") as lines:
            for line_number, line in enumerate(lines, start=1):
                if torn:  # not the last line, so no kill has torn it
                    raise UserError(f"{path}:{torn}: not a JSON object; mend or delete this line")
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):  # bytes that are not UTF-8 are a ValueError, too
                    record = None
                if isinstance(record, dict):
                    yield record
                else:
                    torn = line_number
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def number(record: Record, key: str) -> float | None:
    """A figure of a record; None where it is absent, null, no number or larger than any that a run has."""
    value = record.get(key)
    return value if isinstance(value, int | float) and abs(value) < _LARGEST else None


def mean_relative_update(restart: Record) -> float:
    """Mean over the layers of |s B A| / |W| (Frobenius) of one restart; NaN where nothing was measured."""
    ratios = []
    for layer in restart.get("layers") or ():
        update, weight = number(layer, "update_norm"), number(layer, "weight_norm")
        if update is not None and weight:
            ratios.append(update / weight)
    return fmean(ratios) if ratios else math.nan


def mean_effective_rank(restart: Record) -> float:
    """Mean over the layers of the effective rank of the merged update; NaN where nothing was measured."""
    ranks = [number(layer, "effective_rank") for layer in restart.get("layers") or ()]
    known = [rank for rank in ranks if rank is not None]
    return fmean(known) if known else math.nan


def _finite(value: Any) -> Any:
    """The same tree with None in place of every float that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _drop_torn_line(path: Path) -> None:
    """Cut off what stands after the last line end: the rest of a line whose writer was killed. Reads the end only."""
    with path.open("rb+") as file:
        end = kept = file.seek(0, os.SEEK_END)
        while kept:
            start = max(0, kept - _BLOCK_BYTES)
            file.seek(start)
            line_end = file.read(kept - start).rfind(b"\n")
            if line_end >= 0:
                kept = start + line_end + 1
                break
            kept = start
        if kept < end:
            file.truncate(kept)
