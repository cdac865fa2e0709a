"""Options that several verbs have, and the way in which all of them print their figures."""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


def settled(config: Any) -> Any:
    """Return a configuration whose `distributed.strategy` is settled for the processes of this launch."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return config
    from relora.distributed.group import current_group
    from relora.planning.strategy import settled_strategy

    return settled_strategy(config, current_group())


@contextmanager
def launched() -> Iterator[bool]:
    """Join the other processes, if a launcher such as torchrun has started several; an error is said by one of them.

    Yields:
        Whether this process prints for all.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield True
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else a lost process is a page of C++ beside our line
    from relora.distributed.group import together

    with together() as group:
        yield group.is_first


def processes_to_lead() -> int | None:
    """Return how many processes a launcher gives this verb on this machine, which rank 0 does alone.

    Rank 0 forgets the launcher, so that the runs that it starts are runs of one process.

    Returns:
        None on the other ranks, which have nothing to do.
    """
    from relora.distributed.launch import leave_launcher, place_of

    place = place_of(os.environ)
    if place is None:
        return 1
    if place.rank:
        return None
    leave_launcher()
    return place.local_world


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
