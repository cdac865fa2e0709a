"""Records from files, folders and hub datasets: one mapping of column to value at a time, in a fixed order.

    name.jsonl                      one JSON object a line
    name.json                       an array of JSON objects, read whole; or one object a line
    name.csv                        a row of column names, then one record a row (RFC 4180)
    name.parquet                    one record a row
    each also with .gz or .zst
    FOLDER                          all of the above in it, recursively, sorted by path; not README and hidden files
    FOLDER from save_to_disk        a `datasets` Dataset, or the split `train` of a DatasetDict
    owner/name, owner/name:config   the split `train` of a dataset on the Hugging Face hub, streamed

Memory is bounded by the largest record, but for .json, which is bounded by `LARGEST_ARRAY`.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet

from relora.data.pretraining.sources import COMPRESSIONS, HUB_ID
from relora.data.readers import BAD_RECORD, LONGEST_LINE, MOST_NAMES, decompressed, hub_revision
from relora.data.sampling import DRAWS, SplitRule
from relora.errors import RunStopped, UserError
from relora.files.untrusted import no_address, regular_file
from relora.messages import LONGEST_PATH, first_line, short_name

RECORD_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")

LARGEST_ARRAY = 1 << 28
"""Bytes of a .json file, decompressed: an array is parsed whole, which takes several times as much memory."""


@dataclass(frozen=True)
class Record:
    """One record, and where it stands, for a person."""

    where: str
    fields: Mapping[str, Any]


class Records:
    """The records of all sources, in order, as often as asked.

    Args:
        sources: paths or hub ids, as in the module's table.
        skip_bad: count records that cannot be read (`skipped`) instead of refusing them.

    `UserError` for a source that is not there, and while iterating for one that cannot be read.
    """

    def __init__(self, sources: Sequence[str], *, skip_bad: bool = False) -> None:
        if not sources:
            raise UserError("no source given; give a file, a folder or a dataset")
        self._parts = [part for source in sources for part in _resolve(source)]
        self._skip_bad = skip_bad
        self.skipped = 0

    def __iter__(self) -> Iterator[Record]:
        self.skipped = 0
        for part in self._parts:
            rows = self._file(part) if isinstance(part, Path) else part(self._bad)
            for where, fields in rows:
                if isinstance(fields, dict):
                    yield Record(where, fields)
                else:
                    self._bad(f"{where}: not a JSON object")

    def _file(self, file: Path) -> Iterator[tuple[str, Any]]:
        """The records of one file; what is wrong with it as a whole is one bad record."""
        empty = True
        try:
            with file.open("rb") as raw:
                reader = _READERS[str(_format(file))]
                for row in reader(decompressed(raw, file.name), str(file), self._bad):
                    empty = False
                    yield row
            if empty:
                self._bad(f"{file}: holds no record")
        except UnicodeDecodeError as error:
            self._bad(f"{file}: not UTF-8 text ({error.reason}); convert it, e.g. with iconv")
        except (OSError, pyarrow.ArrowException) as error:
            self._bad(f"{file}: cannot be read: {getattr(error, 'strerror', None) or first_line(str(error))}")

    def _bad(self, message: str) -> None:
        if not self._skip_bad:
            raise UserError(f"{message} (skip_bad leaves such records out)")
        self.skipped += 1


def split(records: Sequence[Record], share: float, seed: int) -> tuple[list[Record], list[Record]]:
    """(train, validation): a record is held out when a keyed hash of its content falls below `share`.

    So the choice depends on neither order nor tokenizer, and equal records are on one side. The share is met on
    average; where it would leave a side empty, only the record with the lowest hash, and its equals, are held out.
    `UserError` where all records are equal.
    """
    if not 0 <= share < 1:
        raise UserError(f"a validation share of {share}: must be at least 0 and less than 1")
    if share == 0:
        return list(records), []
    rule = SplitRule(seed, int(share * DRAWS))
    draws = [rule.draw(json.dumps(record.fields, sort_keys=True, default=str)) for record in records]
    threshold = rule.threshold
    held_out = sum(draw < threshold for draw in draws)
    if held_out in (0, len(draws)):
        threshold = min(draws, default=0) + 1
    train = [record for record, draw in zip(records, draws, strict=True) if draw >= threshold]
    if not train:
        raise UserError(
            f"{len(records)} record(s), too few different ones to hold any out; "
            "give more, or a validation set of its own"
        )
    return train, [record for record, draw in zip(records, draws, strict=True) if draw < threshold]


def column_names(fields: Iterable[str]) -> str:
    """The first few columns, for a message."""
    some = [f"`{short_name(str(name))}`" for name in islice(fields, MOST_NAMES + 1)]
    return ", ".join(some[:MOST_NAMES]) + ", ..." * (len(some) > MOST_NAMES) or "none"


_Rows = Iterator[tuple[str, Any]]
"""(where, a record if it is a dict)."""


def _json_lines(stream: BinaryIO, name: str, bad: BAD_RECORD) -> _Rows:
    """One JSON value a line; blank lines are passed over."""
    for number in count(1):
        line = stream.readline(LONGEST_LINE)
        if not line:
            return
        where = f"{name}, line {number}"
        if _is_cut(line):
            bad(f"{where}: longer than {LONGEST_LINE >> 20} MB, so hardly a record")
            return
        if line.strip():
            yield from _json(line, where, bad)


def _json_file(stream: BinaryIO, name: str, bad: BAD_RECORD) -> _Rows:
    """An array of values, or one value a line, as many data sets named .json have it."""
    data = stream.read(LARGEST_ARRAY + 1)
    if len(data) > LARGEST_ARRAY:
        bad(f"{name}: more than {LARGEST_ARRAY >> 20} MB in one piece; write it as .jsonl, one record a line")
    elif not data.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from _json_lines(io.BytesIO(data), name, bad)
    else:
        for _, array in _json(data, name, bad):
            for number, value in enumerate(array, start=1):
                yield f"{name}, record {number}", value


def _json(data: bytes, where: str, bad: BAD_RECORD) -> _Rows:
    """One value, if it can be read."""
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        bad(f"{where}: not UTF-8")
    except json.JSONDecodeError as error:
        bad(f"{where}: not valid JSON ({error.msg}: line {error.lineno}, column {error.colno})")
    except (ValueError, RecursionError):
        bad(f"{where}: JSON with a number too long, or nested too deeply, to be read")
    else:
        yield where, value


def _csv(stream: BinaryIO, name: str, bad: BAD_RECORD) -> _Rows:
    """Rows under their column names, all values text; a field may hold line ends and at most csv's 128 K characters."""
    return _table(csv.reader(_lines(stream), strict=True), name, bad)


