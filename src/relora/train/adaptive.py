"""Adaptive decisions: a run ends its warm start, ends a cycle and chooses ranks by criteria that it measures itself.

    the warm start ends   the loss is flat, and the r largest directions hold the share `energy` of the update or more
    a cycle ends          the effective rank of the update is `rank_share` of r or more, or the loss is flat
    rank of a layer       chosen at the switch from the spectra of the updates, see `lowrank.allocation`

The loss is flat if the mean training loss of a window is less than the share `slope` below that of the previous window.
The update in the warm start is Adam's, m̂ / (√v̂ + ε), i.e. the next step in units of the learning rate, which the
low-rank phase has to be able to represent. The energy of a direction is its squared singular value, and shares are
averaged over the target modules. In a cycle the update is s·B A, with the effective rank of Roy & Vetterli 2007, and
windows are compared within the cycle. PreLoRA (arXiv 2509.21619) ends a warm start by the change of the weights' norms;
the criteria here need no older weights.

Decisions depend only on checkpointed state. They are taken after the checkpoint of their step is written and before
anything else at that step, and are saved with the next checkpoint, so a run that is killed at any moment and continued
decides the same. The price: the host synchronises at every step to read the loss. Where the loss of the warm start is
flat, and where ranks are chosen, every target module costs an eigendecomposition of order min(out, in)³.
"""

from dataclasses import replace
from statistics import fmean

import torch
from torch import Tensor, nn

from relora.errors import NonFinite
from relora.lowrank import low_rank_layers
from relora.lowrank.allocation import allocate
from relora.lowrank.moments import adam_direction
from relora.lowrank.restart import effective_rank, update_spectrum
from relora.lowrank.targets import find_targets
from relora.train.run import CycleEnd, Progress, Run, WarmStartEnd
from relora.train.state import LossWindow


def decide(run: Run, progress: Progress) -> None:
    """Take the decisions that are due just before the next step; do nothing if none is due or all are taken.

    Raises:
        NonFinite: a factor or a moment is not finite.
    """
    rules, step = run.adaptive, progress.state.step
    try:
        if rules.warm_start and progress.state.decisions.switch_step is None:
            _decide_switch(run, progress, rules.warm_start)
        if progress.schedule.switch_due(step):
            if rules.ranks == "spectrum" and not progress.state.decisions.ranks:
                _choose_ranks(run, progress)
            progress.state = replace(progress.state, window=LossWindow())
        if rules.cycle:
            _decide_restart(run, progress, rules.cycle)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        raise NonFinite(f"after step {step}: an update is not finite, so it has no spectrum to decide by") from None


