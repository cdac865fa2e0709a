"""One reader per kind of source: each yields the documents of one file or dataset in order, in bounded memory.

A record that cannot be used is handed to `bad` with one line that says where and why; `bad` raises or counts.
What breaks a whole file (cut short, not UTF-8 in a text file) comes out as `OSError`, `ArrowException` or
`UnicodeDecodeError`; the caller knows the file's name.
"""

import io
import json
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet
from huggingface_hub import HfApi

from relora.errors import RunStopped, UserError
from relora.messages import first_line, short_name

WHOLE_FILE_CHARS = 128 * 1024
"""A plain-text file up to this length is one document."""

PIECE_CHARS = 32 * 1024
"""A longer one is a book rather than a document: it is cut at blank lines into documents of one to two of these."""

LONGEST_LINE = 1 << 28
"""Bytes of a JSONL record; without an end to it, a small compressed file could fill the memory."""

MOST_NAMES = 8
"""Fields or columns that a message lists."""

BAD_RECORD = Callable[[str], None]


def read_text(stream: BinaryIO) -> Iterator[str]:
    """Plain UTF-8 text, line ends as \\n: one document, or pieces that join up to the file without a gap."""
    reader = io.TextIOWrapper(stream, encoding="utf-8-sig")
    try:
        text = reader.read(WHOLE_FILE_CHARS + 1)
        if len(text) <= WHOLE_FILE_CHARS:
            yield text
            return
        while text := text + reader.read(max(0, 2 * PIECE_CHARS - len(text))):
            cut = _cut(text[: 2 * PIECE_CHARS])
            yield text[:cut]
            text = text[cut:]
    finally:
        reader.detach()  # the stream is the caller's to close


def _cut(text: str) -> int:
    """Where to end a piece: after the first blank line past PIECE_CHARS, else a line end, a space, the end."""
    if len(text) < 2 * PIECE_CHARS:
        return len(text)
    for mark in ("\n\n", "\n", " "):
        found = text.find(mark, PIECE_CHARS)
        if found >= 0:
            return found + len(mark)
    return len(text)


def read_jsonl(stream: BinaryIO, name: str, field: str, bad: BAD_RECORD) -> Iterator[str]:
    """One JSON object a line; blank lines are passed over."""
    for number in count(1):
        line = stream.readline(LONGEST_LINE)
        if not line:
            return
        where = f"{name}, line {number}"
        if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
            bad(f"{where}: longer than {LONGEST_LINE >> 20} MB, so hardly a document")
            while line and not line.endswith(b"\n"):
                line = stream.readline(PIECE_CHARS)
            continue
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            bad(f"{where}: not UTF-8")
        except json.JSONDecodeError as error:
            bad(f"{where}: not valid JSON ({error.msg}: column {error.colno})")
        except (ValueError, RecursionError):
            bad(f"{where}: JSON with a number too long, or nested too deeply, to be read")
        else:
            yield from _text_of(record, field, where, bad)


def read_parquet(stream: BinaryIO, name: str, field: str, bad: BAD_RECORD) -> Iterator[str]:
    """The column `field`, row group by row group."""
    file = pyarrow.parquet.ParquetFile(stream, page_checksum_verification=True)
    columns = file.schema_arrow.names
    if field not in columns:
        bad(f"{name}: no column `{field}`; there are {_names(columns)}")
        return
    if not _is_text(kind := file.schema_arrow.types[columns.index(field)]):
        bad(f"{name}: column `{field}` is not text but {short_name(str(kind))}")
        return
    row = 0
    for batch in file.iter_batches(batch_size=256, columns=[field]):
        for cell in batch.column(0):
            row += 1
            try:
                value = cell.as_py()
            except UnicodeDecodeError:
                bad(f"{name}, row {row}: not UTF-8")
            else:
                yield from _text_of({field: value}, field, f"{name}, row {row}", bad)


def _is_text(kind: pyarrow.DataType) -> bool:
    """Whether a column can hold text, in one of Arrow's several ways."""
    if pyarrow.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    tests = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
    return any(test(kind) for test in tests)


