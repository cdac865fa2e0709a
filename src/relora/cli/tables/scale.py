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
        *(Column(name, justify="right") for name in ("ranks", "sequences of a rank")),
        *(Column(name) for name in ("phase", "strategy")),
        *(Column(name, justify="right") for name in ("sends", "a step", "waits", "efficiency", "peak of a rank")),
    ]
    rows = [
        [
            f"{one.world:,}",
            f"{one.sequences:,}",
            one.phase.replace("_", " "),
            one.strategy,
            format_bytes(one.sent_bytes),
            f"{one.step_seconds:.3g} s",
            f"{one.exposed:.3g} s",
            f"{100 * one.efficiency:.0f}%",
            format_bytes(one.peak),
        ]
        for one in found
    ]
    console_or_stdout(console).print(build_table(columns, rows, title="a step on several processes, on paper"))
