"""The training loop. Pretraining, LoRA, ReLoRA and fine-tuning all run through it.

    until the last step: save and evaluate if due, switch or restart if due, take a step, report it

Learning rates, the switch and restarts are functions of the step (`Schedule`), and every random draw is keyed by the
step. So the loop keeps no counters of its own, and a run continued from any checkpoint takes the same steps, bit for
bit. The checkpoint of step t is written before anything else that is due at t, the run's own decisions included, so a
continued run does all of that again.

On CUDA the host runs ahead of the device and synchronises only before logging, saving and evaluating. A signal that
arrives in between waits for one more step.

With several processes all of them run this loop. Each computes the same numbers from the same sums (`distributed`), so
each comes to the same decisions; rank 0 writes, and what a signal asks of one is agreed between two steps.
"""

import math
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import NoReturn

from relora.errors import Interrupted, NonFinite
from relora.lowrank import inject, restart
from relora.lowrank.allocation import with_ranks
from relora.lowrank.residual import residual_steps
from relora.lowrank.restart import set_initial_directions_
from relora.train.adaptive import decide
from relora.train.agreement import agree_on_all, figures_of_ranks
from relora.train.optim import build_optimizer, carry_state, set_lr
from relora.train.recovery import recover, resolve_pending
from relora.train.run import Progress, Run, held_out_figures, next_loss, save, save_due
from relora.train.signals import Signals
from relora.train.step import StepOutcome, train_step


def train(run: Run, progress: Progress) -> Progress:
    """Train to the last step of the schedule, or to the step `run.until`, and return the progress at that step.

    Raises:
        Interrupted: a signal asked to stop; a checkpoint was written.
        RunStopped: numbers stopped being finite, a tensor does not train, or the disk failed.
    """
    with Signals(run.group) as signals:
        while True:
            try:
                if _save_and_evaluate(run, progress, signals):
                    break
                _advance(run, progress, signals)
            except NonFinite as failure:
                progress = recover(run, progress, failure)
        run.checkpoints.wait()
        signals.agree()
        if signals.stop:
            _stop(run, progress, signals.stop)
    return progress


def _save_and_evaluate(run: Run, progress: Progress, signals: Signals) -> bool:
    """Do what is due before the next step: save, decide, evaluate. Returns whether the last step is done."""
    step = progress.state.step

    def stop_if_asked() -> None:
        signals.agree()
        if signals.stop:
            _stop(run, progress, signals.stop)

    run.checkpoints.check()
    if progress.pending:  # nothing is due before the host has read the figures of all steps
        return False
    stop_if_asked()
    asked = signals.take_save()
    if asked or save_due(run, step) or step == run.end:
        save(run, progress)
    if asked:
        run.reporter.message(f"step {step}  checkpoint, as SIGUSR1 asked")
    stop_if_asked()
    decide(run, progress)
    if _evaluation_due(run, progress, step):
        _evaluate(run, progress, stop_if_asked)
    return step >= run.end


def _advance(run: Run, progress: Progress, signals: Signals) -> None:
    """Switch or restart if it is due, take one step, report it."""
    if progress.schedule.switch_due(progress.state.step):
        _switch(run, progress)
    if progress.schedule.restart_due(progress.state.step):
        _restart(run, progress)
    sync = signals.asked or _sync_due(run, progress, progress.state.step + 1)
    _report(run, progress, _take_step(run, progress, sync))


def _take_step(run: Run, progress: Progress, sync: bool) -> StepOutcome:
    """Take one optimizer step and move the state past it; `sync`: wait for the device and check its figures."""
    started, waited = time.perf_counter(), run.reduction.waited_seconds
    if sync:
        resolve_pending(progress)
    before, step = progress.state, progress.state.step
    set_lr(progress.optimizer, progress.schedule, step)
    reading = time.perf_counter()
    batch = run.batch_at(before.batch)
    progress.unlogged_data_seconds += time.perf_counter() - reading
    with residual_steps(run.model, progress.optimizer, run.lowrank.residual, step):
        outcome = train_step(
            run.model,
            progress.optimizer,
            batch,
            run.loss,
            seed=run.seed,
            step=step,
            micro_sequences=run.micro_sequences,
            clip_grad_norm=run.clip_grad_norm,
            autocast=run.autocast,
            check_gradients=_check_due(progress, step),
            sync=sync,
            reduction=run.reduction,
        )
    if sync and _check_due(progress, step):
        _say_without_gradient(run, progress, outcome.without_gradient)
    if outcome.nonfinite_flag is not None:
        progress.pending.append((before, outcome.nonfinite_flag))
    progress.state = before.after(outcome.tokens, outcome.loss if run.adaptive.watches_loss else None)
    progress.unlogged_seconds += time.perf_counter() - started
    progress.unlogged_waited_seconds += run.reduction.waited_seconds - waited
    progress.unlogged_tokens += outcome.tokens
    return outcome


def _switch(run: Run, progress: Progress) -> None:
    """Switch from full rank to low rank: inject factors, freeze, keep the moments of what stays trainable."""
    report = inject(run.model, with_ranks(run.lowrank, progress.state.decisions.ranks), seed=run.seed)
    set_initial_directions_(run.model, run.restart, lambda model: next_loss(run, progress, model))
    said = run.initialize(run.model) if run.initialize is not None else None
    full_rank_optimizer = progress.optimizer
    progress.optimizer = build_optimizer(run.model, run.optimizer)
    carry_state(full_rank_optimizer, progress.optimizer)
    agree_on_all(run, progress, "after the switch")
    run.reporter.message(f"step {progress.state.step}  low-rank phase begins: {report}")
    for line in (*report.notes, *([said] if said else [])):
        run.reporter.message(f"low-rank phase: {line}")


