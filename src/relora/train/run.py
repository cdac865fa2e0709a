"""What a run is made of, how it is saved, and how it is brought back.

`begin` is the inverse of `save`: from a checkpoint it makes the model, the optimizer and the metric files what they
were. What cannot be told from the step alone is saved; there is nothing else.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from relora.errors import NonFinite, UserError
from relora.lowrank import LowRankConfig, exact_tensors, inject, load_exact_tensors, low_rank_layers, strip
from relora.lowrank.allocation import with_ranks
from relora.lowrank.restart import RestartConfig
from relora.measure import Evaluation
from relora.report.reporter import Reporter
from relora.seeding import keyed_seed
from relora.train.checkpoint import Checkpoint, Checkpoints, SavedState
from relora.train.optim import OptimizerConfig, build_optimizer, load_named_state, named_state
from relora.train.schedule import Schedule
from relora.train.state import Decisions, LossWindow, TrainState
from relora.train.step import Batch, Loss

NonFinitePolicy = Literal["stop", "skip", "rewind"]


@dataclass(frozen=True, kw_only=True)
class WarmStartEnd:
    """When a run ends its warm start before the bound."""

    window_steps: int
    """Between two looks at it."""
    slope: float
    """The loss falls by less than this share of itself from window to window."""
    energy: float
    """Share of the update that its r largest directions hold."""


@dataclass(frozen=True, kw_only=True)
class CycleEnd:
    """When a run restarts; looked at as often as restarts would be due."""

    slope: float
    """As of the warm start."""
    rank_share: float | None
    """Effective rank of the update over r; None: the loss alone decides."""


@dataclass(frozen=True, kw_only=True)
class Adaptive:
    """What is left to the run itself, see `train.decisions`; what is None goes by the schedule."""

    warm_start: WarmStartEnd | None = None
    cycle: CycleEnd | None = None
    ranks: Literal["uniform", "spectrum"] = "uniform"

    @property
    def watches_loss(self) -> bool:
        """Whether the loss of every step counts: then the host looks at every one."""
        return self.warm_start is not None or self.cycle is not None

    def at_start(self) -> TrainState:
        """Step 0, with nothing decided."""
        return TrainState(decisions=Decisions(restart_steps=() if self.cycle else None))


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a recipe hands to the loop."""

    model: nn.Module
    schedule: Schedule
    """As planned; in force is that of `Progress`."""
    adaptive: Adaptive = Adaptive()
    batch_at: Callable[[int], Batch]
    """Number -> batch: a pure function."""
    place_of: Callable[[int, range], str]
    """(number of a batch, sequences in it) -> where these lie in the data, for a person."""
    loss: Loss
    evaluate: Callable[[nn.Module, Callable[[], None]], Evaluation]
    """(model, called before each batch) -> held-out loss; leaves weights, modes and random streams as they are."""
    optimizer: OptimizerConfig
    lowrank: LowRankConfig
    initialize: Callable[[nn.Module], None] | None = None
    """Called when the factors have been put in, before the first step that trains them."""
    saves_frozen: bool = True
    """False where the frozen weights are those that the model came with, from beginning to end."""
    restart: RestartConfig
    reporter: Reporter
    checkpoints: Checkpoints
    settings: dict[str, str | int]
    """Saved with every checkpoint: what changes numbers though the configuration is the same."""
    autocast: torch.dtype | None
    """Dtype of the products, where it is not the weights'."""
    seed: int
    micro_sequences: int
    clip_grad_norm: float
    non_finite: NonFinitePolicy
    non_finite_limit: int
    sync_every_steps: int
    """The host waits for a step's figures at least so often, and where they are logged or something is due."""
    log_every_steps: int
    evaluate_every_steps: int
    checkpoint_every_steps: int


@dataclass
class Progress:
    """Where the loop stands: all that changes while it runs, beside the weights."""

    optimizer: torch.optim.Optimizer
    schedule: Schedule
    """As planned, but for what the run has decided."""
    state: TrainState = field(default_factory=TrainState)
    pending: list[tuple[TrainState, Tensor]] = field(default_factory=list)
    """The steps since the host last looked: where each began, and its flag (see `train_step`)."""
    unlogged_tokens: int = 0
    unlogged_seconds: float = 0.0
    evaluated_loss: float = math.nan
    """Of the last held-out measurement."""

    def position(self, taken: int) -> dict[str, str | int]:
        """Where a record belongs; phase and cycle are those of the step `taken` last."""
        phase, cycle = self.schedule.phase(taken), self.schedule.cycle(taken)
        return {"step": self.state.step, "tokens": self.state.tokens, "phase": phase, "cycle": cycle}

    def settle(self, planned: Schedule, decisions: Decisions) -> None:
        """From here on the timetable is that of these decisions, and the loss is watched anew."""
        self.state = replace(self.state, decisions=decisions, window=LossWindow())
        self.schedule = decisions.applied_to(planned)


