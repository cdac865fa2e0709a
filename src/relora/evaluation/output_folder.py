"""The folder that an evaluation writes: its scores, and what was asked, expected and answered.

scores.json     figures and settings, and the versions of the libraries that computed them
samples.jsonl   one sample per line, with its own figures
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from relora.errors import RunStopped, UserError
from relora.files.atomic import atomic_folder
from relora.runs.environment import describe_environment

SCORES, SAMPLES = "scores.json", "samples.jsonl"


def check_free(out: Path) -> None:
    """Raise `UserError` if `out` exists, so that earlier scores are not overwritten, or if it cannot be created."""
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: exists, and was left as it is; give a new folder")
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{out}: cannot be made, since {parent} cannot be written; give another folder")


def save_scores(out: Path, scores: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
    """Write scores.json, with a description of the software and hardware, and samples.jsonl to the new folder `out`.

    The folder is written by `atomic_folder`, so `out` is complete or absent. Numbers that are not finite become null.

    Raises:
        RunStopped: `out` was created by somebody else since `check_free`, or the disk is full or refuses the write.
    """
    try:
        with atomic_folder(out, replace=False, parents=True) as partial:
            lines = "".join(_to_json(sample) + "\n" for sample in samples)
            (partial / SAMPLES).write_text(lines, encoding="utf-8")
            described = {**scores, "environment": describe_environment()}
            (partial / SCORES).write_text(_to_json(described, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunStopped(f"{out}: the scores could not be written: {error.strerror or error}") from error


def _to_json(value: Any, indent: int | None = None) -> str:
    """Convert a value to JSON text; an object that JSON cannot represent becomes its `str`."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    """Replace every number in a value that is not finite by None, at any depth."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
