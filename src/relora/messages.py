"""What pydantic found wrong, as one short line: the dotted key, what is wrong with it, the nearest valid key.

The values and keys that it shows come from files of anybody's making, so they are cut and their control characters are
spelt out.
"""

import difflib
import reprlib
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

LONGEST_SHOWN = 60
"""Characters of a key or a value in a message."""

LONGEST_PATH = 160

LONGEST_LINE = 120
"""Characters of a library's own message."""

PLAIN_WORDS = {"model_type": "must be a section of keys and values", "tuple_type": "must be a list"}
"""Of pydantic's error types, those whose message speaks of Python."""


def first_mistake(error: ValidationError, root: type[BaseModel] | None = None) -> str:
    """One line for the first thing that is wrong; `root` is the model that was wanted, for the names of valid keys."""
    first, *others = error.errors(include_url=False)
    # "text or a list" is reported once for each; of a list, what is wrong in it says more than that it is no text
    mistake = others[0] if first["type"] == "string_type" and isinstance(first["input"], list) and others else first
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


def short_repr(value: object) -> str:
    """Any value for a message: its repr, never long, on one line, without control characters."""
    text = _Short().repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 40
        self.maxlevel = 2

    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to spell an integer of thousands of digits."""
        return repr(x) if x.bit_length() < 100 else "a huge number"


def short_name(name: str, most_chars: int = LONGEST_SHOWN) -> str:
    """A key, a field or a path for a message: as it is, unless it is very long or holds what cannot be printed."""
    return name if name.isprintable() and len(name) <= most_chars else short_repr(name)


def first_line(message: str) -> str:
    """The first line of a library's message, cut where it is very long."""
    line = next((line.strip() for line in message.splitlines() if line.strip()), "")
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}..."


def _dotted(location: Sequence[str]) -> str:
    return short_name(".".join(location))


def _without_types(location: Sequence[str]) -> list[str]:
    """Without the marks by which pydantic tells the types of a union apart."""
    return [part for part in location if "[" not in part and part != "str"]


def _nearest(location: Sequence[str], root: type[BaseModel]) -> str:
    """The valid key nearest to an unknown one: in its own section first, then anywhere."""
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


def _all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted keys of a model and of the models in it; of a list of models without the numbers."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for section in _models_in(field.annotation):
            yield from _all_keys(section, f"{prefix}{name}.")


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
