"""Options that several verbs have, and the way in which all of them print their figures."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any, TypeVar

import typer

from relora.errors import UserError

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Overrides of single keys.")]
Json = Annotated[bool, typer.Option("--json", help="Print figures as JSON.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Dtype = Annotated[str, typer.Option(help="fp32, bf16 or fp16.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model, if you read it.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over; what is in the run folder is moved aside.")]
Strict = Annotated[
    bool, typer.Option("--strict", help="Continue from the newest checkpoint and to the last bit, or not at all.")
]
Until = Annotated[
    int | None, typer.Option("--until", help="Stop after this step, with a checkpoint; without it the run goes on.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]

Found = TypeVar("Found")


def plain(found: Any) -> Any:
    """Turn a dataclass, or each of a list of dataclasses, into a plain dictionary."""
    return [asdict(one) for one in found] if isinstance(found, list) else asdict(found)


def print_found(
    found: Found, as_json: bool, print_table: Callable[[Found], object], figures: Callable[[Found], Any] = plain
) -> None:
    """Print what a verb found.

    Args:
        found: the result of the verb's call.
        as_json: whether the user gave `--json`.
        print_table: prints the result for people.
        figures: turns the result into values that JSON has.
    """
    if as_json:
        print_json(figures(found))
    else:
        print_table(found)


def print_json(figures: Any) -> None:
    """Print figures as JSON, for other programs."""
    print(json.dumps(figures, indent=1, default=str))


def refuse_several_processes() -> None:
    """Refuse to train under a launcher that started several processes: each of them would write the same run folder.

    Raises:
        UserError: WORLD_SIZE, which `torchrun` and its like set, is not 1.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("WORLD_SIZE: this version trains in one process; start it without torchrun")


def parse_share(text: str) -> float:
    """Read the value of `prepare --validation`, `1%` or `0.01`, as a share."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise UserError(f"--validation {text}: give a share below 100%, e.g. 1% or 0.01")
    return share


def unescape(text: str) -> str:
    r"""Read `\n`, `\t`, `\f` and `\\` in the value of an option as the characters that they stand for."""
    return re.sub(r"\\([ntf\\])", lambda found: {"n": "\n", "t": "\t", "f": "\f"}.get(found[1], found[1]), text)