def _restart(run: Run, progress: Progress) -> None:
    """Restart the factors; record the held-out loss before and after where it is measured: it must not change."""
    step = progress.state.step
    losses: dict[str, float | None] = {"loss_before": None, "loss_after": None}
    measured = _restart_measured(run, progress, step)
    report = restart(
        run.model,
        progress.optimizer,
        run.restart,
        cycle=progress.schedule.cycle(step),
        loss_of=lambda model: next_loss(run, progress, model),
    )
    agree_on_all(run, progress, "after the restart")
    if measured:
        # A signal does not interrupt this evaluation: between a restart and the next step no checkpoint can be written.
        before = math.nan if progress.evaluation is None else progress.evaluation.loss
        losses = {"loss_before": before, "loss_after": run.evaluate(run.model, lambda: None).loss}
    record = {"step": step, "tokens": progress.state.tokens, **losses, **asdict(report)}
    if not measured:  # spectra of many restarts would grow larger than the weights
        record["layers"] = [
            {k: v for k, v in asdict(layer).items() if k != "singular_values"} for layer in report.layers
        ]
    run.reporter.restart(record)


def _report(run: Run, progress: Progress, outcome: StepOutcome) -> None:
    """Update the progress line; write a metric record if one is due."""
    state, schedule, taken = progress.state, progress.schedule, progress.state.step - 1
    run.reporter.progress(state.step)
    if not _log_due(run, progress, state.step):
        return
    lr = run.optimizer.lr * schedule.rest_lr_factor(taken)
    record = {"kind": "train", **progress.position(taken), "loss": outcome.loss, "lr": lr}
    if schedule.phase(taken) == "low_rank":
        record["lowrank_lr"] = run.optimizer.lowrank_lr * schedule.lr_factor(taken, turn=0)
    record["grad_norm"] = outcome.grad_norm
    record["tokens_per_second"] = progress.unlogged_tokens / progress.unlogged_seconds
    record["step_seconds"] = progress.unlogged_seconds * outcome.tokens / progress.unlogged_tokens
    record |= figures_of_ranks(run, progress, progress.unlogged_tokens / outcome.tokens)
    run.reporter.train(record)
    progress.unlogged_seconds, progress.unlogged_tokens = 0.0, 0
    progress.unlogged_data_seconds = progress.unlogged_waited_seconds = 0.0


def _evaluate(run: Run, progress: Progress, stop_if_asked: Callable[[], None]) -> None:
    """Measure the held-out loss and write its record; a stop signal ends the measurement."""
    started, state = time.perf_counter(), progress.state
    result = run.evaluate(run.model, stop_if_asked)
    stop_if_asked()  # before the record is written: the checkpoint of this step must not contain it
    progress.evaluation = result
    run.reporter.evaluation(
        {
            "kind": "evaluation",
            **progress.position(max(state.step - 1, 0)),
            **held_out_figures(result, time.perf_counter() - started),
        }
    )


def _stop(run: Run, progress: Progress, signal_number: int) -> NoReturn:
    """Write a checkpoint and raise `Interrupted`."""
    save(run, progress)
    run.checkpoints.wait()
    run.group.meet("the checkpoint before the end")  # a rank that ends takes the others with it
    name, step = signal.Signals(signal_number).name, progress.state.step
    message = f"{name}: stopped after step {step}, checkpoint written; the same command continues"
    raise Interrupted(message, signal_number)


def _sync_due(run: Run, progress: Progress, step: int) -> bool:
    """Whether the host must synchronise after the update that leads to `step`, for anything due there."""
    due = _log_due(run, progress, step) or _check_due(progress, step - 1) or save_due(run, step)
    due = due or _evaluation_due(run, progress, step)
    return due or step % run.sync_every_steps == 0


def _log_due(run: Run, progress: Progress, step: int) -> bool:
    """Whether to log: every so many steps, at the end, and after the first step of every cycle."""
    first_of_cycle = step - 1 == progress.schedule.cycle_start(step - 1)
    return first_of_cycle or step == run.schedule.total_steps or step % run.log_every_steps == 0


def _check_due(progress: Progress, step: int) -> bool:
    """Whether to look for tensors without a gradient: at a cycle's first step, and at its third.

    A tensor may have a zero gradient while its partner is zero, as lora_A has beside lora_B. The partner first moves in
    the step whose learning rate is not zero, the second one at the latest.
    """
    return step - progress.schedule.cycle_start(step) in (0, 2)


def _say_without_gradient(run: Run, progress: Progress, names: frozenset[str]) -> None:
    """Warn of tensors that had a gradient neither in the first nor in the third step of a cycle; of each once."""
    step = progress.state.step
    if step == progress.schedule.cycle_start(step):
        progress.without_gradient = names
        return
    still = sorted((progress.without_gradient & names) - progress.said_without_gradient)
    progress.said_without_gradient |= frozenset(still)
    if still:
        more = f" and {len(still) - 1} more tensors have" if len(still) > 1 else " has"
        run.reporter.warning(
            f"step {step}: {still[0]}{more} had no gradient so far; what gets none stays as it is, the rest trains"
        )


def _evaluation_due(run: Run, progress: Progress, step: int) -> bool:
    """Whether to evaluate: every so many steps, at the start and the end, before the switch and measured restarts."""
    boundary = progress.schedule.switch_due(step) or _restart_measured(run, progress, step)
    return boundary or step == run.end or step % run.evaluate_every_steps == 0


def _restart_measured(run: Run, progress: Progress, step: int) -> bool:
    """Whether a restart is due at a step and the held-out loss is measured on both sides of it."""
    schedule = progress.schedule
    return schedule.restart_due(step) and (schedule.cycle(step) - 1) % run.measured_restarts == 0
