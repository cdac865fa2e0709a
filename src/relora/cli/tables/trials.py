"""Table of `relora tune`: one trial in a row, in as many columns as the terminal has room for."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Column

from relora.cli.tables.layout import build_table, console_or_stdout

GAP = 2
"""Spaces between two columns."""


def print_trials(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    settings: Sequence[str],
    whole: Path,
    console: Console | None = None,
) -> None:
    """Print one row for each trial: what it has come to, and the settings that differ between trials.

    A column that does not fit beside those before it is left out, since a figure that is cut tells nothing.

    Args:
        settings: those of `columns` that are keys of the configuration.
        whole: file with the whole table, named in a line below if something is left out.
    """
    console = console_or_stdout(console)
    alike = {name for at, name in enumerate(columns) if name in settings and len({row[at] for row in rows}) == 1}
    heads = [_head(name, settings) for name in columns]
    shown, width = list[int](), 0
    for at, name in enumerate(columns):
        needed = max(len(line) for line in (*heads[at].split("\n"), *(row[at] for row in rows)))
        if name in alike or (shown and width + GAP + needed > console.width):
            continue
        width += needed + (GAP if shown else 0)
        shown.append(at)
    figures = [
        Column(heads[at], justify="left" if at in shown[:1] else "right", no_wrap=True, overflow="crop") for at in shown
    ]
    console.print(build_table(figures, [[row[at] for at in shown] for row in rows]))
    left = [name for at, name in enumerate(columns) if at not in shown and name not in alike]
    if left:
        console.print(f"Left out for want of room: {', '.join(left)}.", soft_wrap=True)
    if alike:
        console.print(
            f"The same in all trials: {', '.join(name for name in columns if name in alike)}.", soft_wrap=True
        )
    if left or alike:
        console.print(f"Whole table: {whole}", soft_wrap=True)


def _head(name: str, settings: Sequence[str]) -> str:
    """Return the head of a column; the section of a key stands in a line of its own, so that the column is narrow."""
    section, dot, key = name.rpartition(".")
    return f"{section}{dot}\n{key}" if name in settings and dot else name
