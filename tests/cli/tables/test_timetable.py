"""The table of `relora pretrain --dry-run`."""

from dataclasses import replace

import pytest
from tests.cli.tables.screen import Screen

from relora.cli.tables.timetable import print_timetable
from relora.planning.timetable import Timetable, TimetablePhase

TIMETABLE = Timetable(
    method="relora",
    phases=[
        TimetablePhase("warm_start", 0, 1000, 16_384_000, 9_000_000, 0),
        TimetablePhase("low_rank", 1000, 4000, 65_536_000, 2_000_000, 7_000_000),
    ],
    restarts=[2000, 3000, 4000],
    most_restarts=3,
    batch_tokens=16_384,
    total_steps=5000,
    total_tokens=81_920_000,
    epochs=1.5,
    adaptive_switch=False,
    adaptive_restarts=False,
    notes=["experts of 2 layers get no factors"],
)


def printed(timetable: Timetable) -> str:
    screen = Screen()
    print_timetable(timetable, screen)
    return screen.text


def test_phases_restarts_and_tokens() -> None:
    text = printed(TIMETABLE)
    assert text.startswith("relora: 5,000 steps of 16,384 tokens\n")
    assert "│ low rank   │ 1,000 ... 5,000 │ 65,536,000 │" in text and "at most" not in text
    assert text.endswith(
        "restarts: 3 (before steps 2,000, 3,000, 4,000)\ntokens: 81,920,000 (1.50 passes over the training data)\n"
        "experts of 2 layers get no factors"
    )


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"restarts": [], "most_restarts": 0}, "restarts: 0"),
        ({"adaptive_restarts": True}, "restarts: at most 3, when the run decides"),
        ({"adaptive_switch": True, "most_restarts": 4}, "restarts: 3 to 4, counted from the end of the warm start"),
        ({"restarts": list(range(13)), "most_restarts": 13}, "10, 11 ...)"),
    ],
)
def test_restarts_that_are_none_many_or_left_to_the_run(changes: dict[str, object], line: str) -> None:
    assert line in printed(replace(TIMETABLE, **changes))  # type: ignore[arg-type]


def test_a_warm_start_that_the_run_ends_has_its_longest_length() -> None:
    assert "warm start (at most)" in printed(replace(TIMETABLE, adaptive_switch=True))


def test_passes_over_no_data_are_a_dash() -> None:
    assert "(- passes over" in printed(replace(TIMETABLE, epochs=float("inf")))
