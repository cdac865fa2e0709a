"""The timetable of a run as a table."""

import math

from rich.console import Console
from rich.table import Table

from relora.planning.dry_run import Timetable


def print_timetable(plan: Timetable) -> None:
    """The plan as a table."""
    table = Table(
        title=f"{plan.method}: {plan.total_steps:,} steps of {plan.batch_tokens:,} tokens", title_justify="left"
    )
    for column in ("phase", "steps", "tokens", "trainable parameters", "frozen parameters"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for phase in plan.phases:
        steps = f"{phase.first_step:,} ... {phase.first_step + phase.steps:,}"
        table.add_row(
            phase.name.replace("_", " ") + (" (at most)" if plan.adaptive_switch and not phase.first_step else ""),
            steps,
            f"{phase.tokens:,}",
            f"{phase.trainable_parameters:,}",
            f"{phase.frozen_parameters:,}",
        )
    console = Console()
    console.print(table)
    console.print(f"restarts: {_restarts(plan)}")
    epochs = f"{plan.epochs:.2f}" if math.isfinite(plan.epochs) else "-"
    console.print(f"tokens: {plan.total_tokens:,} ({epochs} passes over the training data)")


def _restarts(plan: Timetable) -> str:
    if plan.adaptive_restarts:
        return f"at most {plan.most_restarts}, when the run decides"
    if plan.adaptive_switch and plan.most_restarts:
        return f"{len(plan.restarts)} to {plan.most_restarts}, counted from the end of the warm start"
    shown = ", ".join(f"{step:,}" for step in plan.restarts[:12]) + (" ..." if len(plan.restarts) > 12 else "")
    return f"{len(plan.restarts)}" + (f" (before steps {shown})" if plan.restarts else "")
