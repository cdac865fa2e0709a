"""One run: from what a recipe made ready, over the folder and an earlier part of the run, to what the recipe does last.

Pretraining and fine-tuning differ in their `Job` and in what they leave; the way there is this one.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from relora.config import TrainingConfig
from relora.device import deterministic
from relora.lowrank import LowRankConfig
from relora.lowrank.calibrate import from_json, to_json
from relora.lowrank.costs import Rates
from relora.measure import Evaluation, token_loss
from relora.model.blocks import training_blocks
from relora.model.head import whole_logits_reason
from relora.recipes.from_settings import adaptive_of, autocast_of, optimizer_of, restart_of
from relora.recipes.resume import changes_since, check_settings, newest
from relora.report.console import Console
from relora.report.reporter import Reporter
from relora.report.trackers import open_trackers
from relora.runs.folder import check_space, claim, describe_run
from relora.train.checkpoint import Checkpoints
from relora.train.loop import train
from relora.train.memory import HeldBytes, held_bytes
from relora.train.projected_optimizers import BASELINES, projected_matrices
from relora.train.run import Run, begin
from relora.train.schedule import Schedule
from relora.train.state import numeric_environment
from relora.train.step import Batch, Loss

LOOK_EVERY_STEPS = 16
"""On a GPU, whose fused AdamW can hold back an update by itself, the host may run so many steps ahead."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained, on what, how long: opened, and checked against each other; nothing is written yet."""

    config: TrainingConfig
    device: torch.device
    model: PreTrainedModel
    write_tokenizer: Callable[[Path], None]
    """Into a folder, in one step, if it is not there yet."""
    schedule_of: Callable[[Any], Schedule]
    """(this configuration, or the one with which the run began) -> its timetable."""
    lowrank_of: Callable[[Rates | None], LowRankConfig]
    """(the rates by which a run chose that is now continued) -> what the switch to low rank injects."""
    batch_at: Callable[[int], Batch]
    place_of: Callable[[int, range], str]
    loss: Loss
    evaluate: Callable[[nn.Module, Callable[[], None]], Evaluation]
    content: dict[str, str]
    """Fingerprints of what the configuration only points at."""
    needed_bytes: int
    """Of the disk, for checkpoints and result."""
    saves_frozen: bool = True
    """False where the frozen weights are those of `model` from beginning to end."""
    initialize: Callable[[nn.Module], None] | None = None
    """Called when the factors have been put in, before the first step that trains them."""
    notes: tuple[str, ...] = ()
    """Lines for the person at the terminal: what was found in the data."""


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves."""

    folder: Path
    steps: int
    tokens: int
    trainable_parameters: int
    """At the end."""
    memory: HeldBytes
    """Likewise, of weights, factors, gradients and moments."""
    evaluation: Evaluation


Finish = Callable[[Run, Path], Evaluation]
"""(the trained run, its folder) -> held-out loss of what is left there."""


def run_job(job: Job, finish: Finish, *, fresh: bool, strict: bool, quiet: bool) -> RunResult:
    """Train a job to its end, continuing what its run folder holds.

    Args:
        fresh: move what is in the run folder aside and start over.
        strict: refuse to continue from an older checkpoint than the newest, or where the last bits would differ.

    Raises:
        UserError: a setting, a folder or a combination that cannot be used, found before anything is written.
        RunStopped, Interrupted: see `relora.errors`; the same call continues from the last checkpoint.
    """
    config, model = job.config, job.model
    if config.optimizer.name in BASELINES:
        projected_matrices(model, config.optimizer.projection.rank)
    checkpointing = config.memory.activation_checkpointing
    blocks = training_blocks(model, checkpointing=checkpointing, compiled=config.compile)
    check_space(Path(config.output_dir), job.needed_bytes, continuing=not fresh)
    settings = numeric_environment(job.device, config.precision.dtype) | job.content
    settings["compile"] = "inductor" if config.compile else "none"
    if job.device.type == "cuda":
        settings["sums"] = "in one order" if config.deterministic else "in any order"
    with claim(config, fresh) as folder, _checkpoints(config, folder) as checkpoints:
        warnings = changes_since(folder, config, job.schedule_of)
        checkpoint, broken = newest(checkpoints, strict=strict)
        warnings += broken
        kept = from_json(str(checkpoint.manifest.settings.get("rates"))) if checkpoint else None
        lowrank = job.lowrank_of(kept)
        settings["frozen"] = lowrank.frozen
        if checkpoint:
            warnings += check_settings(checkpoint.manifest.settings, settings, strict=strict)
        if lowrank.rates:
            settings["rates"] = to_json(lowrank.rates)
        describe_run(folder, config, sum(parameter.numel() for parameter in model.parameters()))
        job.write_tokenizer(folder / "tokenizer")  # an export needs no data
        total_steps, step = job.schedule_of(config).total_steps, checkpoint.step if checkpoint else 0
        trackers = open_trackers(config.log.trackers, folder, config.model_dump(mode="json"), step)
        with Reporter(folder, total_steps, trackers, Console(quiet=quiet)) as reporter:
            if checkpoint:
                reporter.message(f"continuing after step {step} of {total_steps}")
            for line in job.notes:
                reporter.message(line)
            for line in warnings:
                reporter.warning(line)
            if job.loss is token_loss and (reason := whole_logits_reason(model)):
                reporter.warning(f"the logits of a whole micro-batch are kept in memory: {reason}")
            if lowrank.frozen == "int8":
                reporter.message("low-rank phase: products with frozen weights in int8 (precision.frozen)")
            run = assemble(job, lowrank, reporter, checkpoints, settings)
            with deterministic(job.device) if config.deterministic else nullcontext(), blocks:
                end = train(run, begin(run, checkpoint))
            state, memory = end.state, held_bytes(model, end.optimizer, lowrank.residual)
            del end  # its moments are done with, and what is left to do takes memory, too
            trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
            evaluation = finish(run, folder)
    return RunResult(folder, state.step, state.tokens, trainable, memory, evaluation)


def assemble(
    job: Job, lowrank: LowRankConfig, reporter: Reporter, checkpoints: Checkpoints, settings: dict[str, str | int]
) -> Run:
    """The run that the loop takes."""
    config, optimizer, restart = job.config, job.config.optimizer, restart_of(job.config)
    adaptive = adaptive_of(config)
    runs_ahead = job.device.type == "cuda" and optimizer.name == "adamw" and not adaptive.watches_loss
    return Run(
        model=job.model,
        schedule=job.schedule_of(config),
        adaptive=adaptive,
        batch_at=job.batch_at,
        place_of=job.place_of,
        loss=job.loss,
        evaluate=job.evaluate,
        optimizer=optimizer_of(config, job.model, lowrank),
        lowrank=lowrank,
        initialize=job.initialize,
        saves_frozen=job.saves_frozen,
        restart=restart,
        reporter=reporter,
        checkpoints=checkpoints,
        settings=settings,
        autocast=autocast_of(config),
        seed=config.seed,
        micro_sequences=config.batch.micro_sequences,
        clip_grad_norm=optimizer.clip_grad_norm,
        non_finite=config.non_finite.policy,
        non_finite_limit=config.non_finite.limit,
        look_every_steps=LOOK_EVERY_STEPS if runs_ahead else 1,
        log_every_steps=config.log.every_steps,
        evaluate_every_steps=config.evaluate.every_steps,
        checkpoint_every_steps=config.checkpoint.every_steps,
    )


def _checkpoints(config: TrainingConfig, folder: Path) -> Checkpoints:
    settings = config.checkpoint
    return Checkpoints(folder / "checkpoints", settings.keep_last, background=settings.background)
