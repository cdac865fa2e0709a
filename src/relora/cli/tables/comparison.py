"""A comparison of methods as a table."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

WIDTH = 140
"""Characters of the table at the least: on a narrower terminal figures would be cut, and a cut figure tells nothing."""


def print_comparison(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print one row for each method on standard output; the first column holds the methods' names."""
    console, table = Console(highlight=False), Table(box=None, pad_edge=False)
    console.width = max(console.width, WIDTH)
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
