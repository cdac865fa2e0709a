"""Readers of files and datasets: each yields the records of one file or dataset in order, in bounded memory.

    .jsonl      see `json_files`: one JSON value per line, or values over several lines; .json likewise
    .csv        a line of column names, then one record per row (RFC 4180)
    .tsv        the same, separated by tabs; quotation marks are ordinary characters, as in the files of GLUE
    .parquet    one record per row; not inside .gz or .zst, since it compresses its columns itself
    .arrow      the same, of Arrow's two formats
    .txt .md    see `plain_text`: one record per document, or several of a long one
    saved       a folder written by `datasets.save_to_disk`: one record per row
    hub         a dataset on the Hugging Face hub, streamed: one record per row

Suffixes count in small and capital letters.

A reader yields pairs `(where, value)`: the place of a record for messages, such as `a.jsonl, line 3`, and the record,
which is a mapping of column to value in a correct file and may be any JSON value in a wrong one. A record that cannot
be read is reported to the callback `bad` with one line that says where it is and what is wrong; `bad` either raises an
exception or counts the record, and the reader goes on behind it. An error that makes the rest of a file unreadable (it
is cut short, or is not UTF-8) is raised as `OSError`, `ArrowException` or `UnicodeDecodeError`.

A reader that is given a `column` needs to yield that column only, and reports a table that has no such column once.
Plain text has one column, named `column`, or `text` where none is given.
"""

import csv
import io
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
from huggingface_hub import HfApi

from relora.data.json_files import BYTE_ORDER_MARK, LONGEST_LINE, Row, is_too_long, read_json, read_jsonl
from relora.data.plain_text import BadRecord, read_text
from relora.errors import RunStopped, UserError
from relora.files.hub import SECONDS, refusal
from relora.messages import first_line, short_name

COMPRESSIONS: Mapping[str, str] = {".gz": "gzip", ".zst": "zstd"}
"""Suffix of a compressed file -> Arrow's name of its codec."""

ARROW_FILE = b"ARROW1"
"""First bytes of an Arrow file that is not in the stream format."""

CONTENT_KEYS = ("content", "value")
"""Fields of messages that are null where a message has no text."""

BATCH_ROWS = 256
"""Rows of a parquet file or saved dataset that are decoded at a time."""

MOST_NAMES = 8
"""Most columns that a message lists."""


def read_csv(stream: BinaryIO, name: str, bad: BadRecord, column: str | None = None) -> Iterator[Row]:
    """Yield the rows of a CSV file; all values are text.

    A field may contain line ends, and has at most the 131,072 characters that Python's `csv` module permits.
    """
    return _table_rows(csv.reader(_text_lines(stream), strict=True), name, bad, column)


def read_tsv(stream: BinaryIO, name: str, bad: BadRecord, column: str | None = None) -> Iterator[Row]:
    """Yield the rows of a file of tab-separated values without quotation, as GLUE publishes its data."""
    return _table_rows(csv.reader(_text_lines(stream), delimiter="\t", quoting=csv.QUOTE_NONE), name, bad, column)


def _table_rows(rows: Any, name: str, bad: BadRecord, column: str | None) -> Iterator[Row]:
    """Yield the rows of a `csv.reader` as mappings from the column names in its first row."""
    try:
        columns: list[str] = next(rows, [])
        if len(set(columns)) < len(columns):
            twice = next(column for column in columns if columns.count(column) > 1)
            bad(f"{name}: column `{short_name(twice)}` is there twice")
            return
        if any("\0" in column for column in columns):
            bad(f"{name}: NUL characters in the column names, so it is not UTF-8 text; convert it, e.g. with iconv")
            return
        if columns and _lacks_column(columns, column, name, bad):
            return
        for row in rows:
            where = f"{name}, line {rows.line_num}"
            if row and len(row) != len(columns):
                bad(f"{where}: {len(row)} fields under {len(columns)} columns")
            elif row:
                yield where, dict(zip(columns, row, strict=True))
    except csv.Error as error:  # it is not known where the next record begins, so the file ends here
        bad(f"{name}, line {rows.line_num}: not valid CSV ({error})")


def _text_lines(stream: BinaryIO) -> Iterator[str]:
    """Yield the lines of a UTF-8 file without a byte order mark; raise `csv.Error` at a line that is too long."""
    mark = BYTE_ORDER_MARK
    while line := stream.readline(LONGEST_LINE):
        if is_too_long(line):
            raise csv.Error(f"a line is longer than {LONGEST_LINE >> 20} MB")
        yield line.removeprefix(mark).decode()
        mark = b""  # only the first line may begin with one


