"""The fast part of the campaign on odd input, the same cases every time; all of it: `benchmarks/faults.py fuzz`.

What only a process of its own can show is here too: memory, and arguments that are not UTF-8.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.faults.fuzz import KINDS, Kind, bench, outcomes
from tests.fuzz.bench import Bench

TRIALS = 2050
LEAST = 2000
"""Cases that run here at the least."""


@pytest.fixture(scope="module")
def ready() -> Iterator[Bench]:
    with bench() as ready:
        yield ready


def test_the_shares_add_up() -> None:
    assert sum(TRIALS * kind.share // 100 for kind in KINDS) >= LEAST and sum(kind.share for kind in KINDS) == 100


@pytest.mark.parametrize("kind", KINDS, ids=[kind.what for kind in KINDS])
@pytest.mark.filterwarnings("default")  # as on the command line: a library's warning is no failure of a case
def test_odd_input(ready: Bench, kind: Kind) -> None:
    trials = TRIALS * kind.share // 100
    found = outcomes(kind, ready, trials, 0)
    assert len(found) >= trials and not [complaint for complaint in found if complaint]


def test_the_same_seed_gives_the_same_cases(ready: Bench) -> None:
    seen: list[list[object]] = []
    for _ in range(2):
        seen.append([])
        noting = KINDS[1]._replace(judge=lambda case, _: seen[-1].append(case))
        outcomes(noting, ready, 30, 5)
    assert seen[0] == seen[1]


def test_a_wrong_answer_is_counted(ready: Bench) -> None:
    """The campaign can fail: a judge that complains, raises or hangs is a case that did not pass."""

    def judge(case: object, bench: Bench) -> str | None:
        if len(found) % 2:
            raise ValueError("a traceback")
        return "two lines"

    found: list[str | None] = []
    for _ in range(2):
        found += outcomes(KINDS[1]._replace(judge=judge), ready, 1, 0)
    assert "two lines" in str(found[0]) and "ValueError: a traceback" in str(found[1])


PEAK = """
import resource, sys
from pathlib import Path
import tokenizers, pyarrow.parquet, relora.data.pretraining.prepare as wing
from transformers import PreTrainedTokenizerFast
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
wing.prepare(sys.argv[1:2], Path("out"), train_tokenizer=300, validation=0.0, workers=2)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def _peak_megabytes(folder: Path, source: str) -> float:
    """How much memory `prepare` takes beyond what its libraries do."""
    command = [sys.executable, "-c", PEAK, source]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return int(ended.stdout.split()[-1]) / 1024


def test_one_long_line_takes_little_memory(tmp_path: Path) -> None:
    """A document of 2 MB: the tokenizer alone would take 350 MB for it."""
    text = "the cat sat on the mat, and so did the dog " * 50_000
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    assert _peak_megabytes(tmp_path, "a.jsonl") < 250


def test_a_word_without_an_end_takes_little_time(tmp_path: Path) -> None:
    """The time to train a tokenizer grows with the square of a word's length, if nobody cuts it."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "abcdefghij" * 50_000}))
    assert _peak_megabytes(tmp_path, "a.jsonl") < 250


def test_many_tiny_documents_take_little_memory(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 30_000)
    assert _peak_megabytes(tmp_path, "a.jsonl") < 250


@pytest.mark.parametrize(
    "arguments",
    [
        [b"config", b"caf\xe9.yaml"],
        [b"config", b"c.yaml", b"seed=\xff"],
        [b"config", b"c.yaml", b"output_dir=caf\xe9"],
        [b"report", b"caf\xe9"],
        [b"prepare", b"caf\xe9.txt", b"--out", b"out\xff", b"--train-tokenizer", b"300"],
    ],
)
def test_arguments_that_are_not_utf8(tmp_path: Path, arguments: list[bytes]) -> None:
    (tmp_path / "c.yaml").write_text("output_dir: run\n")
    command = [os.fsencode(sys.executable), b"-c", b"from relora.cli import main; main()", *arguments]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert ended.returncode == 2 and ended.stderr.startswith(b"relora: ") and ended.stderr.count(b"\n") == 1
