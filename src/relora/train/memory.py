"""What a model and its optimizer hold at this moment, by kind: bytes of tensors, counted and not estimated.

Activations are not among them (see `relora plan`), nor what the allocator and the libraries take: the peak of the
process has it all. A gradient counts as large as its parameter, since all of them are there at the end of a backward
pass.
"""

from dataclasses import dataclass

import torch
from torch import nn

from relora.lowrank import low_rank_layers
from relora.lowrank.config import Residual
from relora.train.optim import named_state


@dataclass(frozen=True)
class HeldBytes:
    """Bytes by kind."""

    weights: int
    """All but the factors: as stored, with the copies that products run on and the masters in main memory."""
    factors: int
    gradients: int
    moments: int
    """The optimizer's state."""


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer, residual: Residual) -> HeldBytes:
    """Of a model as it trains now; with a residual, the frozen weights have gradients in the steps that are due."""
    layers = low_rank_layers(model).values()
    factors = sum(factor.nbytes for layer in layers for factor in layer.factors.values())
    masters = sum(layer.base.master.nbytes for layer in layers if layer.base.master is not None)
    moved = sum(layer.weight.nbytes for layer in layers) if residual.scale else 0
    state = named_state(model, optimizer)
    return HeldBytes(
        weights=sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) - factors + masters,
        factors=factors,
        gradients=sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad) + moved,
        # the tables of code values, 2 KB, are one for all parameters
        moments=sum(tensor.nbytes for name, tensor in state.items() if not name.rpartition(":")[2].startswith("qmap")),
    )