def _tsv(stream: BinaryIO, name: str, bad: BAD_RECORD) -> _Rows:
    """As GLUE's files are: quotation marks are text like any other."""
    return _table(csv.reader(_lines(stream), delimiter="\t", quoting=csv.QUOTE_NONE), name, bad)


def _table(rows: Any, name: str, bad: BAD_RECORD) -> _Rows:
    try:
        columns: list[str] = next(rows, [])
        if len(set(columns)) < len(columns):
            twice = next(column for column in columns if columns.count(column) > 1)
            bad(f"{name}: column `{short_name(twice)}` is there twice")
            return
        for row in rows:
            where = f"{name}, line {rows.line_num}"
            if row and len(row) != len(columns):
                bad(f"{where}: {len(row)} fields under {len(columns)} columns")
            elif row:
                yield where, dict(zip(columns, row, strict=True))
    except csv.Error as error:
        bad(f"{name}, line {rows.line_num}: not valid CSV ({error})")  # where the next record begins cannot be told


def _lines(stream: BinaryIO) -> Iterator[str]:
    mark = "\ufeff"  # a byte order mark
    while line := stream.readline(LONGEST_LINE):
        if _is_cut(line):
            raise csv.Error(f"a line is longer than {LONGEST_LINE >> 20} MB")
        yield line.decode().removeprefix(mark)
        mark = ""


def _is_cut(line: bytes) -> bool:
    """Whether a line goes on past the most that is read of one; without an end to it, a small compressed file could
    fill the memory."""
    return len(line) == LONGEST_LINE and not line.endswith(b"\n")


def _parquet(stream: BinaryIO, name: str, bad: BAD_RECORD) -> _Rows:
    file = pyarrow.parquet.ParquetFile(stream, page_checksum_verification=True)
    row = 0
    for batch in file.iter_batches(batch_size=256):
        for fields in batch.to_pylist():
            row += 1
            yield f"{name}, row {row}", fields


