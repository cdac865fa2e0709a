"""Reader of .json and .jsonl files: one value a line, or a file that is parsed as a whole.

    {"text": ...}        one JSON value per line; blank lines are left out
    {"text": ...}

    [                    an array of records
      {"text": ...}, ...

    {"data": [           an object that holds one list of records, under any key
      {"text": ...}, ...

    {                    records over several lines, one or one after the other, as `jq` writes them
      "text": ...
    }

The first two lines tell which it is, whatever the suffix. A value a line needs bounded memory; what is parsed as a
whole takes several times its size, so it is limited to `LARGEST_WHOLE`.
"""

import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

from relora.data.plain_text import PIECE_CHARS, BadRecord
from relora.messages import short_name

BYTE_ORDER_MARK = b"\xef\xbb\xbf"

LONGEST_LINE = 1 << 28
"""Most bytes of a line of a .jsonl, .json, .csv or .tsv file. Without a limit, a small compressed file with one endless
line could fill the memory."""

LARGEST_WHOLE = 1 << 28
"""Most bytes, decompressed, of a file that is parsed as a whole."""

MESSAGE_KEYS = frozenset(("role", "from"))
"""Keys of the objects in a list that is a conversation, and so part of one record."""

CHAT_KEYS = ("conversation", "conversations", "messages")
RECORD_KEYS = frozenset(
    (*CHAT_KEYS, "answer", "completion", "instruction", "output", "prompt", "question", "response", "sentence", "text")
)
"""Usual keys of a record; an object with one of them is no file of records, though it may hold lists of objects."""

LIST_KEYS = frozenset(("data", "examples", "instances", "items", "records", "rows", "samples", "train"))
"""Usual keys of the list of records in an object: one with such an empty list is no record."""

MOST_LISTS = 8
"""Most lists of an object that a message names."""

_SPACE = re.compile(r"\s*")
_DECODER = json.JSONDecoder()

Row = tuple[str, Any]
"""(place of a record, its value)."""


def read_jsonl(stream: BinaryIO, name: str, bad: BadRecord, column: str | None = None) -> Iterator[Row]:
    """Yield the records of a .jsonl file; one that cannot be parsed as a whole is taken for lines."""
    return _read(stream, name, bad, is_lines=True)


def read_json(stream: BinaryIO, name: str, bad: BadRecord, column: str | None = None) -> Iterator[Row]:
    """Yield the records of a .json file."""
    return _read(stream, name, bad, is_lines=False)


def _read(stream: BinaryIO, name: str, bad: BadRecord, *, is_lines: bool) -> Iterator[Row]:
    """Yield one JSON value per line; or, of a file that is parsed as a whole, its records."""
    number, line = 1, stream.readline(LONGEST_LINE)
    while line and not line.removeprefix(BYTE_ORDER_MARK).strip():
        number, line = number + 1, stream.readline(LONGEST_LINE)
    following = None if is_too_long(line) else stream.readline(LONGEST_LINE)
    if not _begins_whole(line, following or b""):
        yield from _json_lines(stream, number, line, name, bad, following)
        return
    line += following or b""
    data = line + stream.read(max(0, LARGEST_WHOLE + 1 - len(line)))
    if len(data) > LARGEST_WHOLE:
        bad(f"{name}: more than {LARGEST_WHOLE >> 20} MB in one piece; write it as .jsonl, one record a line")
        return
    wrong: list[str] = []
    values = [value for _, value in _parsed(data, name, wrong.append, _all_values)]
    if wrong and (is_lines or _is_object(data.rstrip().rpartition(b"\n")[2])):  # only its first line is damaged
        rest = io.BytesIO(data)
        yield from _json_lines(rest, number, rest.readline(LONGEST_LINE), name, bad)
        return
    for message in wrong:
        bad(message)
    if len(values) == 1:
        yield from _records_of(values[0], name, bad)
    else:
        yield from ((f"{name}, record {place}", value) for place, value in enumerate(values, start=1))


