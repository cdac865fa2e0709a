"""One optimizer step: micro-batches, loss per valid token, clip, and a finite check before any weight moves.

The check costs a wait: the host learns a loss only when the device has computed it. So a step may be taken unseen.
Then the check is the device's: a flag that goes up with the first loss or gradient that is not finite and stays up
holds back that update and all that follow (`found_inf` of the fused kernels). When the host looks at last, weights and
moments are as they were before the step that went wrong.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from relora.errors import NonFinite, RunStopped
from relora.lowrank import low_rank_layers
from relora.measure import IGNORED
from relora.seeding import keyed_seed
from relora.train.embeddings import rows_added_in_place

Batch = tuple[Tensor, ...]
"""The sequences of one step: input_ids, labels (IGNORED where nothing is scored), and what else the loss takes; each
[sequences, ...] and split alike."""

Loss = Callable[..., tuple[Tensor, Tensor]]
"""(model, *batch) -> (loss summed over valid labels, their number)."""


@dataclass(frozen=True)
class StepOutcome:
    """What a step measured; of one taken unseen, loss and norm are NaN and `held` is the flag on the device."""

    loss: float
    """Mean over the step's valid tokens, before the update; nats."""
    grad_norm: float
    """Norm over all trainable parameters, before clipping."""
    tokens: int
    held: Tensor | None = None
    """1 where this step or one before it, since the last look, was not finite: then nothing has moved."""


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
    look: bool = True,
) -> StepOutcome:
    """Accumulate over micro-batches and update once.

    The loss is a sum divided by the valid tokens of the whole step, so that unequal micro-batches weigh right.
    Dropout draws from the global stream, reseeded here by (seed, step): a resumed run draws the same.

    Args:
        look: wait for loss and gradient before anything moves. Without, `optimizer` must be a fused one.

    Raises:
        NonFinite: loss or gradient is not finite. RunStopped: a trainable tensor is dead. No weight and no moment has
            moved. Neither is raised by a step that is taken unseen.
    """
    torch.manual_seed(keyed_seed(seed, "step", step))
    device = next(model.parameters()).device
    valid_tokens = int((batch[1] != IGNORED).sum())  # of the host's copy: nothing to wait for
    micro_losses = []
    parts = (torch.split(_sent(tensor, device), micro_sequences) for tensor in batch)
    with rows_added_in_place(model):
        for micro_batch in zip(*parts, strict=True):
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                micro_loss, _ = loss(model, *micro_batch)
            torch.autograd.backward(micro_loss / valid_tokens)
            micro_losses.append(micro_loss.detach())
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grad_norm = nn.utils.get_total_norm([p.grad for p in trainable if p.grad is not None])
    figures = torch.stack([torch.stack(micro_losses).sum() / valid_tokens, grad_norm])
    if look:
        mean_loss, norm = figures.tolist()
        outcome = StepOutcome(mean_loss, norm, valid_tokens)
        if not (math.isfinite(outcome.loss) and math.isfinite(outcome.grad_norm)):
            failure = _non_finite(model, outcome, micro_losses, step, micro_sequences)
            optimizer.zero_grad()
            raise failure
        if check_gradients:
            _stop_on_dead(model, step)
    else:
        outcome = StepOutcome(math.nan, math.nan, valid_tokens, _hold_if_bad(optimizer, figures))
    if clip_grad_norm:
        nn.utils.clip_grads_with_norm_(trainable, clip_grad_norm, grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return outcome


def release(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer move again, once it is known which update was held back first."""
    del optimizer.found_inf  # type: ignore[attr-defined]
    for parameter, state in list(optimizer.state.items()):
        if not state["step"]:  # laid out for a first update that was not taken
            del optimizer.state[parameter]


def dead_tensors(model: nn.Module) -> list[str]:
    """Trainable tensors without a gradient, but for those whose gradient comes later.

    So do lora_A and a trained scale beside B = 0, and what is said to be `zero_until` another tensor is not all zero.
    """
    excused = {
        id(parameter)
        for parameter in model.parameters()
        if (until := getattr(parameter, "zero_until", None)) is not None and not until.any()
    }
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


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device; the host goes on at once, and where they are one nothing is copied."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def _hold_if_bad(optimizer: torch.optim.Optimizer, figures: Tensor) -> Tensor:
    """Raise the flag that the optimizer's kernels read, if a figure is not finite; it stays up until `release`."""
    held = 1 - figures.isfinite().all().float()
    held = torch.maximum(held, getattr(optimizer, "found_inf", held))
    optimizer.found_inf = held  # type: ignore[attr-defined]
    return held


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