_READERS: Mapping[str, Callable[[BinaryIO, str, BAD_RECORD], _Rows]] = {
    ".json": _json_file,
    ".jsonl": _json_lines,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}


def _saved_dataset(path: Path) -> Callable[[BAD_RECORD], _Rows]:
    def rows(bad: BAD_RECORD) -> _Rows:
        datasets = _datasets()
        try:
            dataset = datasets.load_from_disk(str(path))
        except Exception as error:  # whatever the library and its formats raise
            raise UserError(f"{path}: cannot be opened as a saved dataset: {_one_line(error)}") from None
        if isinstance(dataset, datasets.DatasetDict):
            if "train" not in dataset:
                bad(f"{path}: no split `train`; there are {column_names(dataset)}")
                return
            dataset = dataset["train"]
        try:
            for number, fields in enumerate(dataset, start=1):
                yield f"{path}, row {number}", fields
        except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
            bad(f"{path}: cannot be read: {_one_line(error)}")

    return rows


def read_hub(dataset_id: str, config: str | None, revision: str | None) -> Callable[[BAD_RECORD], _Rows]:
    """The split `train` of a dataset on the Hugging Face hub, streamed: nothing is stored."""

    def rows(_: BAD_RECORD) -> _Rows:
        try:
            dataset = _datasets().load_dataset(dataset_id, config, split="train", revision=revision, streaming=True)
        except Exception as error:  # whatever the library, the hub and the network raise
            raise UserError(f"{dataset_id}: cannot be streamed: {_one_line(error)}") from None
        stream = iter(dataset)
        for number in count(1):
            try:
                fields = next(stream)
            except StopIteration:
                return
            except Exception as error:
                raise RunStopped(
                    f"{dataset_id}: the stream broke off ({_one_line(error)}); run the same command again"
                ) from None
            yield f"{dataset_id}, row {number}", fields

    return rows


def _datasets() -> Any:
    import datasets  # here, because it takes seconds to load and most sources are plain files

    datasets.disable_progress_bars()
    return datasets


def _resolve(source: str) -> list[Path | Callable[[BAD_RECORD], _Rows]]:
    """A source's files, or what reads it."""
    try:
        path = Path(no_address(source))
    except ValueError as error:
        raise UserError(f"a source: {error}") from None
    try:
        if path.is_dir():
            return _resolve_folder(path)
        if path.exists():
            if _format(path) is None:
                raise UserError(f"{path}: not a kind of file that records can be read from; readable are {_readable()}")
            return [regular_file(path)]
    except (OSError, ValueError) as error:  # ValueError: a NUL
        reason = getattr(error, "strerror", None) or "not a path"
        raise UserError(f"{short_name(source, LONGEST_PATH)}: cannot be read: {reason}") from None
    if (match := HUB_ID.fullmatch(source)) and _format(path) is None:
        return [read_hub(match["id"], match["config"], hub_revision(match["id"]))]
    raise UserError(f"{short_name(source, LONGEST_PATH)}: no such file or folder")


def _resolve_folder(path: Path) -> list[Path | Callable[[BAD_RECORD], _Rows]]:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return [_saved_dataset(path)]
    files = [file for file in sorted(path.rglob("*")) if _holds_records(file.relative_to(path)) and file.is_file()]
    if not files:
        raise UserError(f"{path}: no readable file in this folder; readable are {_readable()}")
    return list(files)


def _format(file: Path) -> str | None:
    """The suffix that says how to read a file, or None."""
    name = Path(file.name)
    suffix = Path(name.stem).suffix if name.suffix in COMPRESSIONS else name.suffix
    return suffix if suffix in RECORD_SUFFIXES else None


def _holds_records(relative: Path) -> bool:
    """Whether a file found in a folder is part of the data, rather than hidden or about it."""
    hidden = any(part.startswith(".") for part in relative.parts)
    return not hidden and not relative.name.startswith("README") and _format(relative) is not None


def _readable() -> str:
    return f"{', '.join(RECORD_SUFFIXES)}, also with {' or '.join(COMPRESSIONS)}"


def _one_line(error: Exception) -> str:
    return first_line(str(error)) or type(error).__name__