def read_saved_dataset(path: Path, field: str, bad: BAD_RECORD, at: Callable[[float], None]) -> Iterator[str]:
    """A folder from `datasets.save_to_disk`: a Dataset, or the split `train` of a DatasetDict.

    `at` is told the share of the rows that was read.
    """
    datasets = _datasets()
    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever the library and its formats raise
        raise UserError(f"{path}: cannot be opened as a saved dataset: {_one_line(error)}") from None
    if isinstance(dataset, datasets.DatasetDict):
        if "train" not in dataset:
            raise UserError(f"{path}: no split `train`; give the folder of one of {_names(dataset)}")
        dataset = dataset["train"]
    if field not in dataset.column_names:
        bad(f"{path}: no column `{field}`; there are {_names(dataset.column_names)}")
        return
    row = 0
    for batch in dataset.select_columns([field]).iter(batch_size=256):
        for value in batch[field]:
            row += 1
            yield from _text_of({field: value}, field, f"{path}, row {row}", bad)
        at(row / len(dataset))


def hub_revision(dataset_id: str) -> str:
    """The commit at which a hub dataset stands: asked first, since a name that is wrong would be tried for long."""
    try:
        revision = HfApi().dataset_info(dataset_id, timeout=10).sha
    except Exception as error:  # whatever the hub and the network raise
        raise UserError(
            f"{dataset_id}: no such file or folder, and the hub gave no dataset of that name ({_one_line(error)})"
        ) from None
    return str(revision)


def read_hub_dataset(
    dataset_id: str, config: str | None, revision: str | None, field: str, bad: BAD_RECORD
) -> Iterator[str]:
    """The split `train` of a dataset on the Hugging Face hub, streamed: nothing is stored."""
    try:
        dataset = _datasets().load_dataset(dataset_id, config, split="train", revision=revision, streaming=True)
    except Exception as error:  # whatever the library, the hub and the network raise
        raise UserError(f"{dataset_id}: cannot be streamed: {_one_line(error)}") from None
    rows = enumerate(dataset, start=1)
    while True:
        try:
            number, record = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise RunStopped(
                f"{dataset_id}: the stream broke off ({_one_line(error)}); the same command continues"
            ) from None
        yield from _text_of(record, field, f"{dataset_id}, row {number}", bad)


def decompressed(raw: BinaryIO, file_name: str) -> BinaryIO:
    """The bytes of a file after undoing .gz or .zst, of several members too; cut short is an `OSError`."""
    codec = {".gz": "gzip", ".zst": "zstd"}.get(Path(file_name).suffix)
    if codec is None:
        return raw
    # pyarrow notices a file that was cut short; the zstandard package takes it for the end
    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw), codec))


def _text_of(record: Any, field: str, where: str, bad: BAD_RECORD) -> Iterator[str]:
    """The text of one record, if it has one; an empty text is passed over, since there is nothing to train on."""
    if not isinstance(record, dict):
        bad(f"{where}: not a JSON object")
    elif field not in record:
        bad(f"{where}: no field `{field}`; there are {_names(record)}")
    elif not isinstance(record[field], str):
        bad(f"{where}: field `{field}` is not text but {type(record[field]).__name__}")
    elif not record[field].isascii() and not _is_unicode(record[field]):
        bad(f"{where}: half of a surrogate pair in field `{field}`")
    elif record[field]:
        yield record[field]


def _is_unicode(text: str) -> bool:
    """False for what JSON can spell and UTF-8 cannot: half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _datasets() -> Any:
    import datasets  # here, because it takes seconds to load and most sources are plain files

    datasets.disable_progress_bars()
    return datasets


def _names(names: Any) -> str:
    """The first few of them, for a message."""
    some = [f"`{short_name(str(name))}`" for name in islice(names, MOST_NAMES + 1)]
    return ", ".join(some[:MOST_NAMES]) + ", ..." * (len(some) > MOST_NAMES) or "none"


def _one_line(error: Exception) -> str:
    return first_line(str(error)) or type(error).__name__
