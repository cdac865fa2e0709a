"""Simulation of one training step: every operation is dispatched, with tensors that have shapes but no memory.

    peak = weights + moments + gradients + activations + tensors of loss and backward pass, at the worst moment

The simulation finds that moment by counting (`ledger`). With one micro-batch it is usually where the backward pass
begins; with several, the gradients of the first micro-batch are in memory while the second one runs. Gradients are
freed after the update.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from relora.lowrank import exact_tensors, low_rank_layers
from relora.lowrank.config import Residual
from relora.lowrank.costs import Rates
from relora.lowrank.usage import without_numbers
from relora.model.blocks import decoder_blocks
from relora.model.head import whole_logits_reason
from relora.planning.ledger import Ledger, Pass

KINDS = {
    "weights": "parameters that train at full rank",
    "frozen weights": "weights as stored, with the copies and scales that products run on, and master copies on a CPU",
    "factors": "lora_A, lora_B and trained scales",
    "moments": "state of the optimizer",
    "gradients": "accumulated gradients, freed after the update",
    "activations": "tensors that the forward pass keeps for the backward pass",
    "loss": "a chunk of logits, and the gradients that are computed with it",
    "backward": "temporary tensors of the backward pass: gradients of activations, dW or the merged weight of a layer",
    "other": "buffers, token ids",
}
"""Kind of memory -> meaning, in the order of the table."""
_PASSES_OF_RESIDUAL = 10
"""Times that the residual update reads or writes a gradient: norm, clipping, projection, scaling, addition to W."""


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """Size of a step, and the device that it runs on."""

    micro_sequences: int
    sequence_length: int
    micro_batches: int
    device: torch.device
    rates: Rates


@dataclass(frozen=True, kw_only=True)
class StepFigures:
    """Cost of a step: counts of parameters, bytes and seconds."""

    trained: int
    """Number of parameters with a gradient, factors included."""
    frozen: int
    """Number of frozen parameters."""
    factors: int
    """Number of parameters in factors."""
    memory: dict[str, int]
    """Bytes on the device at the peak, by kind (see `KINDS`)."""
    main_memory: dict[str, int] = field(default_factory=dict)
    """Bytes in main memory by kind, where the device is a GPU."""
    heap: int
    """Largest number of bytes in blocks on the allocator's heap, which may be at another moment than the peak."""
    mapped: int
    """Largest number of bytes in blocks that are too large for the heap."""
    resident: int
    """Bytes of tensors that stay between two steps."""
    restart: int
    """Bytes of tensors while a restart merges the largest layer."""
    snapshot: int
    """Bytes of the copy in main memory from which a background checkpoint is written, frozen weights included."""
    seconds: float
    """Predicted time of the step."""

    @property
    def peak(self) -> int:
        """Bytes of tensors on the device at the worst moment of the step."""
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
    """Simulate a step after the run's first, so that the optimizer already has its moments.

    Args:
        model: the model, on the meta device; it is changed.
        run_pass: forward and backward pass of one micro-batch.
        prepare: called with the model to turn it into the one that trains, for example by injecting low-rank layers.
        moments: returns the optimizer's tensors for a parameter.
        residual: if its scale is not zero, frozen weights have gradients in every so many steps. The peak is then that
            of such a step, and the time is the mean over all steps.
    """
    ledger, fake = Ledger(shape.device, shape.rates, fake=True), FakeTensorMode(allow_non_fake_inputs=True)
    with fake, ledger, without_numbers():
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
        whole_logits_reason(model)  # runs the model once and keeps the answer, which would count as part of the step
        resident = ledger.live.total()
        seconds = _passes(model, ids, run_pass, shape, ledger)
        _drop_gradients(trained_parameters)
        if residual and residual.scale:
            residual_seconds = _residual_passes(model, ids, run_pass, shape, ledger)
            seconds += (residual_seconds - seconds) / residual.every_steps
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
    """Simulate forward and backward of the micro-batches; return the seconds of all, and leave the peak in the ledger.

    Two micro-batches suffice: the third is like the second. Hooks tell the ledger what kind of memory comes next.
    """
    blocks = decoder_blocks(model)

    def enter_backward(_: Tensor) -> None:
        ledger.kind = "backward"

    def enter_loss(_: nn.Module, __: object, output: object) -> None:
        if ledger.kind == "activations":  # False where activation checkpointing computes the block again
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
    for _ in range(min(shape.micro_batches, 2)):
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
    """Simulate the micro-batches of a step in which frozen weights have gradients, and their residual update.

    Returns the seconds of both; the ledger is left with the peak of this step.
    """
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
    """Return a hook that makes the ledger count the gradient of a parameter as a gradient."""

    def relabel(parameter: Tensor) -> None:
        if parameter.grad is not None:
            ledger.relabel(parameter.grad, "gradients")

    return relabel


def _restart(model: nn.Module, ledger: Ledger) -> int:
    """Return the peak in bytes while layers are merged one after the other, which is that of the largest layer."""
    ledger.forget_peak()
    layers = low_rank_layers(model).values()
    if layers:
        largest = max(layers, key=lambda layer: layer.weight.numel())
        largest.base.add_(largest.delta())
    return ledger.peak.total()


def _update_seconds(trained: list[nn.Parameter], state: list[Tensor], rates: Rates) -> float:
    """Return the seconds of an update, by the bytes that it moves.

    Weights and moments are read and written; gradients are read for their norm, read and written by the clipping, and
    read by the update.
    """
    parameters = sum(parameter.nbytes for parameter in trained)
    moments = sum(tensor.nbytes for tensor in state)
    return (2 * parameters + 2 * moments + 4 * parameters) / rates.bandwidth


def _drop_gradients(parameters: list[nn.Parameter]) -> None:
    """Free the gradients."""
    for parameter in parameters:
        parameter.grad = None


def _move(model: nn.Module, device: torch.device) -> None:
    """Replace parameters and buffers by new tensors on `device`; tied ones stay one tensor."""
    moved: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in moved:
                    new = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    if isinstance(tensor, nn.Parameter):
                        new = nn.Parameter(new, tensor.requires_grad)
                    moved[id(tensor)] = new
                    moved[id(new)] = new  # a new tensor that is met again stays
                tensors[name] = moved[id(tensor)]  # type: ignore[assignment]
