"""A run's parts, how its state is saved, and how it is restored.

`restore` is the inverse of `save`: it brings model, optimizer and metric files back to a checkpoint. Saved is only what
the step does not determine: weights, moments, and what the run has decided or met on its way.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from relora.distributed.agree import check_equal
from relora.distributed.group import ALONE, Group
from relora.distributed.pace import Pace
from relora.distributed.reduce import Reduction
from relora.errors import NonFinite, UserError
from relora.lowrank import LowRankConfig, exact_tensors, inject, load_exact_tensors, low_rank_layers, strip
from relora.lowrank.allocation import with_ranks
from relora.lowrank.restart import RestartConfig
from relora.measure import Evaluation
from relora.report.reporter import Reporter
from relora.seeding import keyed_seed
from relora.train.checkpoint import Checkpoints
from relora.train.checkpoint_format import Checkpoint, SavedState
from relora.train.optim import OptimizerConfig, build_optimizer, load_named_state, named_state
from relora.train.schedule import Schedule
from relora.train.sharded_checkpoint import parts_of, parts_of_state, wanted_parts
from relora.train.state import Decisions, LossWindow, TrainState
from relora.train.step import Batch, Loss

NonFinitePolicy = Literal["stop", "skip", "rewind"]


@dataclass(frozen=True, kw_only=True)
class WarmStartEnd:
    """Rule by which a run ends its warm start before the configured bound."""

    window_steps: int
    """Steps between two checks of the rule."""
    slope: float
    """The loss must fall by less than this share of itself from one window to the next."""
    energy: float
    """The r largest directions must hold at least this share of the update's energy."""


@dataclass(frozen=True, kw_only=True)
class CycleEnd:
    """Rule by which a run restarts; checked at the steps at which the schedule has restarts."""

    slope: float
    """The loss must fall by less than this share of itself from one check to the next."""
    rank_share: float | None
    """The update's effective rank must reach this share of r; None: the loss alone decides."""


@dataclass(frozen=True, kw_only=True)
class Adaptive:
    """Decisions that are left to the run itself (see `train.adaptive`); where a rule is None, the schedule decides."""

    warm_start: WarmStartEnd | None = None
    cycle: CycleEnd | None = None
    ranks: Literal["uniform", "spectrum"] = "uniform"

    @property
    def watches_loss(self) -> bool:
        """Whether a rule uses the loss of every step, so that the host must synchronise at every step."""
        return self.warm_start is not None or self.cycle is not None

    def at_start(self) -> TrainState:
        """State of a run at step 0, with nothing decided."""
        return TrainState(decisions=Decisions(restart_steps=() if self.cycle else None))


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model and the data that it learns: the part of a run that a recipe gathers."""

    model: nn.Module
    batch_at: Callable[[int], Batch]
    """Batch by its number: a pure function."""
    place_of: Callable[[int, range], str]
    """Text for a person that says where sequences of a batch, given by number and range, lie in the data."""
    loss: Loss
    evaluate: Callable[[nn.Module, Callable[[], None]], Evaluation]
    """Held-out loss of a model; calls its second argument before each batch, and leaves weights, modes and random
    streams as they are."""
    initialize: Callable[[nn.Module], str | None] | None = None
    """Called after the factors have been injected, before the first step that trains them; returns a line to report."""
    saves_frozen: bool = True
    """False where the frozen weights never change from those that the model was opened with."""


@dataclass(frozen=True, kw_only=True)
class Run(Task):
    """A task, and everything that decides how the loop trains it."""

    schedule: Schedule
    """The planned schedule; `Progress` has the one in force."""
    adaptive: Adaptive = Adaptive()
    optimizer: OptimizerConfig
    lowrank: LowRankConfig
    restart: RestartConfig
    reporter: Reporter
    checkpoints: Checkpoints
    settings: dict[str, str | int]
    """Everything beside the configuration that changes numbers; saved with every checkpoint."""
    autocast: torch.dtype | None
    """Dtype that autocast computes products in; None: that of the weights."""
    seed: int
    micro_sequences: int
    clip_grad_norm: float
    non_finite: NonFinitePolicy
    non_finite_limit: int
    sync_every_steps: int
    """The host waits for the device's figures at least so often, and before logging, saving and evaluating."""
    log_every_steps: int
    evaluate_every_steps: int
    measured_restarts: int = 1
    """n, where the held-out loss is measured on both sides of every n-th restart, beginning with the first."""
    checkpoint_every_steps: int
    group: Group = ALONE
    """The processes that train together."""
    reduction: Reduction = field(default_factory=Reduction)
    """How the gradients of a step's micro-batches come together."""
    until: int | None = None
    """Step at which training stops, with a checkpoint and a held-out measurement; None for the last of the schedule."""

    @property
    def end(self) -> int:
        """Step at which training stops. The schedule is that of the whole run in any case."""
        return self.schedule.total_steps if self.until is None else min(self.until, self.schedule.total_steps)


