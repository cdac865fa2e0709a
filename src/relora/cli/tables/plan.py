"""Tables of `relora plan`: memory by kind and time by phase, and the same with other settings."""

from collections.abc import Callable

from rich.console import Console
from rich.table import Column, Table

from relora.cli.tables.layout import build_table, console_or_stdout
from relora.planning.phase_cost import PhaseCost
from relora.planning.plan import Plan
from relora.planning.sizes import format_bytes
from relora.planning.step import KINDS

LEAST_BYTES = 10**5
"""Memory below which a kind is left out; at least one phase must have as much."""


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Print a table with a column for each phase, the peak of the whole run, and a table of alternatives, if any."""
    console = console_or_stdout(console)
    console.print(_phases_table(plan))
    worst = max(plan.phases, key=lambda phase: phase.checkpoint_peak)
    console.print(
        f"peak: {format_bytes(plan.peak)}, in the {_phase_name(worst)} phase; {_format_time(plan.seconds)} of steps"
    )
    for line in plan.notes:
        console.print(line, markup=False, soft_wrap=True)
    if plan.alternatives:
        console.print(_alternatives_table(plan))


def _phases_table(plan: Plan) -> Table:
    columns = [Column(""), *(Column(_phase_name(phase), justify="right") for phase in plan.phases)]
    table = build_table(columns, [], title=f"a {plan.method} run on {plan.device}")
    table.add_row("steps", *(_steps(phase, plan) for phase in plan.phases))
    for name in ("trained", "frozen", "factors"):
        table.add_row(f"{name} parameters", *(f"{getattr(phase.figures, name):,}" for phase in plan.phases))
    table.add_section()
    for kind in KINDS:
        sizes = [phase.figures.memory.get(kind, 0) for phase in plan.phases]
        if max(sizes) >= LEAST_BYTES:
            table.add_row(kind, *map(format_bytes, sizes))
    for label, format_cell in _figure_rows(plan):
        table.add_row(label, *map(format_cell, plan.phases))
    return table


def _phase_name(phase: PhaseCost) -> str:
    return phase.name.replace("_", " ")


def _steps(phase: PhaseCost, plan: Plan) -> str:
    steps = f"{phase.first_step:,} ... {phase.first_step + phase.steps:,}"
    return f"{steps} at most" if plan.adaptive_switch and phase.first_step == 0 else steps


def _figure_rows(plan: Plan) -> list[tuple[str, Callable[[PhaseCost], str]]]:
    """Return the label of each row below the kinds of memory, with the function that formats a phase's cell."""
    rows: list[tuple[str, Callable[[PhaseCost], str]]] = [
        ("process", lambda phase: format_bytes(phase.process)),
        ("allocator", lambda phase: format_bytes(phase.allocator)),
        ("peak of a step", lambda phase: format_bytes(phase.predicted_peak)),
        ("... while a checkpoint is written", lambda phase: format_bytes(phase.checkpoint_peak)),
        ("between steps (tensors)", lambda phase: format_bytes(phase.figures.resident)),
        (
            "restart (tensors)",
            lambda phase: format_bytes(phase.figures.restart) if phase.figures.factors and plan.restarts else "-",
        ),
        ("a step", lambda phase: f"{phase.figures.seconds:.2f} s"),
        ("the phase", lambda phase: _format_time(phase.seconds)),
    ]
    if any(phase.measured for phase in plan.phases):
        rows.append(("probed: peak", lambda phase: format_bytes(phase.measured.peak) if phase.measured else "-"))
        rows.append(("probed: a step", lambda phase: f"{phase.measured.step_seconds:.2f} s" if phase.measured else "-"))
    return rows


def _alternatives_table(plan: Plan) -> Table:
    columns = [
        *(Column(setting) for setting in ("method", "base", "activation checkpointing")),
        *(Column(figure, justify="right") for figure in ("peak", "a step")),
    ]
    rows = [
        [
            other.method,
            other.base or "-",
            other.activation_checkpointing,
            format_bytes(other.peak),
            f"{other.step_seconds:.2f} s",
        ]
        for other in plan.alternatives
    ]
    return build_table(columns, rows, title="with other settings")


def _format_time(seconds: float) -> str:
    minutes, whole_seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    if minutes:
        return f"{minutes} min {whole_seconds:02} s"
    return f"{seconds:.1f} s"
