"""What a run is made of, how it is saved, and how it is brought back.

`begin` is the inverse of `save`: from a checkpoint it makes the model, the optimizer and the metric files what they
were. What cannot be told from the step alone is saved; there is nothing else.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from relora.errors import NonFinite, UserError
from relora.lowrank import LowRankConfig, exact_tensors, inject, load_exact_tensors, strip
from relora.lowrank.restart import Reset
from relora.measure import Evaluation
from relora.report.reporter import Reporter
from relora.train.checkpoint import Checkpoint, Checkpoints, SavedState
from relora.train.optim import OptimizerConfig, build_optimizer, load_named_state, named_state
from relora.train.schedule import Schedule
from relora.train.state import TrainState
from relora.train.step import Batch, Loss

NonFinitePolicy = Literal["stop", "skip", "rewind"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a recipe hands to the loop."""

    model: nn.Module
    schedule: Schedule
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
    restart_reset: Reset
    restart_keep_ratio: float
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
    look_every_steps: int
    """The host waits for a step's figures at least so often, and where they are logged or something is due."""
    log_every_steps: int
    evaluate_every_steps: int
    checkpoint_every_steps: int

    def position(self, state: TrainState, taken: int) -> dict[str, str | int]:
        """Where a record belongs; phase and cycle are those of the step `taken` last."""
        phase, cycle = self.schedule.phase(taken), self.schedule.cycle(taken)
        return {"step": state.step, "tokens": state.tokens, "phase": phase, "cycle": cycle}


@dataclass
class Progress:
    """Where the loop stands: all that changes while it runs, beside the weights."""

    optimizer: torch.optim.Optimizer
    state: TrainState = field(default_factory=TrainState)
    unseen: list[tuple[TrainState, Tensor]] = field(default_factory=list)
    """The steps since the host last looked: where each began, and its flag (see `train_step`)."""
    unlogged_tokens: int = 0
    unlogged_seconds: float = 0.0
    evaluated_loss: float = math.nan
    """Of the last held-out measurement."""


def begin(run: Run, checkpoint: Checkpoint | None) -> Progress:
    """The progress at a checkpoint, model, optimizer and metric files brought back to it; without one, at step 0."""
    step = checkpoint.step if checkpoint else 0
    strip(run.model)  # what a part of the run that does not count left in it
    run.model.train()
    if run.schedule.phase(step) == "low_rank" and not run.schedule.switch_due(step):
        inject(run.model, run.lowrank, seed=run.seed)
    if checkpoint is None:
        run.reporter.rewind({"metrics.jsonl": 0, "restarts.jsonl": 0})
        return Progress(build_optimizer(run.model, run.optimizer))
    try:
        kept = {} if run.saves_frozen else _frozen(run.model)
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
    return Progress(optimizer, checkpoint.state.progress)


def save(run: Run, progress: Progress) -> None:
    """Begin to write a checkpoint of where the run stands; no-op where the newest is of this step.

    Raises:
        NonFinite: a tensor is not finite; nothing is written, so no checkpoint ever holds one.
        RunStopped: the disk; see `Checkpoints.save`.
    """
    state = progress.state
    if name := _first_non_finite(run.model, progress.optimizer):
        raise NonFinite(f"after step {state.step}: {name} is not finite; no checkpoint was written")
    tensors, frozen = exact_tensors(run.model), _frozen(run.model)
    run.checkpoints.save(
        SavedState(
            **asdict(state),
            positions=run.reporter.positions(),
            frozen_since=run.schedule.cycle_start(max(state.step - 1, 0)),
            scheduled=save_due(run, state.step),
        ),
        weights={name: tensor for name, tensor in tensors.items() if name not in frozen},
        frozen=frozen if run.saves_frozen else {},
        optimizer=named_state(run.model, progress.optimizer),
        settings=run.settings,
    )


def save_due(run: Run, step: int) -> bool:
    """Every so often and at the end; at the start, too, where a run may have to go back to it."""
    if step == 0:
        return run.non_finite == "rewind"
    return step == run.schedule.total_steps or step % run.checkpoint_every_steps == 0


def _frozen(model: nn.Module) -> dict[str, Tensor]:
    """What does not train, exact, by name."""
    names = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in exact_tensors(model).items() if name in names}


def _first_non_finite(model: nn.Module, optimizer: torch.optim.Optimizer) -> str | None:
    """The first tensor that holds a NaN or, unless it is a buffer (a mask may), an infinity."""
    buffers = {name for name, _ in model.named_buffers()}
    for name, tensor in (exact_tensors(model) | named_state(model, optimizer)).items():
        if tensor.is_floating_point():
            total = tensor.sum()  # tells of any, without a mask of the tensor's size
            if torch.isnan(total) or (torch.isinf(total) and name not in buffers):
                return name
    return None