def read_parquet(stream: BinaryIO, name: str, bad: BadRecord, column: str | None = None) -> Iterator[Row]:
    """Yield the rows of a parquet file, read row group by row group; with `column`, of that column of text alone."""
    if not stream.seekable():
        bad(f"{name}: a compressed parquet file; decompress it first, since parquet compresses its columns itself")
        return
    file = pyarrow.parquet.ParquetFile(stream, page_checksum_verification=True)
    if _has_text(file.schema_arrow, column, name, bad):
        columns = None if column is None else [column]
        yield from _arrow_rows(file.iter_batches(batch_size=BATCH_ROWS, columns=columns), name, bad)


def read_arrow(stream: BinaryIO, name: str, bad: BadRecord, column: str | None = None) -> Iterator[Row]:
    """Yield the rows of an Arrow file, in the stream format, as `datasets` stores it, or in the file format."""
    if not stream.seekable():
        bad(f"{name}: a compressed Arrow file; decompress it first")
        return
    if not (start := stream.read(len(ARROW_FILE))):
        return
    # Mapped, since a damaged file may state any size, for which a reader would ask for memory.
    mapped = pyarrow.py_buffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    is_file = start == ARROW_FILE
    reader = pyarrow.ipc.open_file(mapped) if is_file else pyarrow.ipc.open_stream(mapped)
    if not _has_text(reader.schema, column, name, bad):
        return
    batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
    yield from _arrow_rows((_checked(batch, column) for batch in batches), name, bad)


def _checked(batch: pyarrow.RecordBatch, column: str | None) -> pyarrow.RecordBatch:
    """Return a batch, or one column of it, after a check of where its values are, which a file could state wrongly."""
    batch = batch if column is None else batch.select([column])
    batch.validate(full=True)
    return batch


def _has_text(schema: pyarrow.Schema, column: str | None, name: str, bad: BadRecord) -> bool:
    """Return whether a table has the needed column, and it is text; otherwise that is reported to `bad`."""
    if _lacks_column(schema.names, column, name, bad):
        return False
    if column is None or _is_text(kind := schema.field(column).type):
        return True
    bad(f"{name}: column `{column}` is not text but {short_name(str(kind))}")
    return False


def _arrow_rows(batches: Iterable[pyarrow.RecordBatch], name: str, bad: BadRecord) -> Iterator[Row]:
    """Yield the rows of batches, numbered from 1."""
    row = 0
    for batch in batches:
        for cells in zip(*batch.columns, strict=True):
            row += 1
            try:
                fields = {
                    key: _without_absent(cell.as_py()) for key, cell in zip(batch.schema.names, cells, strict=True)
                }
            except UnicodeDecodeError:
                bad(f"{name}, row {row}: not UTF-8")
            else:
                yield f"{name}, row {row}", fields


def _without_absent(value: Any) -> Any:
    """Return the value of a column without the null fields of objects, which no record had.

    All objects of an Arrow column have the fields of all of them: arguments of tools {"city": "Rome"} and {"unit": "C"}
    come back as {"city": "Rome", "unit": None} and {"city": None, "unit": "C"}. Contents of messages may be null.
    """
    if isinstance(value, dict):
        kept = ((key, one) for key, one in value.items() if one is not None or key in CONTENT_KEYS)
        return {key: _without_absent(one) for key, one in kept}
    return [_without_absent(one) for one in value] if isinstance(value, list) else value


def _is_text(kind: pyarrow.DataType) -> bool:
    """Return whether a column of this Arrow type holds text, in any of Arrow's encodings of text."""
    if pyarrow.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    tests = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
    return any(test(kind) for test in tests)


Reader = Callable[[BinaryIO, str, BadRecord, str | None], Iterator[Row]]

READERS: Mapping[str, Reader] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".txt": read_text,
    ".md": read_text,
}
"""Kind of file, as `file_kind` returns it -> its reader."""


def file_kind(file: Path) -> str | None:
    """Return the suffix that says how to read a file, without that of a compression; None if there is no reader."""
    name = Path(file.name.lower())
    kind = Path(name.stem).suffix if name.suffix in COMPRESSIONS else name.suffix
    return kind if kind in READERS else None


def decompressed(raw: BinaryIO, file_name: str) -> BinaryIO:
    """Return the decompressed bytes of a .gz or .zst file, also of several members; of any other file, `raw`.

    Reading a file that is cut short raises `OSError`.
    """
    codec = COMPRESSIONS.get(Path(file_name).suffix.lower())
    if codec is None:
        return raw
    # pyarrow notices that a file is cut short; the package zstandard would take the cut for the end of the file
    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw), codec))


