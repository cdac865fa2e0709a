"""What an evaluation leaves: a new folder with its scores, and with what was asked, expected and answered.

scores.json     figures and settings, and the versions of what computed them
samples.jsonl   one sample a line, each with its own figures
"""

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from relora.errors import RunStopped, UserError
from relora.files.atomic import sync, write_durably
from relora.runs.environment import describe_environment

SCORES, SAMPLES = "scores.json", "samples.jsonl"


def check_free(out: Path) -> None:
    """`UserError` unless a folder can be made there: what was scored before is not overwritten."""
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: exists, and was left as it is; give a new folder")
    parent = next(place for place in out.absolute().parents if place.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{out}: cannot be made, since {parent} cannot be written; give another folder")


def save_scores(out: Path, scores: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
    """Write a new folder: scores.json, with what it ran on, and samples.jsonl, one sample a line.

    It is written aside and then renamed, so `out` is whole or absent. A number that is not finite is null.

    Raises:
        RunStopped: the disk is full or refuses the write.
    """
    aside = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        write_durably(aside / SAMPLES, "".join(_json(sample) + "\n" for sample in samples))
        described = {**scores, "environment": describe_environment()}
        write_durably(aside / SCORES, _json(described, indent=1) + "\n")
        aside.rename(out)
        sync(out.parent)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise RunStopped(f"{out}: the scores could not be written: {error.strerror or error}") from error


def _json(value: Any, indent: int | None = None) -> str:
    """What JSON has no word for is written as Python prints it."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    """None in place of every number that is not finite."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
