"""What the campaigns on damage, disks and drift share: a real run of 14 steps in a quarter of a second, and a tally."""

import json
import os
import shutil
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

import torch
import yaml
from tests.command import Ended, call
from tests.golden.make import settings

DATA = Path(__file__).parents[1] / "golden" / "data"
TIMINGS = {"tokens_per_second", "step_seconds", "seconds", "peak_memory_bytes"}
"""What differs between two runs of the same numbers."""

Outcome = tuple[str, str | None]
"""What was tried, and what went wrong; None if nothing did."""


def relora(*arguments: object) -> Ended:
    """`relora ARGUMENTS...` in this process; an exception that comes out of it is status 1, as in a shell."""
    try:
        return call(*arguments)
    except Exception:
        return Ended(1, "", traceback.format_exc(limit=-4))


class TinyRun:
    """The golden run with a checkpoint every second step: warm start 2, restarts before steps 6 and 10, 14 in all."""

    def __init__(self, place: Path, name: str = "run") -> None:
        torch.set_num_threads(1)
        self.folder, self.config = place / name, place / f"{name}.yaml"
        tree = settings(str(self.folder)) | {"checkpoint": {"every_steps": 2, "keep_last": 2}}
        tree["data"] = {"train": str(DATA / "train"), "validation": str(DATA / "validation"), "sequence_length": 16}
        self.config.write_text(yaml.safe_dump(tree))

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def pretrain(self, *arguments: object) -> Ended:
        """Start it or go on with it."""
        return relora("pretrain", self.config, "--quiet", *arguments)

    def finished(self) -> "TinyRun":
        """The same, trained to its end."""
        ended = self.pretrain()
        assert ended.status == 0, ended.err
        return self

    def copied(self, place: Path, name: str) -> "TinyRun":
        """A copy of it, finished as it is, from before its end: no model, samples or report; hard links kept."""
        other = TinyRun(place, name)
        other.folder.mkdir()
        for path in self.folder.iterdir():
            if path.is_file() and path.name != "report.html":
                shutil.copy(path, other.folder)
        shutil.copytree(self.folder / "tokenizer", other.folder / "tokenizer")
        copies: dict[int, Path] = {}
        for file in sorted(self.checkpoints.glob("step-*/*")):
            target = other.checkpoints / file.relative_to(self.checkpoints)
            target.parent.mkdir(parents=True, exist_ok=True)
            if copy := copies.get(inode := file.stat().st_ino):
                os.link(copy, target)
            else:
                copies[inode] = Path(shutil.copy(file, target))
        return other

    def result(self) -> dict[str, object]:
        """All that a finished run must have in common with an uninterrupted one: its last checkpoint, the model, the
        figures but for timings.
        """
        last = max(self.checkpoints.glob("step-*"))
        files = [*sorted(last.glob("*.safetensors")), self.folder / "model" / "model.safetensors"]
        tensors: dict[str, object] = {f"{file.parent.name}/{file.name}": file.read_bytes() for file in files}
        return tensors | {name: self.figures(name) for name in ("metrics.jsonl", "restarts.jsonl")}

    def figures(self, file: str) -> list[dict[str, object]]:
        """The records of a metric file without timings; none if it is damaged."""
        try:
            records = [json.loads(line) for line in (self.folder / file).read_bytes().splitlines()]
        except ValueError:
            return []
        return [{key: value for key, value in record.items() if key not in TIMINGS} for record in records]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; a folder as empty bytes, a link as where it leads."""
    return {
        str(path.relative_to(folder)): (
            os.fsencode(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        )
        for path in sorted(folder.rglob("*"))
    }


def tally(outcomes: Iterable[Outcome]) -> list[tuple[str, int, int]]:
    """The rows (what, passed, of) of a campaign; every complaint goes to stderr."""
    rows: dict[str, list[bool]] = {}
    for what, complaint in outcomes:
        rows.setdefault(what, []).append(complaint is None)
        if complaint is not None:
            print(f"{what}: {complaint}", file=sys.stderr)
    return [(what, sum(passed), len(passed)) for what, passed in rows.items()]


def complaints(outcomes: Iterable[Outcome]) -> list[str]:
    """What went wrong, for an assertion that shows it."""
    return [f"{what}: {complaint}" for what, complaint in outcomes if complaint is not None]
