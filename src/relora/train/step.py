"""One optimizer step: micro-batches, loss per valid token, clip, and a finite check before any weight moves."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from relora.draws import keyed_seed
from relora.errors import NonFinite, RunStopped
from relora.lowrank import low_rank_layers
from relora.measure import IGNORED


class Batch(Protocol):
    """Sequences of one step, both [sequences, sequence_length]; labels are the next tokens, or IGNORED."""

    @property
    def input_ids(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...


Loss = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(model, input_ids, labels) -> (loss summed over valid tokens, their number)."""


@dataclass(frozen=True)
class StepOutcome:
    """What a step measured."""

    loss: float
    """Mean over the step's valid tokens, before the update; nats."""
    grad_norm: float
    """Norm over all trainable parameters, before clipping."""
    tokens: int


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    loss: Loss,
    *,
    seed: int,
    step: int,
    micro_sequences: int,
    clip_grad_norm: float,
    autocast: torch.dtype | None,
    check_gradients: bool,
) -> StepOutcome:
    """Accumulate over micro-batches and update once.

    The loss is a sum divided by the valid tokens of the whole step, so that unequal micro-batches weigh right.
    Dropout draws from the global stream, reseeded here by (seed, step): a resumed run draws the same.

    Raises:
        NonFinite: loss or gradient is not finite. RunStopped: a trainable tensor is dead. No weight and no moment has
            moved.
    """
    torch.manual_seed(keyed_seed(seed, "step", step))
    device = next(model.parameters()).device
    valid_tokens = int((batch.labels != IGNORED).sum())
    micro_losses = []
    micro_batches = zip(
        torch.split(batch.input_ids, micro_sequences), torch.split(batch.labels, micro_sequences), strict=True
    )
    for input_ids, labels in micro_batches:
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            micro_loss, _ = loss(model, input_ids.to(device, non_blocking=True), labels.to(device, non_blocking=True))
        torch.autograd.backward(micro_loss / valid_tokens)
        micro_losses.append(micro_loss.detach())
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grad_norm = nn.utils.get_total_norm([p.grad for p in trainable if p.grad is not None])
    loss_sum = torch.stack(micro_losses).sum()
    outcome = StepOutcome((loss_sum / valid_tokens).item(), grad_norm.item(), valid_tokens)
    if not (math.isfinite(outcome.loss) and math.isfinite(outcome.grad_norm)):
        failure = _non_finite(model, outcome, micro_losses, step, micro_sequences)
        optimizer.zero_grad()
        raise failure
    if check_gradients:
        _stop_on_dead(model, step)
    if clip_grad_norm:
        nn.utils.clip_grads_with_norm_(trainable, clip_grad_norm, grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return outcome


def dead_tensors(model: nn.Module) -> list[str]:
    """Trainable tensors without a gradient, but for lora_A and a trained scale beside B = 0: theirs comes later."""
    excused: set[int] = set()
    for layer in low_rank_layers(model).values():
        if not layer.lora_B.any():
            excused |= {id(factor) for kind, factor in layer.factors.items() if kind != "lora_B"}
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and id(parameter) not in excused
        and (parameter.grad is None or not parameter.grad.any())
    ]


def _non_finite(
    model: nn.Module, outcome: StepOutcome, micro_losses: list[Tensor], step: int, micro_sequences: int
) -> NonFinite:
    """Names the micro-batch whose loss is at fault, else the first tensor whose gradient is."""
    where, sequences = "", range(len(micro_losses) * micro_sequences)
    at_fault = [index for index, loss in enumerate(micro_losses) if not torch.isfinite(loss)]
    if at_fault:
        sequences = range(at_fault[0] * micro_sequences, (at_fault[0] + 1) * micro_sequences)
    else:
        gradients = ((name, parameter.grad) for name, parameter in model.named_parameters())
        named = (name for name, grad in gradients if grad is not None and not torch.isfinite(grad.sum()))
        where = f" (first in {next(named, 'their sum')})"
    return NonFinite(
        f"step {step}: loss {outcome.loss:g}, gradient norm {outcome.grad_norm:g}{where}; no weight has moved",
        loss=outcome.loss,
        grad_norm=outcome.grad_norm,
        sequences=sequences,
    )


def _stop_on_dead(model: nn.Module, step: int) -> None:
    dead = dead_tensors(model)
    if dead:
        others = f" (and {len(dead) - 1} more tensors)" if len(dead) > 1 else ""
        raise RunStopped(
            f"step {step}: {dead[0]}{others} gets no gradient, so it would never train; freeze it or mend the model"
        )
