"""The one way from a job to its end: claim the run folder, restore, train, finish.

Pretraining and fine-tuning differ in the `Job` that they gather and in what they write at the end. What is looked up
and refused before anything is written stands in `resume`.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from relora.config import TrainingConfig
from relora.device import deterministic
from relora.distributed.group import ALONE, Group, current_group
from relora.errors import UserError
from relora.lowrank import LowRankConfig
from relora.lowrank.costs import Rates
from relora.lowrank.division import whole_shape
from relora.measure import Evaluation, token_loss
from relora.model.blocks import training_blocks
from relora.model.head import whole_logits_reason
from relora.recipes.from_settings import adaptive_of, autocast_of, lowrank_notes, optimizer_of, restart_of
from relora.recipes.ranks import check_shardable, join, opened_checkpoints, reduction_of, see_run_folder
from relora.recipes.resume import Start, find_start
from relora.report.console import Console
from relora.report.reporter import Reporter
from relora.report.silent import SilentReporter
from relora.report.trackers import open_trackers
from relora.runs.folder import check_space, claim, describe_run
from relora.train.agreement import agree_on_all
from relora.train.checkpoint import Checkpoints
from relora.train.loop import train
from relora.train.memory import HeldBytes, held_bytes
from relora.train.projected_optimizers import PROJECTED_OPTIMIZERS, projected_matrices
from relora.train.run import Run, Task, held_out_figures, restore
from relora.train.schedule import Schedule

SYNC_EVERY_STEPS = 16
"""Steps that the host may run ahead of a GPU: its fused AdamW can withhold a non-finite update by itself."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run that is ready to start: opened and checked, with nothing written yet."""

    config: TrainingConfig
    device: torch.device
    task: Task
    schedule_of: Callable[[Any], Schedule]
    """Schedule of this configuration, or of the one that the run folder's earlier part had."""
    lowrank_of: Callable[[Rates | None], LowRankConfig]
    """Settings of the switch to low rank, by the rates that a continued run was begun with, or by measured ones."""
    content: dict[str, str]
    """Fingerprints of the data and the model that the configuration only points at; how held-out tokens are chosen."""
    needed_bytes: int
    """Disk space for checkpoints and the result."""
    write_tokenizer: Callable[[Path], None]
    """Write the tokenizer into a folder at once, unless it is there."""
    notes: tuple[str, ...] = ()
    """Lines for the console: what was found in the data."""


@dataclass(frozen=True)
class RunResult:
    """Outcome of a finished run."""

    folder: Path
    steps: int
    tokens: int
    trainable_parameters: int
    """Trainable parameters at the end."""
    memory: HeldBytes
    """Bytes of weights, factors, gradients and moments at the end."""
    evaluation: Evaluation
    """Measured on the whole held-out part, as `relora evaluate` measures the result; of a run that stopped at the step
    that was asked for, measured as in training."""


Position = dict[str, str | int]
"""Step, tokens, phase and cycle of the end of a run, for the record of its result."""
Finish = Callable[[Run, Path, Position], Evaluation]
"""Write the result of a trained run into its folder, and return the held-out loss of what was written."""


def run_job(job: Job, finish: Finish, *, fresh: bool, strict: bool, quiet: bool, until: int | None = None) -> RunResult:
    """Train a job to its end, continuing what its run folder holds.

    Of several ranks all call this. Rank 0 writes the run folder, which all have to see.

    Args:
        until: stop after this step of the same schedule, with a checkpoint from which the run can go on; nothing is
            written then but checkpoint and metrics. A run that was continued ends in the same bits as one without stop.
        fresh: move what is in the run folder aside and start over.
        strict: refuse to continue from an older checkpoint than the newest, or where the last bits would differ.

    Raises:
        UserError: a setting, a folder or a combination that cannot be used, found before anything is written.
        RunStopped, Interrupted: see `relora.errors`; the same call continues from the last checkpoint.
    """
    config, model, group = job.config, job.task.model, current_group()
    join(config, job.device, job.content, group)
    with ExitStack() as held:
        with group.stage("the opening of the run folder"):
            if config.optimizer.name in PROJECTED_OPTIMIZERS:
                projected_matrices(model, config.optimizer.projection.rank)  # refuses a rank that does not fit
            check_shardable(config, model, group)
            memory = config.memory.activation_checkpointing
            blocks = training_blocks(model, checkpointing=memory, compiled=config.compile)
            check_space(Path(config.output_dir), job.needed_bytes, continuing=not fresh)
            _check_until(until, job, done=0)
            folder = held.enter_context(claim(config, fresh)) if group.is_first else Path(config.output_dir)
        checkpoints = held.enter_context(opened_checkpoints(config, folder, group))
        with group.stage("the beginning of the run"):
            start = find_start(
                folder,
                checkpoints,
                config,
                job.device,
                job.content,
                job.schedule_of,
                job.lowrank_of,
                strict=strict,
                group=group,
            )
            _check_until(until, job, done=start.step)
            if group.is_first:
                parameters = sum(parameter.numel() for parameter in model.parameters())
                describe_run(folder, config, parameters, lowrank_notes(config, model))
                job.write_tokenizer(folder / "tokenizer")  # with it an export needs no data
        see_run_folder(folder, group)
        reporter = held.enter_context(_open_reporter(job, folder, start, quiet, group))
        _announce(job, start, reporter)
        run = replace(assemble(job, start, reporter, checkpoints, group), until=until)
        with deterministic(job.device) if config.deterministic else nullcontext(), blocks:
            progress = restore(run, start.checkpoint)
            agree_on_all(run, progress, "before the first step")
            end = train(run, progress)
        state, measured = end.state, end.evaluation
        held_memory = held_bytes(model, end.optimizer, start.lowrank.residual)
        position = end.position(max(state.step - 1, 0))
        del end, progress  # frees the moments: what `finish` does takes memory, too
        trainable = sum(whole_shape(one).numel() for one in model.parameters() if one.requires_grad)
        if measured is None or state.step == run.schedule.total_steps:
            measured = finish(run, folder, position)
    return RunResult(folder, state.step, state.tokens, trainable, held_memory, measured)


