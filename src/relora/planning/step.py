"""One training step of a model, gone through without its memory.

    peak = weights + moments + gradients + activations + what the loss and the backward pass hold, at the worst moment

The moment is found by going through the step (`ledger`): with one micro-batch it is where the backward pass begins;
with several the gradients of the first are there while the second runs. Gradients are dropped after the update.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from relora.lowrank import exact_tensors, low_rank_layers
from relora.lowrank.config import Residual
from relora.lowrank.costs import Rates
from relora.model.blocks import decoder_blocks
from relora.model.head import whole_logits_reason
from relora.planning.ledger import Ledger, Pass

KINDS = {
    "weights": "parameters that train at full rank",
    "frozen weights": "as stored, with the copies and scales that products run on, and masters in main memory",
    "factors": "lora_A, lora_B and trained scales",
    "moments": "the optimizer's state",
    "gradients": "accumulated; dropped after the update",
    "activations": "what the forward pass keeps for the backward pass",
    "loss": "a chunk of logits, and the gradients that are formed with it",
    "backward": "what the backward pass forms and drops: gradients of activations, dW or a merged weight of one layer",
    "other": "buffers, ids",
}
_PASSES_OF_RESIDUAL = 10
"""Over a gradient: read for the norm, clipped, projected, scaled and added to the weight."""


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """What a step is made of."""

    micro_sequences: int
    sequence_length: int
    micro_batches: int
    device: torch.device
    rates: Rates


@dataclass(frozen=True, kw_only=True)
class StepFigures:
    """What a step takes; bytes, seconds, and counts of parameters."""

    trained: int
    """Parameters with a gradient, factors included."""
    frozen: int
    factors: int
    memory: dict[str, int]
    """Bytes on the device when most lives, by kind (see `KINDS`)."""
    main_memory: dict[str, int] = field(default_factory=dict)
    """Bytes that lie in main memory beside those of a GPU."""
    heap: int
    """Bytes of blocks on the allocator's heap when most of them live, which may be at another moment."""
    mapped: int
    """Likewise of blocks that are too large for the heap."""
    resident: int
    """Bytes between two steps."""
    restart: int
    """Bytes while the largest layer is merged."""
    snapshot: int
    """Bytes of a background checkpoint's copy in main memory, frozen weights included."""
    seconds: float

    @property
    def peak(self) -> int:
        """Bytes of tensors on the device when most lives."""
        return sum(self.memory.values())


def simulate(
    model: nn.Module,
    shape: StepShape,
    run_pass: Pass,
    *,
    prepare: Callable[[nn.Module], object],
    moments: Callable[[nn.Parameter], list[Tensor]],
    residual: Residual | None = None,
) -> StepFigures:
    """Go through a step that is not the run's first (moments are there).

    Args:
        model: on the meta device; it is changed.
        prepare: makes of it what trains: injects, checkpoints activations.
        moments: the optimizer's state of one parameter.
        residual: whether frozen weights have gradients, too: memory is that of a step in which they do, time the mean.
    """
    ledger, fake = Ledger(shape.device, shape.rates), FakeTensorMode(allow_non_fake_inputs=True)
    with fake, ledger:
        _move(model, shape.device)
        prepare(model)
        model.train()
        for name, parameter in model.named_parameters():
            in_factor = name.rpartition(".")[2].startswith(("lora_", "scaling"))
            trained = "factors" if in_factor else "weights"
            ledger.relabel(parameter.data, trained if parameter.requires_grad else "frozen weights")
        for layer in low_rank_layers(model).values():
            for tensor in (layer.frozen_copy, layer.frozen_scale, layer.base.master):
                if tensor is not None:
                    ledger.relabel(tensor, "frozen weights")
        trained_parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        ledger.kind = "moments"
        state = [tensor for parameter in trained_parameters for tensor in moments(parameter)]
        ledger.kind = "other"
        ids = torch.zeros(shape.micro_sequences, shape.sequence_length, dtype=torch.long, device=shape.device)
        whole_logits_reason(model)  # found out once about a model, not in every step
        resident = ledger.live.total()
        seconds = _passes(model, ids, run_pass, shape, ledger)
        _drop_gradients(trained_parameters)
        if residual and residual.scale:
            due = _residual_passes(model, ids, run_pass, shape, ledger)
            seconds += (due - seconds) / residual.every_steps
            _drop_gradients(trained_parameters)
        peak, heap, mapped = ledger.peak, ledger.heap_peak, ledger.mapped_peak
        seconds += _update_seconds(trained_parameters, state, shape.rates)
        restart = _restart(model, ledger)
        snapshot = sum(tensor.nbytes for tensor in (*exact_tensors(model).values(), *state))
    factors = sum(p.numel() for layer in low_rank_layers(model).values() for p in layer.factors.values())
    return StepFigures(
        trained=sum(parameter.numel() for parameter in trained_parameters),
        frozen=sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad),
        factors=factors,
        memory={kind: peak[kind] for kind in KINDS if peak[kind]},
        main_memory={kind: size for kind, size in ledger.elsewhere.items() if size},
        heap=heap,
        mapped=mapped,
        resident=resident,
        restart=restart,
        snapshot=snapshot,
        seconds=seconds,
    )


