"""Form that all tables share: a console, columns and rows."""

from collections.abc import Iterable, Sequence

from rich.box import HEAVY_HEAD
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text


def console_or_stdout(console: Console | None) -> Console:
    """Return the given console, or one that writes to standard output and leaves numbers uncoloured."""
    return console or Console(highlight=False)


def build_table(columns: Sequence[Column], rows: Iterable[Sequence[str | Text]], *, title: str = "") -> Table:
    """Build a table; one with a title has a frame, one without is plain.

    Args:
        columns: headers with their alignment, and what happens to a cell that is too wide.
        rows: the cells of each row, as many as there are columns.
    """
    frame = HEAVY_HEAD if title else None
    table = Table(*columns, title=title or None, title_justify="left", box=frame, pad_edge=frame is not None)
    for row in rows:
        table.add_row(*row)
    return table
