"""Table of `relora compare`: one method in a row."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Column

from relora.cli.tables.layout import build_table, console_or_stdout

LEAST_WIDTH = 140
"""Characters of a line, also on a narrower terminal: there figures would be cut, and a cut figure tells nothing."""


def print_comparison(columns: Sequence[str], rows: Sequence[Sequence[str]], console: Console | None = None) -> None:
    """Print one row for each method; the first column holds the methods' names, the others hold figures."""
    console = console_or_stdout(console)
    console.width = max(console.width, LEAST_WIDTH)
    names, *figures = columns
    console.print(build_table([Column(names), *(Column(figure, justify="right") for figure in figures)], rows))
