"""Error messages of one short line: the dotted key, what is wrong with it, the nearest valid key.

The keys and values in them come from files that anybody may have written. So they are shortened, and their control
characters are escaped.
"""

import difflib
import reprlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:  # `relora --help` needs no settings, and pydantic takes as long to load as all the rest of it
    from pydantic import BaseModel, ValidationError

LONGEST_SHOWN = 60
"""Largest number of characters of a key or a value in a message."""

LONGEST_PATH = 160
"""Largest number of characters of a path in a message."""

LONGEST_LINE = 120
"""Largest number of characters that are quoted from a library's own message."""

PLAIN_WORDS = {"model_type": "must be a section of keys and values", "tuple_type": "must be a list"}
"""Messages in place of pydantic's, for those of its error types whose messages name types of Python."""


def first_mistake(error: "ValidationError", root: "type[BaseModel] | None" = None) -> str:
    """Describe the first mistake that pydantic found, in one line.

    Args:
        error: all that pydantic found.
        root: the class that was to be read; with it, the message names the valid key nearest to an unknown one.
    """
    mistake, *others = error.errors(include_url=False)
    # for a field of type "text or a list" pydantic reports a mistake for each type; if a list was given, the mistake in
    # the list tells more than "this is no text"
    if mistake["type"] == "string_type" and isinstance(mistake["input"], list) and others:
        mistake = others[0]
    location = [str(part) for part in mistake["loc"]]
    if mistake["type"] == "extra_forbidden":
        location = [*_without_types(location[:-1]), location[-1]]
        hint = "" if root is None else f"; {_nearest(location, root)}"
        return f"unknown key `{_dotted(location)}`{hint}"
    key = _dotted(_without_types(location))
    if mistake["type"] == "missing":
        return f"`{key}` is missing"
    message = mistake["msg"].removeprefix("Value error, ")
    if mistake["type"] == "value_error":
        return f"{key}: {message}" if key else message
    reason = PLAIN_WORDS.get(mistake["type"]) or f"{message[0].lower()}{message[1:]}"
    return f"`{key}` is {short_repr(mistake['input'])}: {reason}"


def unknown_key(key: str, root: "type[BaseModel]") -> str | None:
    """Describe a dotted key that a class of settings does not have, with the nearest that it has; None if it has it."""
    if key in _all_keys(root):
        return None
    location = key.split(".")
    return f"unknown key `{_dotted(location)}`; {_nearest(location, root)}"


def short_repr(value: object) -> str:
    """Format any value for a message: its repr, shortened, on one line, without control characters."""
    text = _Short().repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


class _Short(reprlib.Repr):
    """Repr of nested values that shortens strings and whatever else is long."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 40
        self.maxlevel = 2

    def repr_int(self, x: int, level: int) -> str:
        """Format an integer; Python refuses to convert one of thousands of digits to text."""
        return repr(x) if x.bit_length() < 100 else "a huge number"


def short_name(name: str, most_chars: int = LONGEST_SHOWN) -> str:
    """Format a key, a field or a path for a message: unchanged, unless it is very long or has control characters."""
    return name if name.isprintable() and len(name) <= most_chars else short_repr(name)


def first_line(message: str) -> str:
    """Return the first line of a library's message that is not empty, cut if it is very long."""
    line = next((line.strip() for line in message.splitlines() if line.strip()), "")
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}..."


def _dotted(location: Sequence[str]) -> str:
    return short_name(".".join(location))


def _without_types(location: Sequence[str]) -> list[str]:
    """Drop the parts of a location by which pydantic tells the types of a union apart."""
    return [part for part in location if "[" not in part and part != "str"]


def _nearest(location: Sequence[str], root: "type[BaseModel]") -> str:
    """Suggest the valid key nearest to an unknown one, from its own section first, then from all."""
    location = [part for part in location[:-1] if not part.isdecimal()] + [location[-1][:LONGEST_SHOWN]]
    keys = list(_all_keys(root))
    section = ".".join(location[:-1])
    siblings = [key for key in keys if key.rpartition(".")[0] == section]
    for candidates in (siblings, keys):
        near = difflib.get_close_matches(".".join(location), candidates, n=1, cutoff=0.7)
        if near:
            return f"did you mean `{near[0]}`?"
    by_name = [key for key in keys if key.rpartition(".")[2] == location[-1]]
    if by_name:
        return f"did you mean `{by_name[0]}`?"
    names = ", ".join(key.rpartition(".")[2] for key in siblings)
    return f"valid here: {names}" if len(names) <= 2 * LONGEST_SHOWN else "`relora config --schema` lists all keys"


def _all_keys(model: "type[BaseModel]", prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a class of settings and of the sections in it; a list adds no part to a key."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for section in _models_in(field.annotation):
            yield from _all_keys(section, f"{prefix}{name}.")


def _models_in(annotation: Any) -> "Iterator[type[BaseModel]]":
    from pydantic import BaseModel

    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
