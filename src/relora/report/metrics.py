"""Metric files of a run, one JSON record per line: `metrics.jsonl` and `restarts.jsonl`.

Each line is written at once with one call, so that a run that is killed at any moment leaves at most one torn line, the
last. A checkpoint stores the byte length of the file at its time. A resumed run truncates the file to that length, so
that no step is recorded twice. NaN and the infinities are not JSON and are written as null, which keeps every line
readable by any tool.
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
"""Content of one line: a flat or nested mapping of JSON values."""

_BLOCK_BYTES = 1 << 16
"""Bytes that are read at a time when the end of a file is searched for the last line end."""
_LARGEST = 1e100
"""Largest magnitude that `number` accepts: above every fp32 value, and small enough to be squared in float64."""


class JsonLines:
    """Append-only file of records; a torn last line is cut off when the file is opened. The folder must exist.

    Raises:
        UserError: the file cannot be opened, or is a link that leads out of its folder.
        RunStopped: a line cannot be written later, for example on a full disk.
    """

    def __init__(self, path: Path) -> None:
        self.path = inside(path.parent, path.name)
        try:
            with ExitStack() as opened:
                # unbuffered: a line that could not be written is not written by close() later
                self._file = opened.enter_context(path.open("ab", buffering=0))
                _drop_torn_line(path)
                self._file.seek(0, os.SEEK_END)
                opened.pop_all()
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}; give a writable output_dir") from None

    @property
    def size(self) -> int:
        """Length of the file in bytes, including what earlier parts of the run wrote."""
        return self._file.tell()

    def append(self, record: Record) -> None:
        """Write one record as one line, immediately; `RunStopped` if that fails."""
        line = json.dumps(_finite(record), ensure_ascii=False, allow_nan=False).encode() + b"\n"
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise self._stopped(error) from None

    def sync(self) -> None:
        """Make all records written so far survive a power cut; `RunStopped` if that fails."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._stopped(error) from None

    def truncate(self, size: int) -> bool:
        """Truncate the file to `size` bytes and to whole lines.

        Returns:
            False if the file was shorter than `size`, because somebody deleted or cut it.
        """
        is_shorter = self.size < size
        if self.size > size:
            self._file.truncate(size)
            _drop_torn_line(self.path)  # `size` may lie within a line if somebody edited the file
            self._file.seek(0, os.SEEK_END)
        return not is_shorter

    def close(self) -> None:
        self._file.close()

    def _stopped(self, error: OSError) -> RunStopped:
        """Build the error for a file that cannot be written."""
        return RunStopped(f"{self.path}: cannot be written: {error.strerror}; free some space and resume")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return all records of a file; see `iter_json_lines`."""
    return list(iter_json_lines(path))


def iter_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a file, one at a time. A torn last line is ignored.

    Raises:
        UserError: the file cannot be read, or a line other than the last is not a JSON object.
    """
    bad_line = 0
    try:
        with inside(path.parent, path.name).open("rb") as lines:
            for line_number, line in enumerate(lines, start=1):
                if bad_line:  # another line follows it, so it was not torn by a kill
                    raise UserError(f"{path}:{bad_line}: not a JSON object; mend or delete this line")
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):  # bytes that are not UTF-8 raise a ValueError as well
                    record = None
                if isinstance(record, dict):
                    yield record
                else:
                    bad_line = line_number
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def number(record: Record, key: str) -> float | None:
    """Return a number of a record; None where it is absent, null, of another type, or too large to compute with."""
    value = record.get(key)
    return value if isinstance(value, int | float) and abs(value) < _LARGEST else None


def mean_relative_update(restart: Record) -> float:
    """Average |s B A| / |W| (Frobenius norms) over the layers of one restart; NaN where no layer has both norms."""
    ratios = []
    for layer in restart.get("layers") or ():
        update, weight = number(layer, "update_norm"), number(layer, "weight_norm")
        if update is not None and weight:
            ratios.append(update / weight)
    return fmean(ratios) if ratios else math.nan


def mean_effective_rank(restart: Record) -> float:
    """Average the effective rank of the merged update over the layers of one restart; NaN where no layer has it."""
    ranks = [number(layer, "effective_rank") for layer in restart.get("layers") or ()]
    known = [rank for rank in ranks if rank is not None]
    return fmean(known) if known else math.nan


def _finite(value: Any) -> Any:
    """Copy a tree of JSON values with None in place of every float that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _drop_torn_line(path: Path) -> None:
    """Cut off everything after the last line end: part of a line whose writer was killed. Reads only the file's end."""
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
