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
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from relora.errors import RunStopped, UserError

Record = Mapping[str, Any]
"""One line: a flat or nested mapping of JSON values."""


class JsonLines:
    """An append-only file of records. Opening it drops a torn last line; the folder must exist.

    Raises `UserError` if the file cannot be opened, `RunStopped` if a line cannot be written (a full disk).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("ab", buffering=0)  # what cannot be written now is not tried again by close()
            _drop_torn_line(path)
            self._file.seek(0, os.SEEK_END)
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
            raise RunStopped(f"{self.path}: cannot be written: {error.strerror}; free some space and resume") from None

    def truncate(self, size: int) -> None:
        """Cut the file back to `size` bytes; a shorter one (somebody deleted the file) is left as it is."""
        if size < self.size:
            self._file.truncate(size)
            self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        self._file.close()


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All records of a file. A torn last line is ignored.

    Raises `UserError` for a file that cannot be read and for any other line that is not a JSON object.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:  # also what bytes that are not UTF-8 raise
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif number < len(lines):
            raise UserError(f"{path}:{number}: not a JSON object; mend or delete this line")
    return records


def number(record: Record, key: str) -> float | None:
    """A figure of a record; None where it is absent, null or no number."""
    value = record.get(key)
    return value if isinstance(value, int | float) and math.isfinite(value) else None


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
    """Cut off what stands after the last line end: the rest of a line whose writer was killed."""
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)
