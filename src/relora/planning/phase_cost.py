"""Memory and time of one phase of a run (warm start, full rank or low rank).

    peak = process + tensors of a step + loss of the allocator + copy that a background checkpoint is written from

Tensors are counted in a step that is gone through without their memory (`step`). The process is measured (`probe`). The
loss of the allocator is a measured share of the blocks on its heap (benchmarks/plan.py). On a GPU, whose own memory is
what counts, a phase takes the tensors alone; the rest is in main memory. That was not compared with a GPU.
"""

import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from relora.config import FinetuneConfig, RunConfig
from relora.device import choose_device
from relora.errors import RunStopped, UserError
from relora.lowrank import inject
from relora.lowrank.calibrate import calibrated
from relora.measure import token_loss
from relora.messages import first_line
from relora.model.blocks import training_blocks
from relora.model.unused import leave_out_unused
from relora.planning.model_shape import shape_of
from relora.planning.moments import moments_of
from relora.planning.probe import Measured, process_bytes
from relora.planning.step import StepFigures, StepShape, simulate
from relora.recipes.from_settings import autocast_of, schedule_of, settled_lowrank
from relora.recipes.precision import settle_dtype
from relora.train.embeddings import rows_added_in_place
from relora.train.schedule import Phase

HEAP_LOSS = 0.35
"""Unused bytes on glibc's heap relative to those in use; 0.1 to 0.7 was measured, 1.7 where blocks are recomputed."""
NO_HEAP_BYTES = 2**20
"""Largest MALLOC_MMAP_THRESHOLD_ that avoids the loss: glibc then asks the system for every block of so many bytes."""


@dataclass(frozen=True)
class PhaseCost:
    """Memory in bytes and time of one phase; the fields are keys of `relora plan --json`."""

    name: Phase
    first_step: int
    steps: int
    figures: StepFigures
    allocator: int
    """Bytes that the allocator loses at the peak; 0 on a GPU."""
    process: int
    """Bytes of interpreter and libraries; 0 on a GPU, whose memory they do not take."""
    snapshot: int
    """Bytes of the copy from which a checkpoint is written while training goes on; 0 on a GPU."""
    measured: Measured | None = None
    """Peak and time of real steps; None unless the phase was probed."""

    @property
    def predicted_peak(self) -> int:
        """Predicted bytes of a step."""
        return self.figures.peak + self.allocator + self.process

    @property
    def peak(self) -> int:
        """Bytes of a step, measured if the phase was probed."""
        return self.measured.peak if self.measured else self.predicted_peak

    @property
    def checkpoint_peak(self) -> int:
        """Bytes of a step during which a checkpoint is written."""
        return self.peak + self.snapshot

    @property
    def step_seconds(self) -> float:
        """Seconds of a step, measured if the phase was probed."""
        return self.measured.step_seconds if self.measured else self.figures.seconds

    @property
    def seconds(self) -> float:
        """Seconds of all steps of the phase."""
        return self.step_seconds * self.steps


def phases_of(config: RunConfig) -> list[tuple[Phase, int, int]]:
    """Return (phase, first step, number of steps) of each phase of a run."""
    schedule = schedule_of(config)
    first, total = schedule.warm_start_steps, schedule.total_steps
    phases: list[tuple[Phase, int, int]] = []
    if first:
        phases.append((schedule.phase(0), 0, first))
    if first < total:
        phases.append(("low_rank", first, total - first))
    return phases


def phase_cost(
    config: RunConfig | FinetuneConfig, name: Phase, first_step: int, steps: int, process: int, device: torch.device
) -> PhaseCost:
    """Predict the cost of a phase.

    Args:
        process: bytes of interpreter and libraries (see `process_bytes`).
    """
    figures = step_figures(config, name, device)
    if device.type != "cpu":
        return PhaseCost(name, first_step, steps, figures, allocator=0, process=0, snapshot=0)
    snapshot = figures.snapshot if config.checkpoint.background else 0
    return PhaseCost(name, first_step, steps, figures, allocator_loss(figures), process, snapshot)


def allocator_loss(figures: StepFigures) -> int:
    """Return the bytes that glibc's allocator holds in addition to those in use."""
    threshold = os.environ.get("MALLOC_MMAP_THRESHOLD_", "")
    without_heap = threshold.isdecimal() and int(threshold) <= NO_HEAP_BYTES
    return 0 if without_heap else int(HEAP_LOSS * figures.heap)


def finetuning_peak(config: FinetuneConfig) -> int:
    """Predict the bytes that a fine-tuning run takes at its worst moment: a micro-batch of longest examples.

    Raises:
        UserError: a classifier, or learned prompts: their steps are not simulated.
    """
    if config.task == "classification" or config.method == "llama-adapter":
        kind = "a classifier" if config.task == "classification" else "learned prompts"
        raise UserError(f"the memory of {kind} cannot be planned; leave the limit out, or try one run")
    phase: Phase = "full" if config.method == "full" else "low_rank"
    return phase_cost(config, phase, 0, 1, process_bytes(), choose_device(config.device)).checkpoint_peak


def step_figures(config: RunConfig | FinetuneConfig, phase: Phase, device: torch.device) -> StepFigures:
    """Predict memory and time of a step of a phase, without allocating the model."""
    model = shape_of(config)
    if isinstance(config, RunConfig) or config.method == "full":
        leave_out_unused(model, config.data.sequence_length)
    config, _ = settle_dtype(config, device, lambda: model)
    rates = calibrated(device)
    lowrank = settled_lowrank(config, model, device, rates)
    autocast = autocast_of(config)

    def run_pass(model: nn.Module, ids: Tensor) -> None:
        blocks = training_blocks(model, checkpointing=config.memory.activation_checkpointing)
        with blocks, rows_added_in_place(model):
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                loss, tokens = token_loss(model, ids, ids)
            torch.autograd.backward(loss / tokens)

    shape = StepShape(
        micro_sequences=config.batch.micro_sequences,
        sequence_length=config.data.sequence_length,
        micro_batches=config.batch.sequences // config.batch.micro_sequences,
        device=device,
        rates=rates,
    )

    def prepare(model: nn.Module) -> None:
        if phase == "low_rank":
            inject(model, lowrank, seed=config.seed)

    moments = moments_of(config, model)
    try:
        return simulate(model, shape, run_pass, prepare=prepare, moments=moments, residual=lowrank.residual)
    except (UserError, RunStopped):
        raise
    except Exception as error:  # of any kind: the model's code may look at numbers, which are not there
        raise UserError(
            f"model: a step of a {model.config.model_type} model cannot be planned, since its code needs numbers, not "
            f"shapes alone ({first_line(str(error))}); try its settings in a run with a small `schedule.total_steps`"
        ) from None
