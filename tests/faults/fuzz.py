"""Hostile and odd input: configurations, prepared folders, safetensors files, sources, paths and command lines.

Whatever is given, a command ends with success or with one line and status 2, within `SECONDS`; what was there before
is as it was, and a command that was refused leaves nothing behind. Where `prepare` succeeds, its tokens are decoded
and compared with the text that went in.

Each `Kind` is a hypothesis strategy and a judge of one case. The judge returns None or what went wrong, so that a
campaign counts failures where a test would end at the first one.
"""

import contextlib
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple
from unittest import mock

import huggingface_hub
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy
from tests.fuzz.bench import Bench
from tests.fuzz.commands import (
    command_lines,
    config_files,
    judge_command,
    judge_config,
    judge_overrides,
    override_lists,
)
from tests.fuzz.folders import judge_prepared, judge_safetensors, prepared_damage, safetensors_damage
from tests.fuzz.sources import (
    damaged_sources,
    json_lines,
    judge_damaged,
    judge_place,
    judge_records,
    judge_rows,
    judge_text,
    places,
    tables,
    text_files,
)

SECONDS = 20.0
"""No case may take longer, on a busy machine either."""


class Kind(NamedTuple):
    """One kind of input."""

    what: str
    cases: SearchStrategy[Any]
    judge: Callable[[Any, Bench], str | None]
    share: int
    """Cases of this kind in a hundred."""


KINDS = (
    Kind("configuration files", config_files(), judge_config, 20),
    Kind("overrides", override_lists(), judge_overrides, 39),
    Kind("command lines", command_lines(), judge_command, 12),
    Kind("prepared folders", prepared_damage(), judge_prepared, 12),
    Kind("safetensors files", safetensors_damage(), judge_safetensors, 8),
    Kind("JSON lines, read back", json_lines(), judge_records, 3),
    Kind("text files, read back", text_files(), judge_text, 1),
    Kind("tables, read back", tables(), judge_rows, 1),
    Kind("damaged sources", damaged_sources(), judge_damaged, 2),
    Kind("odd paths", places(), judge_place, 2),
)


def campaign(trials: int, seed: int) -> list[tuple[str, int, int]]:
    """`trials` cases over all kinds; rows of (kind, cases that passed, cases)."""
    rows = []
    with bench() as ready:
        for kind in KINDS:
            found = outcomes(kind, ready, max(1, trials * kind.share // 100), seed)
            for complaint in [complaint for complaint in found if complaint][:5]:
                print(f"{kind.what}: {complaint}")
            rows.append((kind.what, sum(complaint is None for complaint in found), len(found)))
    return rows


def outcomes(kind: Kind, bench: Bench, trials: int, number: int) -> list[str | None]:
    """Of each case None or what went wrong; the same `number` gives the same cases."""
    found: list[str | None] = []

    @seed(number)
    @settings(
        max_examples=trials,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(kind.cases)
    def judge(case: Any) -> None:
        complaint = None
        try:
            with bench.scratch(), _at_most(SECONDS):
                complaint = kind.judge(case, bench)
        except Exception as error:  # whatever comes out is a failure of this case
            complaint = f"{type(error).__name__}: {error}"
        found.append(complaint and f"{complaint} for {str(case)[:600]!r}")

    judge()
    return found


@contextlib.contextmanager
def bench() -> Iterator[Bench]:
    """What the cases damage and use, with the hub out of reach."""
    place = Path(tempfile.mkdtemp(prefix="relora-fuzz-"))
    try:
        with mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True):
            yield Bench(place)
    finally:
        shutil.rmtree(place, ignore_errors=True)


class TookTooLong(Exception):
    """A case hangs."""


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise TookTooLong(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
