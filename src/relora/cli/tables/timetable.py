"""Table of `relora pretrain --dry-run`: phases, restarts and tokens of a run."""

import math

from rich.console import Console
from rich.table import Column

from relora.cli.tables.layout import build_table, console_or_stdout
from relora.planning.timetable import Timetable, TimetablePhase

SHOWN_RESTARTS = 12
"""Number of restarts whose steps are listed."""


def print_timetable(timetable: Timetable, console: Console | None = None) -> None:
    """Print a table of the phases, one in a row, and below it the restarts and the passes over the data."""
    console = console_or_stdout(console)
    figures = ("steps", "tokens", "trainable parameters", "frozen parameters")
    columns = [Column("phase"), *(Column(figure, justify="right") for figure in figures)]
    rows = [_phase_row(phase, timetable) for phase in timetable.phases]
    title = f"{timetable.method}: {timetable.total_steps:,} steps of {timetable.batch_tokens:,} tokens"
    console.print(build_table(columns, rows, title=title))
    epochs = f"{timetable.epochs:.2f}" if math.isfinite(timetable.epochs) else "-"
    console.print(f"restarts: {_restarts(timetable)}", highlight=True)
    console.print(f"tokens: {timetable.total_tokens:,} ({epochs} passes over the training data)", highlight=True)
    for line in timetable.notes:
        console.print(line, markup=False, soft_wrap=True)


def _phase_row(phase: TimetablePhase, timetable: Timetable) -> list[str]:
    name = phase.name.replace("_", " ")
    if timetable.adaptive_switch and phase.first_step == 0:
        name += " (at most)"
    return [
        name,
        f"{phase.first_step:,} ... {phase.first_step + phase.steps:,}",
        f"{phase.tokens:,}",
        f"{phase.trainable_parameters:,}",
        f"{phase.frozen_parameters:,}",
    ]


def _restarts(timetable: Timetable) -> str:
    """Say how many restarts there will be, and before which steps where that is known."""
    count = len(timetable.restarts)
    if timetable.adaptive_restarts:
        return f"at most {timetable.most_restarts}, when the run decides"
    if timetable.adaptive_switch and timetable.most_restarts:
        return f"{count} to {timetable.most_restarts}, counted from the end of the warm start"
    if not count:
        return "0"
    steps = ", ".join(f"{step:,}" for step in timetable.restarts[:SHOWN_RESTARTS])
    if count > SHOWN_RESTARTS:
        steps += " ..."
    return f"{count} (before steps {steps})"