def normalised_update(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor:
    """Return Adam's m̂ / (√v̂ + ε) of one parameter from its present moments; zero before its first step."""
    state = optimizer.state.get(parameter)
    if not state:
        return torch.zeros_like(parameter)
    return adam_direction(state, optimizer.defaults["betas"], optimizer.defaults["eps"])


def energies(matrix: Tensor) -> Tensor:
    """Return the squared singular values of a matrix [m, n], descending: [min(m, n)].

    They are the eigenvalues of the smaller of its two Gram matrices.
    """
    rows = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    values: Tensor = torch.linalg.eigvalsh(rows @ rows.T)
    return values.flip(0).clamp_min(0)


def captured_share(spectrum: Tensor, r: int) -> float:
    """Return the share of the energy that the r largest directions hold; 0 where the energy is 0."""
    return (spectrum[:r].sum() / spectrum.sum().clamp_min(torch.finfo(spectrum.dtype).tiny)).item()


def _decide_switch(run: Run, progress: Progress, rule: WarmStartEnd) -> None:
    """End the warm start at this step if its bound is reached or the criteria are met at the end of a window."""
    state, schedule, r = progress.state, progress.schedule, run.lowrank.r
    why = "at its bound, warm_start.steps"
    if state.step < schedule.warm_start_steps:
        if state.step % rule.window_steps or not state.window.steps:
            return
        if (
            state.step - rule.window_steps < schedule.warmup_steps
        ):  # a flat loss says nothing while the rate still rises
            progress.state = replace(state, window=LossWindow())
            return
        energy = None
        if state.window.is_flat(rule.slope):
            energy = fmean(captured_share(spectrum, r) for spectrum in _spectra(run, progress).values())
        due = energy is not None and energy >= rule.energy
        _record(run, progress, "warm_start", decided=due, energy=energy)
        progress.state = replace(state, window=state.window.closed())
        if not due:
            return
        why = f"the loss fell by {state.window.fall:.2%}, and {r} directions hold {energy:.0%} of the update"
    progress.settle(run.schedule, replace(state.decisions, switch_step=state.step))
    run.reporter.message(f"step {state.step}  the warm start ends: {why}")


def _choose_ranks(run: Run, progress: Progress) -> None:
    """Allocate the ranks of the target modules by the spectra of their updates, and record them."""
    state = progress.state
    spectra = {name: spectrum.tolist() for name, spectrum in _spectra(run, progress).items()}
    shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in _targets(run).items()}
    ranks = allocate(spectra, shapes, run.lowrank.r)
    place = progress.position(max(state.step - 1, 0))
    run.reporter.decision({"kind": "decision", **place, "of": "ranks", "ranks": ranks})
    progress.settle(run.schedule, replace(state.decisions, ranks=ranks))
    spread = f"{min(ranks.values())} to {max(ranks.values())}, {fmean(ranks.values()):.1f} on average"
    run.reporter.message(f"step {state.step}  ranks by layer: {spread}")


def _decide_restart(run: Run, progress: Progress, rule: CycleEnd) -> None:
    """End the cycle at this step if one of the two criteria is met, `restart_every_steps` after the last check."""
    state, schedule = progress.state, progress.schedule
    every, since = schedule.restart_every_steps, state.step - schedule.cycle_start(state.step)
    if every is None or schedule.phase(state.step) != "low_rank" or state.step > schedule.last_restart:
        return
    if since == 0 or since % every or not state.window.steps:
        return
    layers = low_rank_layers(run.model).values()
    share = fmean(effective_rank(update_spectrum(layer).cpu()) / layer.r for layer in layers)
    rank_reached = rule.rank_share is not None and share >= rule.rank_share
    due = rank_reached or state.window.is_flat(rule.slope)
    _record(run, progress, "restart", decided=due, rank_share=share)
    if not due:
        progress.state = replace(state, window=state.window.closed())
        return
    restarts = (*(state.decisions.restart_steps or ()), state.step)
    progress.settle(run.schedule, replace(state.decisions, restart_steps=restarts))
    if rank_reached:
        why = f"the update has an effective rank of {share:.0%} of r"
    else:
        why = f"the loss fell by {state.window.fall:.2%}"
    run.reporter.message(f"step {state.step}  the cycle ends after {since} steps: {why}")


def _targets(run: Run) -> dict[str, nn.Parameter]:
    """Return the weights that the switch will freeze, by the path of their layer."""
    return {name: run.model.get_parameter(f"{name}.weight") for name in find_targets(run.model, run.lowrank)}


def _spectra(run: Run, progress: Progress) -> dict[str, Tensor]:
    """Return the energies of the target modules' updates, by path."""
    return {name: energies(normalised_update(progress.optimizer, weight)) for name, weight in _targets(run).items()}


def _record(run: Run, progress: Progress, of: str, *, decided: bool, **measured: float | None) -> None:
    """Write a decision record: the window that ends here, the measured criteria, and whether the decision was taken."""
    window, place = progress.state.window, progress.position(progress.state.step - 1)
    losses = {"window_loss": window.mean, "loss_fall": window.fall}
    run.reporter.decision({"kind": "decision", **place, "of": of, **losses, **measured, "decided": decided})