@dataclass
class Progress:
    """Everything that changes while the loop runs, beside the weights."""

    optimizer: torch.optim.Optimizer
    schedule: Schedule
    """The schedule in force: as planned, with the run's own decisions applied."""
    state: TrainState = field(default_factory=TrainState)
    pending: list[tuple[TrainState, Tensor]] = field(default_factory=list)
    """Steps whose figures the host has not read yet: the state before each, and its non-finite flag (`train_step`)."""
    unlogged_tokens: int = 0
    unlogged_seconds: float = 0.0
    unlogged_data_seconds: float = 0.0
    """Part of `unlogged_seconds` that went into reading batches."""
    unlogged_waited_seconds: float = 0.0
    """Part of `unlogged_seconds` in which this process waited for others."""
    pace: Pace = field(default_factory=Pace, compare=False)
    evaluation: Evaluation | None = None
    """The last held-out measurement."""
    without_gradient: frozenset[str] = frozenset()
    """Tensors that had no gradient in the first step of the cycle."""
    said_without_gradient: frozenset[str] = frozenset()
    """Tensors of which a warning has said that they have no gradient."""

    def position(self, taken: int) -> dict[str, str | int]:
        """Step, tokens, phase and cycle of a metric record; phase and cycle are those of step `taken`, the last one."""
        phase, cycle = self.schedule.phase(taken), self.schedule.cycle(taken)
        return {"step": self.state.step, "tokens": self.state.tokens, "phase": phase, "cycle": cycle}

    def settle(self, planned: Schedule, decisions: Decisions) -> None:
        """Adopt decisions: they change the schedule in force, and the loss is watched from here anew."""
        self.state = replace(self.state, decisions=decisions, window=LossWindow())
        self.schedule = decisions.applied_to(planned)


def restore(run: Run, checkpoint: Checkpoint | None) -> Progress:
    """Bring model, optimizer and metric files to the state of a checkpoint, or of step 0 without one.

    Raises:
        UserError: the checkpoint does not fit the run or holds a tensor that is not finite; it names the file.
    """
    strip(run.model)  # removes factors of a part of the run that is gone back from
    run.model.train()
    if checkpoint is None:
        state = run.adaptive.at_start()
        run.reporter.rewind({"metrics.jsonl": 0, "restarts.jsonl": 0})
        return Progress(build_optimizer(run.model, run.optimizer), state.decisions.applied_to(run.schedule), state)
    try:
        schedule = restore_weights(
            run.model, checkpoint, run.schedule, run.lowrank, seed=run.seed, has_frozen=run.saves_frozen
        )
        optimizer = build_optimizer(run.model, run.optimizer)
        load_named_state(run.model, optimizer, checkpoint.optimizer(wanted_parts(run.model)))
    except UserError as error:
        raise UserError(f"{checkpoint.folder}: {error}") from None
    if checkpoint.state.positions.keys() != run.reporter.positions().keys():
        raise UserError(f"{checkpoint.folder / 'state.json'}: `positions` are not those of the metric files")
    if name := next(filter(None, run.group.gather(_first_non_finite(run.model, optimizer))), None):
        raise UserError(f"{checkpoint.folder}: {name} is not finite; delete this checkpoint to use an older one")
    run.reporter.rewind(checkpoint.state.positions)
    return Progress(optimizer, schedule, checkpoint.state.progress)


