"""The timetable of a run, told before it begins: phases, restarts, trainable parameters, tokens.

`relora pretrain --dry-run` prints it. Nothing is trained or written, and the model has no memory (meta device).
"""

from dataclasses import dataclass

import torch

from relora.config import RunConfig
from relora.device import choose_device
from relora.lowrank import inject
from relora.model.unused import leave_out_unused
from relora.recipes.from_settings import adaptive_of, lowrank_notes, lowrank_of, most_restarts, schedule_of
from relora.recipes.precision import settle_dtype
from relora.recipes.pretraining_inputs import open_data, open_fitting_model
from relora.train.optim import check_optimizer


@dataclass(frozen=True)
class TimetablePhase:
    """One phase of a run: full rank, warm start or low rank."""

    name: str
    first_step: int
    steps: int
    tokens: int
    trainable_parameters: int
    frozen_parameters: int


@dataclass(frozen=True)
class Timetable:
    """The whole timetable of a run; the fields are keys of `relora pretrain --dry-run --json`."""

    method: str
    phases: list[TimetablePhase]
    restarts: list[int]
    """Steps before which the restarts come. Where the run itself decides: those after the longest warm start, if its
    criteria for a restart are always met."""
    most_restarts: int
    """Largest possible number of restarts, whenever the run switches to low rank."""
    adaptive_switch: bool
    """Whether the run itself ends its warm start; the phases are then those of the longest one."""
    adaptive_restarts: bool
    """Whether the run itself decides when to restart."""
    total_steps: int
    total_tokens: int
    batch_tokens: int
    """Tokens of a step."""
    epochs: float
    """Passes over the training data."""
    notes: list[str]
    """Lines on the dtype that was chosen, on parameters that never train, and on what gets no factors."""


def timetable_of(config: RunConfig) -> Timetable:
    """Return the timetable of a configuration.

    Raises:
        UserError: the run would refuse the configuration or its data for the same reason.
    """
    schedule, adaptive = schedule_of(config), adaptive_of(config)
    device = choose_device(config.device)
    check_optimizer(config.optimizer.name)
    batches, held_out = open_data(config)
    with torch.device("meta"):
        model, vocabulary_notes = open_fitting_model(config, held_out.folder)
    _, dtype_line = settle_dtype(config, device, lambda: model)
    unused = leave_out_unused(model, config.data.sequence_length)
    notes = [line for line in (*vocabulary_notes, dtype_line, unused, *lowrank_notes(config, model)) if line]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total, switch = schedule.total_steps, min(schedule.warm_start_steps, schedule.total_steps)

    def phase(name: str, first_step: int, end: int, trainable: int, frozen: int) -> TimetablePhase:
        steps = end - first_step
        return TimetablePhase(name, first_step, steps, steps * config.batch_tokens, trainable, frozen)

    phases = []
    if switch > 0:
        phases.append(phase(schedule.phase(0), 0, switch, trained, parameters - trained))
    if switch < total:
        report = inject(model, lowrank_of(config))
        phases.append(phase("low_rank", switch, total, report.trainable, report.frozen))
    return Timetable(
        method=config.method,
        phases=phases,
        restarts=list(schedule.restarts),
        most_restarts=most_restarts(config),
        adaptive_switch=adaptive.warm_start is not None,
        adaptive_restarts=adaptive.cycle is not None,
        total_steps=total,
        total_tokens=total * config.batch_tokens,
        batch_tokens=config.batch_tokens,
        epochs=total * config.batch.sequences / batches.epoch_sequences,
        notes=notes,
    )
