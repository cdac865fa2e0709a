"""What the fuzzed cases use: a prepared folder, a tiny run, text, an empty scratch folder for each case."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import tokenizers
import yaml
from tests.faults.tiny import DATA, Ended, TinyRun

from relora.data.pretraining.journal import TRAIN

LONGEST_LINE = 300
"""Characters of an error message."""

VALID = {
    "output_dir": "run",
    "model": {"preset": "llama-9m", "vocab_size": 512},
    "data": {"train": "data/train", "validation": "data/validation", "sequence_length": 16},
    "lowrank": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "schedule": {"total_steps": 3000},
    "log": {"trackers": []},
}
"""A configuration that can be checked, and whose data is not there."""


class Bench:
    """`place/scratch` is the working directory of every case and empty at its start; the rest is only read."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.data = place / "data"
        shutil.copytree(DATA, self.data)
        self.tokenizer_folder = self.data / TRAIN / "tokenizer"
        self.tokenizer = tokenizers.Tokenizer.from_file(str(self.tokenizer_folder / "tokenizer.json"))

    @cached_property
    def run(self) -> TinyRun:
        """Finished, with a model and checkpoints."""
        return TinyRun(self.place).finished()

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """An empty working directory with a valid configuration, `c.yaml`; gone afterwards."""
        before = Path.cwd()
        scratch = self.place / "scratch"
        scratch.mkdir()
        (scratch / "c.yaml").write_text(yaml.safe_dump(VALID))
        os.chdir(scratch)
        try:
            yield scratch
        finally:
            os.chdir(before)
            shutil.rmtree(scratch)


def complaint_of(ended: Ended, *words: str) -> str | None:
    """None if it succeeded, or was refused in one short line that has all of `words`."""
    if ended.status == 0:
        return None
    if len(ended.err) > LONGEST_LINE:
        return f"{len(ended.err)} characters: {ended.err[:200]}"
    return ended.complaint(2, *words)
