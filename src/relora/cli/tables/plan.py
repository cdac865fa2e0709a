"""A plan, as tables for a person."""

from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from relora.planning import KINDS
from relora.planning.plan import PhaseCost, Plan, format_bytes


def print_plan(plan: Plan) -> None:
    """The plan as tables."""
    console = Console(highlight=False)
    table = Table(title=f"a {plan.method} run on {plan.device}", title_justify="left")
    table.add_column("")
    for phase in plan.phases:
        table.add_column(phase.name.replace("_", " "), justify="right")
    bound = " at most" if plan.adaptive_switch else ""
    steps = (f"{p.first_step:,} ... {p.first_step + p.steps:,}{bound * (not p.first_step)}" for p in plan.phases)
    table.add_row("steps", *steps)
    for name in ("trained", "frozen", "factors"):
        table.add_row(f"{name} parameters", *(f"{getattr(p.figures, name):,}" for p in plan.phases))
    table.add_section()
    for kind in KINDS:
        sizes = [p.figures.memory.get(kind, 0) for p in plan.phases]
        if any(size >= 10**5 for size in sizes):
            table.add_row(kind, *map(format_bytes, sizes))
    for label, shown in _rows(plan):
        table.add_row(label, *(shown(p) for p in plan.phases))
    console.print(table)
    worst = max(plan.phases, key=lambda phase: phase.checkpoint_peak)
    console.print(
        f"peak: {format_bytes(plan.peak)}, in the {worst.name.replace('_', ' ')} phase; {_time(plan.seconds)} of steps"
    )
    if plan.alternatives:
        others = Table(title="with other settings", title_justify="left")
        for column in ("method", "base", "activation checkpointing", "peak", "a step"):
            others.add_column(column, justify="right" if column in ("peak", "a step") else "left")
        for other in plan.alternatives:
            seconds = f"{other.step_seconds:.2f} s"
            checkpointing = other.activation_checkpointing
            others.add_row(other.method, other.base or "-", checkpointing, format_bytes(other.peak), seconds)
        console.print(others)


def _rows(plan: Plan) -> list[tuple[str, Callable[[PhaseCost], str]]]:
    rows: list[tuple[str, Callable[[PhaseCost], str]]] = [
        ("process", lambda p: format_bytes(p.process)),
        ("allocator", lambda p: format_bytes(p.allocator)),
        ("peak of a step", lambda p: format_bytes(p.predicted_peak)),
        ("... while a checkpoint is written", lambda p: format_bytes(p.checkpoint_peak)),
        ("between steps (tensors)", lambda p: format_bytes(p.figures.resident)),
        (
            "restart (tensors)",
            lambda p: format_bytes(p.figures.restart) if p.figures.factors and plan.restarts else "-",
        ),
        ("a step", lambda p: f"{p.figures.seconds:.2f} s"),
        ("the phase", lambda p: _time(p.seconds)),
    ]
    if any(phase.measured for phase in plan.phases):
        rows.append(("probed: peak", lambda p: format_bytes(p.measured.peak) if p.measured else "-"))
        rows.append(("probed: a step", lambda p: f"{p.measured.step_seconds:.2f} s" if p.measured else "-"))
    return rows


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"
