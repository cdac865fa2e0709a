"""What the verbs have in common: options of one meaning, reading a configuration, printing figures."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from relora.errors import UserError

if TYPE_CHECKING:
    from relora.config import RunConfig

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Overrides of single keys.")]
Json = Annotated[bool, typer.Option("--json", help="Print figures as JSON.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Dtype = Annotated[str, typer.Option(help="fp32, bf16 or fp16.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model, if you read it.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over; what is in the run folder is moved aside.")]
Strict = Annotated[
    bool, typer.Option("--strict", help="Continue from the newest checkpoint and to the last bit, or not at all.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]


def configuration(path: Path, overrides: list[str] | None) -> "RunConfig":
    """The settings of a pretraining run."""
    from relora.config import load_config

    one_process()
    return load_config(path, overrides or [])


def one_process() -> None:
    """`UserError` under a launcher of several."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("WORLD_SIZE: this version trains in one process; start it without torchrun")


def share(text: str) -> float:
    """`1%` or `0.01` -> 0.01."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise UserError(f"--validation {text}: give a share below 100%, e.g. 1% or 0.01")
    return share


def print_json(figures: Any) -> None:
    """For another program to read."""
    print(json.dumps(figures, indent=1, default=str))
