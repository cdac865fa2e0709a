"""The training loop. Pretraining, LoRA, ReLoRA and fine-tuning are assemblies over it.

    until the last step: cross a boundary if one is due, step, measure, report, save

All that time decides is asked of the `Schedule`; all that is drawn is keyed by the step. So the loop holds no counters
of its own, and a run continued from any checkpoint takes the same steps, bit for bit.
"""

import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import nn

from relora.device import peak_memory_bytes
from relora.errors import Interrupted
from relora.lowrank import LowRankConfig, exact_tensors, inject, load_exact_tensors, restart
from relora.lowrank.restart import Reset
from relora.measure import Evaluation
from relora.report.reporter import Reporter
from relora.train.checkpoint import Checkpoint, Checkpoints
from relora.train.optim import (
    OptimizerConfig,
    build_optimizer,
    carry_state,
    load_named_state,
    named_state,
    set_lr,
)
from relora.train.schedule import Schedule
from relora.train.signals import StopSignals
from relora.train.state import TrainState
from relora.train.step import Batch, Loss, StepOutcome, train_step


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a recipe hands to the loop."""

    model: nn.Module
    schedule: Schedule
    batch_at: Callable[[int], Batch]
    """Step -> batch: a pure function."""
    loss: Loss
    evaluate: Callable[[nn.Module], Evaluation]
    """Held-out loss; leaves weights, modes and random streams as they are."""
    optimizer: OptimizerConfig
    lowrank: LowRankConfig
    restart_reset: Reset
    restart_keep_ratio: float
    reporter: Reporter
    checkpoints: Checkpoints
    numeric_environment: dict[str, str | int]
    """Saved with every checkpoint: what changes the last bits though the configuration is the same."""
    autocast: torch.dtype | None
    """Dtype of the products, where it is not the weights'."""
    seed: int
    micro_sequences: int
    clip_grad_norm: float
    log_every_steps: int
    evaluate_every_steps: int
    checkpoint_every_steps: int


@dataclass
class Progress:
    """Where the loop stands: all that changes while it runs, beside the weights."""

    optimizer: torch.optim.Optimizer
    state: TrainState = field(default_factory=TrainState)
    unlogged_tokens: int = 0
    unlogged_seconds: float = 0.0
    evaluated: tuple[int, float] = (-1, 0.0)
    """Step and loss of the last held-out measurement."""


def begin(run: Run, checkpoint: Checkpoint | None) -> Progress:
    """The progress at a checkpoint, model, optimizer and metric files brought back to it; without one, at step 0."""
    step = checkpoint.step if checkpoint else 0
    if run.schedule.phase(step) == "low_rank" and not run.schedule.switch_due(step):
        inject(run.model, run.lowrank, seed=run.seed)
    if checkpoint is None:
        run.reporter.rewind({"metrics.jsonl": 0, "restarts.jsonl": 0})
        return Progress(build_optimizer(run.model, run.optimizer))
    load_exact_tensors(run.model, checkpoint.tensors("weights"))
    optimizer = build_optimizer(run.model, run.optimizer)
    load_named_state(run.model, optimizer, checkpoint.tensors("optimizer"))
    run.reporter.rewind(checkpoint.state["positions"])
    return Progress(optimizer, TrainState(step, checkpoint.state["tokens"]))


def train(run: Run, progress: Progress) -> TrainState:
    """Train to the last step of the schedule.

    Raises:
        Interrupted: after a stop signal, with a checkpoint written; RunStopped: numbers or the disk went wrong.
    """
    schedule = run.schedule
    run.model.train()
    with StopSignals() as stop:
        if progress.state.step == 0:
            _evaluate(run, progress)
        while (step := progress.state.step) < schedule.total_steps:
            if schedule.switch_due(step):
                _switch(run, progress)
            if schedule.restart_due(step):
                _restart(run, progress)
            outcome = _take_step(run, progress)
            step += 1
            _report(run, progress, outcome)
            if _evaluation_due(run, step):
                _evaluate(run, progress)
            if stop.requested or _save_due(run, step):
                _save(run, progress)
            if stop.requested and step < schedule.total_steps:
                name = signal.Signals(stop.requested).name
                message = f"{name}: stopped after step {step}, checkpoint written; the same command continues"
                raise Interrupted(message, stop.requested)
    return progress.state


