"""One optimizer step: micro-batches, mean loss, clipping, and a check that all is finite before any weight moves.

    loss of the step = sum of the micro-batches' summed losses / valid tokens of the whole step

With several processes each computes its own share of the micro-batches, and `distributed.reduce` sums the gradients
over all of them. Each has the whole batch, so that none has to ask how many tokens there are.

Checking on the host forces a synchronisation: the host learns a loss only when the device has computed it. Therefore a
step can also be taken without one (`sync=False`). A flag on the device then makes the optimizer skip the update: it is
1 from the first loss or gradient norm that is not finite until `clear_nonfinite_flag`, and torch's fused kernels read
it as `found_inf`. When the host synchronises later, weights and moments are still as they were before the failed step.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from relora.distributed.reduce import Reduction, Share
from relora.errors import NonFinite, RunStopped
from relora.lowrank import low_rank_layers
from relora.lowrank.division import division_of
from relora.lowrank.usage import usage_of, with_siblings
from relora.measure import IGNORED
from relora.seeding import keyed_seed
from relora.train.embeddings import rows_added_in_place

Batch = tuple[Tensor, ...]
"""Sequences of one step: input_ids, labels (IGNORED where a token is not scored), then further inputs of the loss.

Every tensor is [sequences, ...], and all are split into micro-batches alike."""

Loss = Callable[..., tuple[Tensor, Tensor]]
"""(model, *batch) -> (loss summed over valid labels, their number)."""


@dataclass(frozen=True)
class StepOutcome:
    """Figures of one step; loss and gradient norm are NaN where the step was taken without a synchronisation."""

    loss: float
    """Mean over the step's valid tokens, before the update; nats."""
    grad_norm: float
    """Norm over all trainable parameters, before clipping."""
    tokens: int
    """Valid tokens of the step."""
    nonfinite_flag: Tensor | None = None
    """Scalar on the device, only of a step without a synchronisation: 1 where this step, or one before it since the
    flag was last cleared, was not finite. Then no weight and no moment has moved in this step."""
    without_gradient: frozenset[str] = frozenset()
    """Trainable tensors that got no gradient in this step, and may get one in another; only if that was looked at."""


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
    sync: bool = True,
    reduction: Reduction | None = None,
) -> StepOutcome:
    """Accumulate gradients over micro-batches and update once.

    The loss is a sum divided by the valid tokens of the whole step, so that every token weighs the same, however the
    tokens are spread over the micro-batches and processes. Dropout draws from torch's global generator, which is
    reseeded for every micro-batch by (seed, step, its first sequence), so that a resumed run draws the same, and so
    does another number of processes whose micro-batches begin at the same sequences.

    Args:
        micro_sequences: sequences of one micro-batch.
        clip_grad_norm: largest norm of the gradient; 0 for no clipping.
        autocast: dtype of matrix products, where it is not that of the weights.
        check_gradients: look for trainable tensors without a gradient; only with `sync`.
        sync: wait for loss and gradient norm before anything moves. Without, `optimizer` must be a fused one.
        reduction: how the gradients of all micro-batches come together; by default they add up in this process.

    Raises:
        NonFinite: loss or gradient is not finite, and `sync` is set. No weight and no moment has moved.
        RunStopped: a trainable tensor can never have a gradient, and `check_gradients` and `sync` are set. No weight
            and no moment has moved.
    """
    reduction = reduction or Reduction()
    valid_tokens = int((batch[1] != IGNORED).sum())  # counted in the host's copy, so it forces no synchronisation
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    shares = reduction.shares(len(batch[1]), micro_sequences)
    with reduction.step(trainable, shares), rows_added_in_place(model, reduction.adds_rows_in_place):
        own = _own_losses(model, batch, loss, shares, reduction, seed, step, autocast, valid_tokens)
        micro_losses = reduction.finish(own)
    grad_norm = reduction.norm([p.grad for p in trainable if p.grad is not None])
    figures = torch.stack([micro_losses.sum() / valid_tokens, grad_norm])
    if sync:
        mean_loss, norm = figures.tolist()
        outcome = StepOutcome(mean_loss, norm, valid_tokens)
        if not (math.isfinite(outcome.loss) and math.isfinite(outcome.grad_norm)):
            failure = _non_finite(model, outcome, micro_losses, step, shares)
            optimizer.zero_grad()
            raise failure
        if check_gradients:
            outcome = replace(outcome, without_gradient=_waiting_tensors(model, step))
    else:
        outcome = StepOutcome(math.nan, math.nan, valid_tokens, _update_nonfinite_flag(optimizer, figures))
    if clip_grad_norm:
        nn.utils.clip_grads_with_norm_(trainable, clip_grad_norm, grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return outcome


def _own_losses(
    model: nn.Module,
    batch: Batch,
    loss: Loss,
    shares: list[Share],
    reduction: Reduction,
    seed: int,
    step: int,
    autocast: torch.dtype | None,
    valid_tokens: int,
) -> list[Tensor]:
    """Run forward and backward passes of this process's micro-batches; return their summed losses."""
    device = next(model.parameters()).device
    own = [share.sequences for share in shares if share.rank == reduction.rank]
    first, stop = own[0].start, own[-1].stop
    on_device = [_to_device(tensor[first:stop], device) for tensor in batch]
    losses = []
    for sequences in own:
        key = (sequences.start,) if sequences.start else ()
        torch.manual_seed(keyed_seed(seed, "step", step, *key))
        micro_batch = [tensor[sequences.start - first : sequences.stop - first] for tensor in on_device]
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            micro_loss, _ = loss(model, *micro_batch)
        if not micro_loss.requires_grad:
            raise RunStopped(
                f"step {step}: the loss depends on no tensor that trains, so nothing would be learnt; choose other "
                "lowrank.target_modules or another method"
            )
        reduction.backward(micro_loss / valid_tokens, last=sequences == own[-1])
        losses.append(micro_loss.detach())
    for _ in range(reduction.passes(shares) - len(own)):  # the others have one micro-batch more, and wait for this rank
        without_labels = [micro_batch[0], torch.full_like(micro_batch[1], IGNORED), *micro_batch[2:]]
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            nothing, _ = loss(model, *without_labels)
        reduction.backward(nothing, last=False)
    return losses


def clear_nonfinite_flag(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer update again, once the host knows which step was the first that failed."""
    del optimizer.found_inf  # type: ignore[attr-defined]
    for parameter, state in list(optimizer.state.items()):
        if not state.get("step", 1):  # allocated by a first update that was then skipped
            del optimizer.state[parameter]


def dead_tensors(model: nn.Module) -> list[str]:
    """Name the trainable tensors whose gradient is absent or all zero, except where zero is right at this moment.

    An expert to which no token went in this step has no gradient, and is not dead while another expert has one. While
    lora_B is zero, it is right for lora_A and a trained scale of the same layer. It is right for a parameter
    with the attribute `zero_until`, a tensor, for as long as that tensor is all zero.
    """
    excused = {
        id(parameter)
        for parameter in model.parameters()
        if (until := getattr(parameter, "zero_until", None)) is not None and not until.any()
    }
    layers = list(low_rank_layers(model).values())
    for layer, is_zero in zip(layers, all_zero(model, [layer.lora_B for layer in layers]), strict=True):
        if is_zero:
            excused |= {id(factor) for kind, factor in layer.factors.items() if kind != "lora_B"}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in excused}
    without = all_zero(model, [parameter.grad for parameter in trained.values()])
    dead = [name for name, is_zero in zip(trained, without, strict=True) if is_zero]
    alive = with_siblings(model, trained.keys() - set(dead)) if dead else frozenset()
    return [name for name in dead if name not in alive]


def all_zero(model: nn.Module, tensors: Sequence[Tensor | None]) -> list[bool]:
    """Tell of each tensor whether it is absent or all zero, in all processes that the model is divided among."""
    is_zero = [tensor is None or not tensor.any() for tensor in tensors]
    division = division_of(model)
    if division is None or not tensors:
        return is_zero
    not_zero = torch.tensor([not zero for zero in is_zero], dtype=torch.int32)
    return [count == 0 for count in division.sum_(not_zero).tolist()]


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device without waiting for the copy; a tensor that is there already is not copied."""
    pinned = tensor.pin_memory() if device.type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)


def _update_nonfinite_flag(optimizer: torch.optim.Optimizer, figures: Tensor) -> Tensor:
    """Set the flag that the optimizer's kernels read if a figure is not finite or it was set before; return it."""
    flag = 1 - figures.isfinite().all().float()
    flag = torch.maximum(flag, getattr(optimizer, "found_inf", flag))
    optimizer.found_inf = flag  # type: ignore[attr-defined]
    return flag


def _non_finite(
    model: nn.Module, outcome: StepOutcome, micro_losses: Tensor, step: int, shares: list[Share]
) -> NonFinite:
    """Build the error, which names the micro-batch whose loss is not finite, or else the first such gradient."""
    where, sequences = "", range(shares[-1].sequences.stop)
    at_fault = [
        share for share, is_finite in zip(shares, micro_losses.isfinite().tolist(), strict=True) if not is_finite
    ]
    if at_fault:
        sequences = at_fault[0].sequences
        where = f" (on rank {at_fault[0].rank})" if shares[-1].rank else ""
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


def _waiting_tensors(model: nn.Module, step: int) -> frozenset[str]:
    """Name the dead tensors that another step may give a gradient.

    A gradient of zero may be right for now: a partner begins at zero and has to move first (Gemma 3n's output scales),
    or this batch does not reach the tensor. So may an absent one, where the length of a sequence decides which layers
    run.

    Raises:
        RunStopped: a tensor is dead for good: nothing trains, the model's logits do not depend on it, or it is a factor
            whose partner is zero, too.
    """
    dead = dead_tensors(model)
    if not dead:
        return frozenset()
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = low_rank_layers(model)
    zero_a = all_zero(model, [layer.lora_A for layer in layers.values()])
    zero_b = all_zero(model, [layer.lora_B for layer in layers.values()])
    pairs = {path for path, a, b in zip(layers, zero_a, zero_b, strict=True) if a and b}
    for_good = [name for name in dead if name.rpartition(".")[0] in pairs]
    absent = [name for name in dead if parameters[name].grad is None]
    if absent:
        usage = usage_of(model)
        for_good += [name for name in absent if usage is None or name not in usage.trained]
    if all(all_zero(model, [parameter.grad for parameter in parameters.values()])):
        for_good = for_good or dead
    if for_good:
        others = f" (and {len(for_good) - 1} more tensors)" if len(for_good) > 1 else ""
        raise RunStopped(
            f"step {step}: {for_good[0]}{others} gets no gradient, so it would never train; freeze it or mend the model"
        )
    return frozenset(dead)