def why_unreadable(error: Exception) -> str:
    """Return what an `OSError` or `ArrowException` says about a file, in one line, with the remedy if it is known."""
    if "Frame requires too much memory" in str(error):
        return "its zstd window is larger than 128 MB (zstd --long); write it anew with `zstd -dc --long=31 | zstd`"
    return getattr(error, "strerror", None) or one_line(error)


def why_not_utf8(start: bytes) -> str:
    """Return what a file is that is not UTF-8, by its first bytes, with the remedy."""
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "UTF-16, not UTF-8 text; convert it with `iconv -f UTF-16 -t UTF-8`"
    return "not UTF-8 text, perhaps Windows-1252; convert it, e.g. with `iconv -f WINDOWS-1252 -t UTF-8`"


def read_saved_dataset(
    path: Path, bad: BadRecord, column: str | None = None, note_share: Callable[[float], None] = lambda _: None
) -> Iterator[Row]:
    """Yield the rows of a folder from `datasets.save_to_disk`: a Dataset, or the split `train` of a DatasetDict.

    Args:
        path: the folder.
        bad: see the module.
        column: the only column to read; all columns unless given.
        note_share: called after every batch with the share of the rows that has been read, 0 to 1.

    Raises:
        UserError: the folder cannot be opened, or has no split `train`.
    """
    datasets = _datasets_library()
    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # of any type: the library and its file formats raise many
        raise UserError(f"{path}: cannot be opened as a saved dataset: {one_line(error)}") from None
    if isinstance(dataset, datasets.DatasetDict):
        if "train" not in dataset:
            raise UserError(f"{path}: no split `train`; give the folder of one of {column_names(dataset)}")
        dataset = dataset["train"]
    if _lacks_column(dataset.column_names, column, str(path), bad):
        return
    if column is not None:
        dataset = dataset.select_columns([column])
    row = 0
    for batch in dataset.iter(batch_size=BATCH_ROWS):
        for values in zip(*batch.values(), strict=True):
            row += 1
            yield f"{path}, row {row}", dict(zip(batch, map(_without_absent, values), strict=True))
        note_share(row / len(dataset))


def hub_revision(dataset_id: str) -> str:
    """Return the current commit of a hub dataset; `UserError` if the hub does not give that dataset.

    It is asked for before the dataset is opened, because the library would try for a long time to open a wrong name.
    """
    try:
        info = HfApi().dataset_info(dataset_id, timeout=SECONDS)
        if info.gated:  # whose description anyone may see
            HfApi().auth_check(dataset_id, repo_type="dataset")
    except Exception as error:  # of any type: the hub's client and the network raise many
        raise UserError(f"{dataset_id}: {refusal(error, dataset_id, 'dataset', 'file or folder')}") from None
    return str(info.sha)


def read_hub_dataset(dataset_id: str, config: str | None, revision: str | None) -> Iterator[Row]:
    """Yield the rows of the split `train` of a dataset on the Hugging Face hub, streamed: nothing is stored.

    Raises:
        UserError: the dataset cannot be opened.
        RunStopped: the connection failed on the way.
    """
    try:
        dataset = _datasets_library().load_dataset(dataset_id, config, split="train", revision=revision, streaming=True)
    except Exception as error:  # of any type: the library, the hub and the network raise many
        raise UserError(f"{dataset_id}: cannot be streamed: {one_line(error)}") from None
    rows = enumerate(dataset, start=1)
    while True:
        try:
            number, fields = next(rows)
        except StopIteration:
            return
        except Exception as error:  # likewise
            raise RunStopped(
                f"{dataset_id}: the stream broke off ({one_line(error)}); run the same command again"
            ) from None
        yield f"{dataset_id}, row {number}", fields


def _datasets_library() -> Any:
    """Import the library `datasets` without its progress bars."""
    import datasets  # not at the top: it takes seconds to load, and most sources are plain files

    datasets.disable_progress_bars()
    return datasets


def _lacks_column(columns: Iterable[str], column: str | None, name: str, bad: BadRecord) -> bool:
    """Return whether `column` is needed and not among the columns of a table, which is then reported to `bad`."""
    if column is None or column in columns:
        return False
    bad(f"{name}: no column `{column}`; there are {column_names(columns)}")
    return True


def column_names(names: Iterable[str]) -> str:
    """Return the first `MOST_NAMES` column names, each in backticks, for a message."""
    shown = [f"`{short_name(str(name))}`" for name in islice(names, MOST_NAMES + 1)]
    if not shown:
        return "none"
    if len(shown) > MOST_NAMES:
        shown[MOST_NAMES] = "..."
    return ", ".join(shown)


def one_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its type if it has no message."""
    return first_line(str(error)) or type(error).__name__
