"""What a run will do, said before it does it: phases, restarts, trainable parameters, tokens. Builds and writes
nothing.
"""

from dataclasses import dataclass

import torch

from relora.config import RunConfig
from relora.device import choose_device
from relora.lowrank import inject
from relora.recipes.from_settings import adaptive_of, lowrank_of, most_restarts, schedule_of
from relora.recipes.pretraining_inputs import open_data, open_fitting_model
from relora.train.optim import check_optimizer


@dataclass(frozen=True)
class TimetablePhase:
    """One stretch of the run."""

    name: str
    first_step: int
    steps: int
    tokens: int
    trainable_parameters: int
    frozen_parameters: int


@dataclass(frozen=True)
class Timetable:
    """The whole timetable."""

    method: str
    phases: list[TimetablePhase]
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


def describe(config: RunConfig) -> Timetable:
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
    return Timetable(
        method=config.method,
        phases=[
            TimetablePhase(name, start, steps, steps * config.batch_tokens, trainable, frozen)
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
