"""What a run will do, said before it does it: phases, restarts, trainable parameters, tokens. Builds and writes
nothing.
"""

import math
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from relora.config import RunConfig
from relora.device import choose_device
from relora.lowrank import inject
from relora.recipes.parts import (
    adaptive_of,
    lowrank_of,
    most_restarts,
    open_data,
    open_fitting_model,
    schedule_of,
)
from relora.train.optim import check_optimizer


@dataclass(frozen=True)
class PhasePlan:
    """One stretch of the run."""

    name: str
    first_step: int
    steps: int
    tokens: int
    trainable_parameters: int
    frozen_parameters: int


@dataclass(frozen=True)
class RunPlan:
    """The whole timetable."""

    method: str
    phases: list[PhasePlan]
    restarts: list[int]
    """As the configuration says; where the run decides on them, when they come if it always finds cause."""
    most_restarts: int
    """As many as there can be, wherever the run switches to low rank."""
    adaptive_switch: bool
    """The phases are those of the longest warm start."""
    adaptive_restarts: bool
    total_steps: int
    total_tokens: int
    batch_tokens: int
    epochs: float
    """Passes over the training data."""


def describe(config: RunConfig) -> RunPlan:
    """The plan of a configuration, from a model without memory (on the meta device); `UserError` as the run's."""
    schedule, adaptive = schedule_of(config), adaptive_of(config)
    choose_device(config.device)
    check_optimizer(config.optimizer.name)
    batches, held_out = open_data(config)
    with torch.device("meta"):
        model = open_fitting_model(config, held_out.folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    first = min(schedule.warm_start_steps, schedule.total_steps)
    phases = []
    if first:
        phases.append((schedule.phase(0), 0, first, parameters, 0))
    if first < schedule.total_steps:
        report = inject(model, lowrank_of(config))
        phases.append(("low_rank", first, schedule.total_steps - first, report.trainable, report.frozen))
    return RunPlan(
        method=config.method,
        phases=[
            PhasePlan(name, start, steps, steps * config.batch_tokens, trainable, frozen)
            for name, start, steps, trainable, frozen in phases
        ],
        restarts=list(schedule.restarts),
        most_restarts=most_restarts(config),
        adaptive_switch=adaptive.warm_start is not None,
        adaptive_restarts=adaptive.cycle is not None,
        total_steps=schedule.total_steps,
        total_tokens=schedule.total_steps * config.batch_tokens,
        batch_tokens=config.batch_tokens,
        epochs=schedule.total_steps * config.batch.sequences / batches.epoch_sequences,
    )


def print_plan(plan: RunPlan) -> None:
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


def _restarts(plan: RunPlan) -> str:
    if plan.adaptive_restarts:
        return f"at most {plan.most_restarts}, when the run decides"
    if plan.adaptive_switch and plan.most_restarts:
        return f"{len(plan.restarts)} to {plan.most_restarts}, counted from the end of the warm start"
    shown = ", ".join(f"{step:,}" for step in plan.restarts[:12]) + (" ..." if len(plan.restarts) > 12 else "")
    return f"{len(plan.restarts)}" + (f" (before steps {shown})" if plan.restarts else "")
