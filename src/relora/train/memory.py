"""Memory of a model and its optimizer by kind: bytes of the tensors that exist, counted and not estimated.

Activations are not counted (see `relora plan`), nor the memory of the allocator and the libraries; the peak memory of
the process includes both. A gradient is counted with the size of its parameter, whether it exists at the moment or
not, since all gradients exist at the end of a backward pass.
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
    """All parameters and buffers except the factors, as stored, with the copies that matrix products run on and the
    master copies in main memory."""
    factors: int
    """Everything that low-rank layers train: lora_A, lora_B and, where there are such, magnitudes and scales."""
    gradients: int
    """Gradients of all that trains: factors and parameters that train in full; with a residual, frozen weights, too."""
    moments: int
    """All tensors of the optimizer's state, but for the small tables of 8-bit codes that all parameters share."""


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer, residual: Residual) -> HeldBytes:
    """Count the bytes of a model as it trains now.

    With a residual the frozen weights of the layers count among the gradients, since they have one in some steps.
    """
    layers = low_rank_layers(model).values()
    factor_bytes = sum(factor.nbytes for layer in layers for factor in layer.factors.values())
    master_bytes = sum(layer.base.master.nbytes for layer in layers if layer.base.master is not None)
    residual_bytes = sum(layer.weight.nbytes for layer in layers) if residual.scale else 0
    trained_bytes = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    all_bytes = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    state = named_state(model, optimizer)
    return HeldBytes(
        weights=all_bytes - factor_bytes + master_bytes,
        factors=factor_bytes,
        gradients=trained_bytes + residual_bytes,
        # the tables of code values (qmap, 2 KB) are left out: all parameters share one
        moments=sum(tensor.nbytes for name, tensor in state.items() if not name.rpartition(":")[2].startswith("qmap")),
    )