def restore_weights(
    model: nn.Module,
    checkpoint: Checkpoint,
    planned: Schedule,
    lowrank: LowRankConfig,
    *,
    seed: int,
    has_frozen: bool = True,
) -> Schedule:
    """Bring a model without factors to a checkpoint: inject factors if it is of the low-rank phase, load all weights.

    Args:
        has_frozen: whether the checkpoint holds the frozen weights; else those of `model` stay.

    Returns:
        The schedule in force: `planned` with the run's decisions applied.

    Raises:
        UserError: the checkpoint does not fit the model or the schedule.
    """
    decisions = checkpoint.state.decisions
    schedule = decisions.applied_to(planned)
    if schedule.phase(checkpoint.step) == "low_rank" and not schedule.switch_due(checkpoint.step):
        inject(model, with_ranks(lowrank, decisions.ranks), seed=seed)
    kept = {} if has_frozen else _frozen_tensors(model, lowrank)
    load_exact_tensors(model, kept | checkpoint.weights(wanted_parts(model)))
    return schedule


def save(run: Run, progress: Progress) -> None:
    """Start writing a checkpoint of the run's present state; do nothing if the newest is of this step.

    Raises:
        NonFinite: a tensor is not finite; nothing is written, so no checkpoint ever holds one.
        RunStopped: the disk (see `Checkpoints.save`), or the ranks have drifted apart.
    """
    state = progress.state
    if name := next(filter(None, run.group.gather(_first_non_finite(run.model, progress.optimizer))), None):
        raise NonFinite(f"after step {state.step}: {name} is not finite; no checkpoint was written")
    tensors, frozen = exact_tensors(run.model), _frozen_tensors(run.model, run.lowrank)
    moving = {name: tensor for name, tensor in tensors.items() if name not in frozen}
    moments = named_state(run.model, progress.optimizer)
    parts = parts_of(run.model) | parts_of_state(run.model, progress.optimizer)
    on_all = {name: tensor for name, tensor in (moving | moments).items() if name not in parts}
    check_equal(run.group, on_all, f"after step {state.step}")
    run.checkpoints.save(
        SavedState(
            **vars(state),
            positions=run.reporter.positions(),
            frozen_since=progress.schedule.cycle_start(max(state.step - 1, 0)),
            scheduled=save_due(run, state.step),
        ),
        weights=moving,
        frozen=frozen if run.saves_frozen else {},
        optimizer=moments,
        settings=run.settings,
        parts=parts,
    )


def next_loss(run: Run, progress: Progress, model: nn.Module) -> Tensor:
    """Mean loss of the next step's first micro-batch; restarts along a gradient take it of this loss."""
    torch.manual_seed(keyed_seed(run.seed, "next loss", progress.state.step))  # keys the dropout
    device = next(model.parameters()).device
    micro_batch = (tensor[: run.micro_sequences].to(device) for tensor in run.batch_at(progress.state.batch))
    with torch.autocast(device.type, dtype=run.autocast, enabled=run.autocast is not None):
        total, valid = run.loss(model, *micro_batch)
    return total / valid


def held_out_figures(result: Evaluation, seconds: float) -> dict[str, Any]:
    """Figures of a held-out measurement as they stand in metrics.jsonl; `seconds` is what it took."""
    return {
        "validation_loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "validation_tokens": result.tokens,
        "sample": result.whole_tokens is not None,
        "whole_tokens": result.tokens if result.whole_tokens is None else result.whole_tokens,
        **result.scores,
        "seconds": seconds,
    }


def save_due(run: Run, step: int) -> bool:
    """Whether a checkpoint is due: every so many steps and at the end; at the start only if a run may rewind to it."""
    if step == 0:
        return run.non_finite == "rewind"
    return step == run.schedule.total_steps or step % run.checkpoint_every_steps == 0


def _frozen_tensors(model: nn.Module, lowrank: LowRankConfig) -> dict[str, Tensor]:
    """The exact weights, by name, that do not change within a cycle; weights that follow a residual do change."""
    names = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    if lowrank.residual.scale:
        names -= {f"{path}.weight" for path in low_rank_layers(model)}
    return {name: tensor for name, tensor in exact_tensors(model).items() if name in names}


def _first_non_finite(model: nn.Module, optimizer: torch.optim.Optimizer) -> str | None:
    """Name of the first tensor that holds a NaN, or an infinity; buffers such as masks may hold infinities."""
    buffers = {name for name, _ in model.named_buffers()}
    for name, tensor in (exact_tensors(model) | named_state(model, optimizer)).items():
        if tensor.is_floating_point():
            total = tensor.sum()  # is not finite if any entry is not; cheaper than a mask of the tensor's size
            if torch.isnan(total) or (torch.isinf(total) and name not in buffers):
                return name
    return None
