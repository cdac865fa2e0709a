"""Table of a search: it fits the terminal, and no figure in it is cut."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from relora.cli.tables.trials import print_trials

SETTINGS = ("optimizer.lowrank_lr", "lowrank.r", "lowrank.use_dora", "lowrank.target_modules", "schedule.epochs")
COLUMNS = ("trial", "state", "of the run", "loss", "perplexity", *SETTINGS, "tokens", "seconds", "peak MB")
ROWS = [
    [
        "11",
        "complete",
        "100%",
        "2.1234 (mean of 3 seeds)",
        "8.36",
        "0.004",
        "8",
        "False",
        "all-linear",
        "3",
        "1,234,567",
        "123.4",
        "1,234",
    ],
    [
        "0",
        "pruned",
        "25%",
        "2.5",
        "12.18",
        "0.002",
        "16",
        "False",
        "['q_proj', 'v_proj']",
        "2",
        "300,000",
        "30.1",
        "999",
    ],
]


def printed(width: int, rows: list[list[str]] = ROWS) -> list[str]:
    out = io.StringIO()
    console = Console(file=out, width=width, highlight=False)
    print_trials(COLUMNS, rows, SETTINGS, Path("runs/study/tune.md"), console)
    return out.getvalue().splitlines()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140])
def test_a_table_fits_and_names_what_it_leaves_out(width: int) -> None:
    lines = printed(width)
    table = [line for line in lines if ":" not in line]
    assert all(len(line.rstrip()) <= width for line in table)
    text = "\n".join(lines)
    assert "…" not in text and "The same in all trials: lowrank.use_dora." in text
    assert lines[-1] == "Whole table: runs/study/tune.md"
    left = [line for line in lines if line.startswith("Left out for want of room: ")]
    names = left[0].partition(": ")[2].rstrip(".").split(", ") if left else []
    assert set(names) <= set(COLUMNS[1:])
    kept = [at for at, name in enumerate(COLUMNS) if name not in (*names, "lowrank.use_dora")]
    assert [re.split(r"\s{2,}", line.strip()) for line in table[-2:]] == [[row[at] for at in kept] for row in ROWS]


def test_a_wide_terminal_shows_everything() -> None:
    assert not any(line.startswith("Left out") for line in printed(200))
    differing = [[*ROWS[0]], [*ROWS[1][:7], "True", *ROWS[1][8:]]]
    assert not any("Whole table" in line for line in printed(200, differing))