def _take_step(run: Run, progress: Progress) -> StepOutcome:
    step, started = progress.state.step, time.perf_counter()
    set_lr(progress.optimizer, run.schedule.lr_factor(step))
    outcome = train_step(
        run.model,
        progress.optimizer,
        run.batch_at(step),
        run.loss,
        seed=run.seed,
        step=step,
        micro_sequences=run.micro_sequences,
        clip_grad_norm=run.clip_grad_norm,
        autocast=run.autocast,
        # at once for all but lora_A, whose gradient comes to life when lora_B has moved, two steps into a cycle
        check_gradients=step - run.schedule.cycle_start(step) in (0, 2),
    )
    progress.state = progress.state.after(outcome.tokens)
    progress.unlogged_seconds += time.perf_counter() - started
    progress.unlogged_tokens += outcome.tokens
    return outcome


def _switch(run: Run, progress: Progress) -> None:
    """From full rank to low rank: inject, freeze, and carry over the moments of all that still trains at full rank."""
    report = inject(run.model, run.lowrank, seed=run.seed)
    full_rank_optimizer = progress.optimizer
    progress.optimizer = build_optimizer(run.model, run.optimizer)
    carry_state(full_rank_optimizer, progress.optimizer)
    run.reporter.message(f"step {progress.state.step}  low-rank phase begins: {report}")


def _restart(run: Run, progress: Progress) -> None:
    """The ReLoRA event, with the held-out loss on both sides of it: the function must not have moved."""
    step = progress.state.step
    if progress.evaluated[0] != step:  # resumed just here
        progress.evaluated = (step, run.evaluate(run.model).loss)
    report = restart(
        run.model,
        progress.optimizer,
        cycle=run.schedule.cycle(step),
        reset=run.restart_reset,
        keep_ratio=run.restart_keep_ratio,
    )
    losses = {"loss_before": progress.evaluated[1], "loss_after": run.evaluate(run.model).loss}
    run.reporter.restart({"step": step, "tokens": progress.state.tokens, **losses, **asdict(report)})


def _report(run: Run, progress: Progress, outcome: StepOutcome) -> None:
    """A line of metrics every so often, at the end, and for the first step of every cycle; the live line always."""
    state, schedule, taken = progress.state, run.schedule, progress.state.step - 1
    run.reporter.progress(state.step)
    first_of_cycle = taken == schedule.cycle_start(taken)
    if state.step % run.log_every_steps and state.step < schedule.total_steps and not first_of_cycle:
        return
    factor = schedule.lr_factor(taken)
    record = {"kind": "train", **_position(run, state, taken), "loss": outcome.loss, "lr": run.optimizer.lr * factor}
    if schedule.phase(taken) == "low_rank":
        record["lowrank_lr"] = run.optimizer.lowrank_lr * factor
    record["grad_norm"] = outcome.grad_norm
    record["tokens_per_second"] = progress.unlogged_tokens / progress.unlogged_seconds
    record["step_seconds"] = progress.unlogged_seconds * outcome.tokens / progress.unlogged_tokens
    record["peak_memory_bytes"] = peak_memory_bytes(next(run.model.parameters()).device)
    run.reporter.train(record)
    progress.unlogged_seconds, progress.unlogged_tokens = 0.0, 0


def _evaluate(run: Run, progress: Progress) -> None:
    started, state = time.perf_counter(), progress.state
    result = run.evaluate(run.model)
    progress.evaluated = (state.step, result.loss)
    run.reporter.evaluation(
        {
            "kind": "evaluation",
            **_position(run, state, max(state.step - 1, 0)),
            "validation_loss": result.loss,
            "perplexity": result.perplexity,
            "bits_per_byte": result.bits_per_byte,
            "validation_tokens": result.tokens,
            "seconds": time.perf_counter() - started,
        }
    )


def _save(run: Run, progress: Progress) -> None:
    run.checkpoints.save(
        {**asdict(progress.state), "positions": run.reporter.positions()},
        weights=exact_tensors(run.model),
        optimizer=named_state(run.model, progress.optimizer),
        settings=run.numeric_environment,
    )


def _evaluation_due(run: Run, step: int) -> bool:
    """Every so often, at the end, and before every boundary."""
    boundary = run.schedule.switch_due(step) or run.schedule.restart_due(step)
    return boundary or step == run.schedule.total_steps or step % run.evaluate_every_steps == 0


def _save_due(run: Run, step: int) -> bool:
    return step == run.schedule.total_steps or step % run.checkpoint_every_steps == 0


def _position(run: Run, state: TrainState, taken: int) -> dict[str, str | int]:
    """Where a record belongs; phase and cycle are those of the step `taken` last."""
    phase, cycle = run.schedule.phase(taken), run.schedule.cycle(taken)
    return {"step": state.step, "tokens": state.tokens, "phase": phase, "cycle": cycle}
