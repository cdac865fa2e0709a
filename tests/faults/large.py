"""Sources that are large in one way: a single line, a single word, ever so many tiny documents. Memory stays bounded.

Each is prepared by a process of its own, which says at its end how much memory it has held at most.
"""

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from relora.data.pretraining.shards import read_index

MOST_BYTES = 1 << 30
WORDS = [
    "the",
    "old",
    "house",
    "stood",
    "on",
    "a",
    "hill",
    "and",
    "nobody",
    "had",
    "seen",
    "its",
    "door",
    "open",
    "for",
    "many",
    "a",
    "year",
]

PREPARE = """
import atexit
from pathlib import Path
from relora.cli import main
atexit.register(lambda: print(Path("/proc/self/status").read_text()))
main()
"""


def campaign(trials: int, seed: int) -> list[tuple[str, int, int]]:
    """A line of `trials` MB, ten thousand times as many documents, a word of a hundredth of it."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        return [
            prepared(Path(place), f"one JSON line of {trials} MB", 1, [json.dumps({"text": text_of(draw, trials)})]),
            prepared(Path(place), f"{trials * 10_000:,} tiny documents", trials * 10_000, tiny(draw, trials * 10_000)),
            prepared(Path(place), f"one word of {trials / 100:g} MB", 1, [json.dumps({"text": "x" * trials * 10_000})]),
        ]


def text_of(draw: random.Random, megabytes: int) -> str:
    """Words, about so many million characters of them."""
    return " ".join(draw.choices(WORDS, k=megabytes * 1_000_000 * len(WORDS) // len(" ".join(WORDS))))


def tiny(draw: random.Random, documents: int) -> Iterator[str]:
    """Lines of JSON, two words each."""
    for _ in range(documents):
        yield json.dumps({"text": " ".join(draw.choices(WORDS, k=2))})


def prepared(place: Path, what: str, documents: int, lines: Iterator[str] | list[str]) -> tuple[str, int, int]:
    """Whether all documents arrive, in at most `MOST_BYTES` of memory; the peak stands in the row."""
    source, out = place / "source.jsonl", place / what.replace(" ", "-")
    with source.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
    options = ["--out", str(out), "--train-tokenizer", "300", "--validation", "0", "--workers", "2"]
    command = [sys.executable, "-c", PREPARE, "prepare", str(source), *options]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # not getrusage: what it tells of a child begins with the memory of the parent that it was forked from
    peak = next(int(line.split()[1]) * 1024 for line in printed.splitlines() if line.startswith("VmHWM"))
    sound = read_index(out / "train").documents == documents
    return f"{what} ({peak / 1e6:.0f} MB of memory)", int(sound and peak <= MOST_BYTES), 1
