"""Table of `relora plan --world`: a step on several processes."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Column

from relora.cli.tables.layout import build_table, console_or_stdout
from relora.planning.scale import Scaled
from relora.planning.sizes import format_bytes


def print_scale(found: Sequence[Scaled], console: Console | None = None) -> None:
    """Print a row for each number of processes, phase and strategy."""
    columns = [
        Column("ranks", justify="right", no_wrap=True),
        *(Column(name, no_wrap=True) for name in ("phase", "strategy")),
        *(Column(name, justify="right", no_wrap=True) for name in ("sends", "waits", "a step", "of ideal", "peak")),
    ]
    rows = [
        [
            f"{one.world:,}",
            one.phase.replace("_", " "),
            one.strategy,
            format_bytes(one.sent_bytes),
            f"{one.exposed:.3g} s",
            f"{one.step_seconds:.3g} s",
            f"{100 * one.efficiency:.0f}%",
            format_bytes(one.peak),
        ]
        for one in found
    ]
    console = console_or_stdout(console)
    console.print(build_table(columns, rows))
    console.print(
        "on paper: a rank sends and waits so much in a step; of ideal: tokens per second against as many ranks alone"
    )
