"""One optimizer step: micro-batches, loss per valid token, clip, and a finite check before any weight moves."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from relora.draws import keyed_seed
from relora.errors import RunStopped
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
        RunStopped: loss or gradient is not finite, or a trainable tensor is dead; no weight and no moment has moved.
    """
    torch.manual_seed(keyed_seed(seed, "step", step))
    device = next(model.parameters()).device
    valid_tokens = int((batch.labels != IGNORED).sum())
    loss_sum = torch.zeros((), device=device)
    micro_batches = zip(
        torch.split(batch.input_ids, micro_sequences), torch.split(batch.labels, micro_sequences), strict=True
    )
    for input_ids, labels in micro_batches:
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            micro_loss, _ = loss(model, input_ids.to(device, non_blocking=True), labels.to(device, non_blocking=True))
        torch.autograd.backward(micro_loss / valid_tokens)
        loss_sum += micro_loss.detach()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grad_norm = nn.utils.clip_grad_norm_(trainable, clip_grad_norm or torch.inf)
    mean_loss, norm = (loss_sum / valid_tokens).item(), grad_norm.item()
    if not (torch.isfinite(loss_sum) and torch.isfinite(grad_norm)):
        optimizer.zero_grad()
        raise RunStopped(
            f"step {step}: loss {mean_loss:g}, gradient norm {norm:g}; no weight has moved. Lower the learning rate"
        )
    if check_gradients:
        _stop_on_dead(model, step)
    optimizer.step()
    optimizer.zero_grad()
    return StepOutcome(mean_loss, norm, valid_tokens)


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


def _stop_on_dead(model: nn.Module, step: int) -> None:
    dead = dead_tensors(model)
    if dead:
        others = f" (and {len(dead) - 1} more tensors)" if len(dead) > 1 else ""
        raise RunStopped(
            f"step {step}: {dead[0]}{others} gets no gradient, so it would never train; freeze it or mend the model"
        )