def _passes(model: nn.Module, ids: Tensor, run_pass: Pass, shape: StepShape, ledger: Ledger) -> float:
    """Seconds of all micro-batches; the ledger keeps the peak."""
    blocks = decoder_blocks(model)

    def enter_backward(_: Tensor) -> None:
        ledger.kind = "backward"

    def enter_loss(_: nn.Module, __: object, output: object) -> None:
        if ledger.kind == "activations":  # not again where a block is computed a second time
            ledger.kind = "loss"
            hidden = output[0] if isinstance(output, tuple) else output
            if isinstance(hidden, Tensor) and hidden.requires_grad:
                hidden.register_hook(enter_backward)  # type: ignore[no-untyped-call]

    count = _counted_as_gradient(ledger)
    hooks = [block.register_forward_hook(enter_loss) for block in blocks[-1:]]
    for parameter in model.parameters():
        if parameter.requires_grad:
            hook = parameter.register_post_accumulate_grad_hook(count)  # type: ignore[no-untyped-call]
            hooks.append(hook)
    ledger.forget_peak()
    for _ in range(min(shape.micro_batches, 2)):  # the third is like the second
        ledger.kind, ledger.seconds = "activations", 0.0
        run_pass(model, ids)
        for parameter in model.parameters():
            if parameter.grad is not None:
                ledger.relabel(parameter.grad, "gradients")
    ledger.kind = "other"
    for hook in hooks:
        hook.remove()
    return ledger.seconds * shape.micro_batches


def _residual_passes(model: nn.Module, ids: Tensor, run_pass: Pass, shape: StepShape, ledger: Ledger) -> float:
    """The same where frozen weights have gradients, and the seconds of their own update; the peak is now this one's."""
    layers = low_rank_layers(model).values()
    for layer in layers:
        layer.weight.requires_grad_(True)
    seconds = _passes(model, ids, run_pass, shape, ledger)
    for layer in layers:
        layer.weight.requires_grad_(False)
        layer.weight.grad = None
        seconds += 2 * shape.rates.product(layer.out_features, layer.in_features, layer.r)
        seconds += shape.rates.traffic(layer.weight.numel(), _PASSES_OF_RESIDUAL)
    return seconds


def _counted_as_gradient(ledger: Ledger) -> Callable[[Tensor], None]:
    def relabel(parameter: Tensor) -> None:
        if parameter.grad is not None:
            ledger.relabel(parameter.grad, "gradients")

    return relabel


def _restart(model: nn.Module, ledger: Ledger) -> int:
    """Bytes at the worst moment while one layer after the other is merged: that of the largest."""
    ledger.forget_peak()
    layers = low_rank_layers(model).values()
    if layers:
        largest = max(layers, key=lambda layer: layer.weight.numel())
        largest.base.add_(largest.delta())
    return ledger.peak.total()


def _update_seconds(trained: list[nn.Parameter], state: list[Tensor], rates: Rates) -> float:
    """By traffic: weights and moments read and written; gradients read for their norm, scaled, read and dropped."""
    parameters = sum(parameter.nbytes for parameter in trained)
    return (2 * parameters + 2 * sum(tensor.nbytes for tensor in state) + 4 * parameters) / rates.bandwidth


def _drop_gradients(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _move(model: nn.Module, device: torch.device) -> None:
    """Parameters and buffers as fake tensors of `device`; tied ones stay one."""
    moved: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in moved:
                    there = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    parameter = isinstance(tensor, nn.Parameter)
                    moved[id(tensor)] = nn.Parameter(there, tensor.requires_grad) if parameter else there
                    moved[id(moved[id(tensor)])] = moved[id(tensor)]
                tensors[name] = moved[id(tensor)]  # type: ignore[assignment]