def _records_of(value: Any, name: str, bad: BadRecord) -> Iterator[Row]:
    """Yield the records of a file's one value: those of an array or of the list in an object, or the object itself."""
    under = ""
    if isinstance(value, dict):
        lists = _lists_of_records(value)
        if len(lists) > 1:
            named = ", ".join(f"`{short_name(key)}`" for key in lists[:MOST_LISTS])
            bad(
                f"{name}: one JSON object with several lists of records ({named}); write one array of records, or one "
                "record a line"
            )
            return
        if empty := _empty_list(value):
            bad(f"{name}: the list under `{short_name(empty)}` is empty")
            return
        if lists:
            under, value = f" under `{short_name(lists[0])}`", value[lists[0]]
    for number, one in enumerate(value if isinstance(value, list) else [value], start=1):
        yield f"{name}, record {number}{under}", one


def _begins_whole(line: bytes, following: bytes) -> bool:
    """Return whether a JSON file is parsed as a whole, by its first two lines.

    It is if it begins with a value that ends in a later line, or is one array, or one object that holds records.
    """
    text = line.removeprefix(BYTE_ORDER_MARK).strip()
    if not text.startswith((b"{", b"[")):
        return False
    if text.startswith(b"[") and not following.strip():
        return True
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # an object that is damaged, unless it only breaks off at the end of the line
        return text.startswith(b"[") or text.endswith((b"{", b"[", b",", b":"))
    return isinstance(value, dict) and not following.strip() and bool(_lists_of_records(value) or _empty_list(value))


def _lists_of_records(value: Mapping[str, Any]) -> list[str]:
    """Return the keys of an object under which there are lists of objects, if it is no record itself."""
    if RECORD_KEYS & value.keys():
        return []
    lists = [key for key, one in value.items() if isinstance(one, list) and one and isinstance(one[0], dict)]
    return [] if any(MESSAGE_KEYS & value[key][0].keys() for key in lists) else lists


def _empty_list(value: Mapping[str, Any]) -> str:
    """Return the key of the list of records in an object if it is empty; the empty text if there is no such list."""
    if RECORD_KEYS & value.keys() or any(isinstance(one, list | dict) and one for one in value.values()):
        return ""
    return next((key for key, one in value.items() if one == [] and (key in LIST_KEYS or len(value) == 1)), "")


def _json_lines(
    stream: BinaryIO, number: int, line: bytes, name: str, bad: BadRecord, following: bytes | None = None
) -> Iterator[Row]:
    """Yield the JSON values of `line`, which is the line `number` of the file, and of the lines that follow it.

    `following` is the next line, if it has been read.
    """
    while line:
        where = f"{name}, line {number}"
        if is_too_long(line):
            bad(f"{where}: longer than {LONGEST_LINE >> 20} MB, so hardly a record")
            while line and not line.endswith(b"\n"):
                line = stream.readline(PIECE_CHARS)
        elif line.strip():
            yield from _parsed(line, where, bad)
        number += 1
        line, following = stream.readline(LONGEST_LINE) if following is None else following, None


def _parsed(
    data: bytes, where: str, bad: BadRecord, parse: Callable[[str], list[Any]] = lambda text: [json.loads(text)]
) -> Iterator[Row]:
    """Yield the JSON values that `data` holds, or report that it cannot be parsed and yield nothing."""
    try:
        values = parse(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        bad(f"{where}: not UTF-8; convert the file, e.g. with iconv")
    except json.JSONDecodeError as error:
        bad(f"{where}: not valid JSON ({error.msg}: line {error.lineno}, column {error.colno})")
    except (ValueError, RecursionError):
        bad(f"{where}: JSON with a number too long, or nested too deeply, to be read")
    else:
        yield from ((where, value) for value in values)


def _all_values(text: str) -> list[Any]:
    """Return the JSON values that stand one after the other in a text."""
    values, end = [], _end_of_space(text, 0)
    while end < len(text):
        value, end = _DECODER.raw_decode(text, end)
        values.append(value)
        end = _end_of_space(text, end)
    return values


def _end_of_space(text: str, start: int) -> int:
    """Return where the white space that begins at `start` ends."""
    found = _SPACE.match(text, start)
    return found.end() if found else start


def _is_object(line: bytes) -> bool:
    """Return whether a line is a JSON object by itself."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def is_too_long(line: bytes) -> bool:
    """Return whether `line`, read with `readline(LONGEST_LINE)`, is only the beginning of a longer line."""
    return len(line) == LONGEST_LINE and not line.endswith(b"\n")