def _check_until(until: int | None, job: Job, *, done: int) -> None:
    """Refuse to stop at a step that is not there, or that the run has passed."""
    total = job.schedule_of(job.config).total_steps
    if until is not None and not max(done, 1) <= until <= total:
        raise UserError(f"--until {until}: the run has {total} steps, of which {done} are done; give one in between")


def measure_result(run: Run, position: Position, measure: Callable[[], Evaluation]) -> Evaluation:
    """Measure the result of a run on the whole held-out part by `measure`, and report it."""
    started = time.perf_counter()
    evaluation = measure()
    figures = held_out_figures(evaluation, time.perf_counter() - started)
    run.reporter.final({"kind": "final", **position, **figures})
    return evaluation


def assemble(job: Job, start: Start, reporter: Reporter, checkpoints: Checkpoints, group: Group = ALONE) -> Run:
    """Build the run that the loop takes: the job's task, with every setting turned into what the loop uses."""
    config, adaptive = job.config, adaptive_of(job.config)
    runs_ahead = job.device.type == "cuda" and config.optimizer.name == "adamw" and not adaptive.watches_loss
    return Run(
        **vars(job.task),
        schedule=job.schedule_of(config),
        adaptive=adaptive,
        optimizer=optimizer_of(config, job.task.model, start.lowrank),
        lowrank=start.lowrank,
        restart=restart_of(config),
        reporter=reporter,
        checkpoints=checkpoints,
        settings=start.settings,
        autocast=autocast_of(config),
        seed=config.seed,
        micro_sequences=config.batch.micro_sequences,
        clip_grad_norm=config.optimizer.clip_grad_norm,
        non_finite=config.non_finite.policy,
        non_finite_limit=config.non_finite.limit,
        sync_every_steps=SYNC_EVERY_STEPS if runs_ahead else 1,
        log_every_steps=config.log.every_steps,
        evaluate_every_steps=config.evaluate.every_steps,
        measured_restarts=config.measured_restarts,
        checkpoint_every_steps=config.checkpoint.every_steps,
        group=group,
        reduction=reduction_of(config, job.task.model, job.device, group),
    )


def _open_reporter(job: Job, folder: Path, start: Start, quiet: bool, group: Group) -> Reporter:
    """Open the reporter of the run on rank 0; that of the others writes and shows nothing."""
    if not group.is_first:
        return SilentReporter()
    config = job.config
    trackers = open_trackers(config.log.trackers, folder, config.model_dump(mode="json"), start.step)
    return Reporter(folder, job.schedule_of(config).total_steps, trackers, Console(quiet=quiet))


def _announce(job: Job, start: Start, reporter: Reporter) -> None:
    """Say where the run starts, what was found in the data, and what the user should know before it trains."""
    if (world := current_group().world) > 1:
        order = "in a fixed order" if job.config.distributed.deterministic else "in buckets"
        reporter.message(f"{world} processes share the sequences of each step; gradients are added up {order}")
    if start.checkpoint:
        total_steps = job.schedule_of(job.config).total_steps
        reporter.message(f"continuing after step {start.step} of {total_steps}")
    for line in job.notes:
        reporter.message(line)
    for line in start.warnings:
        reporter.warning(line)
    if job.task.loss is token_loss and (reason := whole_logits_reason(job.task.model)):
        reporter.warning(f"the logits of a whole micro-batch are kept in memory: {reason}")
    if start.lowrank.frozen == "int8":
        reporter.message("low-rank phase: products with frozen weights in int8 (precision.frozen)")