def begin(run: Run, checkpoint: Checkpoint | None) -> Progress:
    """The progress at a checkpoint, model, optimizer and metric files brought back to it; without one, at step 0."""
    state = checkpoint.state.progress if checkpoint else run.adaptive.at_start()
    strip(run.model)  # what a part of the run that does not count left in it
    run.model.train()
    if checkpoint is None:
        run.reporter.rewind({"metrics.jsonl": 0, "restarts.jsonl": 0})
        return Progress(build_optimizer(run.model, run.optimizer), state.decisions.applied_to(run.schedule), state)
    try:
        schedule = state.decisions.applied_to(run.schedule)
        if schedule.phase(state.step) == "low_rank" and not schedule.switch_due(state.step):
            inject(run.model, with_ranks(run.lowrank, state.decisions.ranks), seed=run.seed)
        kept = {} if run.saves_frozen else _frozen(run)
        load_exact_tensors(run.model, kept | checkpoint.weights())
        optimizer = build_optimizer(run.model, run.optimizer)
        load_named_state(run.model, optimizer, checkpoint.optimizer())
    except UserError as error:
        raise UserError(f"{checkpoint.folder}: {error}") from None
    if checkpoint.state.positions.keys() != run.reporter.positions().keys():
        raise UserError(f"{checkpoint.folder / 'state.json'}: `positions` are not those of the metric files")
    if name := _first_non_finite(run.model, optimizer):
        raise UserError(f"{checkpoint.folder}: {name} is not finite; delete this checkpoint to use an older one")
    run.reporter.rewind(checkpoint.state.positions)
    return Progress(optimizer, schedule, state)


def save(run: Run, progress: Progress) -> None:
    """Begin to write a checkpoint of where the run stands; no-op where the newest is of this step.

    Raises:
        NonFinite: a tensor is not finite; nothing is written, so no checkpoint ever holds one.
        RunStopped: the disk; see `Checkpoints.save`.
    """
    state = progress.state
    if name := _first_non_finite(run.model, progress.optimizer):
        raise NonFinite(f"after step {state.step}: {name} is not finite; no checkpoint was written")
    tensors, frozen = exact_tensors(run.model), _frozen(run)
    run.checkpoints.save(
        SavedState(
            **vars(state),
            positions=run.reporter.positions(),
            frozen_since=progress.schedule.cycle_start(max(state.step - 1, 0)),
            scheduled=save_due(run, state.step),
        ),
        weights={name: tensor for name, tensor in tensors.items() if name not in frozen},
        frozen=frozen if run.saves_frozen else {},
        optimizer=named_state(run.model, progress.optimizer),
        settings=run.settings,
    )


def next_loss(run: Run, progress: Progress, model: nn.Module) -> Tensor:
    """Mean loss of the first micro-batch of the next step: what a restart takes gradients of."""
    torch.manual_seed(keyed_seed(run.seed, "next loss", progress.state.step))  # of dropout
    device = next(model.parameters()).device
    micro_batch = (tensor[: run.micro_sequences].to(device) for tensor in run.batch_at(progress.state.batch))
    with torch.autocast(device.type, dtype=run.autocast, enabled=run.autocast is not None):
        total, valid = run.loss(model, *micro_batch)
    return total / valid


def save_due(run: Run, step: int) -> bool:
    """Every so often and at the end; at the start, too, where a run may have to go back to it."""
    if step == 0:
        return run.non_finite == "rewind"
    return step == run.schedule.total_steps or step % run.checkpoint_every_steps == 0


def _frozen(run: Run) -> dict[str, Tensor]:
    """What stays as it is through a cycle, exact, by name."""
    names = {name for name, parameter in run.model.named_parameters() if not parameter.requires_grad}
    if run.lowrank.residual.scale:
        names -= {f"{path}.weight" for path in low_rank_layers(run.model)}
    return {name: tensor for name, tensor in exact_tensors(run.model).items() if name in names}


def _first_non_finite(model: nn.Module, optimizer: torch.optim.Optimizer) -> str | None:
    """The first tensor that holds a NaN or, unless it is a buffer (a mask may), an infinity."""
    buffers = {name for name, _ in model.named_buffers()}
    for name, tensor in (exact_tensors(model) | named_state(model, optimizer)).items():
        if tensor.is_floating_point():
            total = tensor.sum()  # tells of any, without a mask of the tensor's size
            if torch.isnan(total) or (torch.isinf(total) and name not in buffers):
                return name
    return None
