"""A low-rank layer of which each process holds some rows.

`lora_A` [r, in] is divided by its r rows and everything else by the layer's outputs, so that the own rows of W, B, the
bias, DoRA's magnitude, the codes of W and their scales belong together. A restart needs little more than these rows:

    W_own <- W_own + s·B_own A

Only the factors are brought together for it, r·(in + out) numbers of one layer at a time, with their moments. All
processes then compute the same new factors from the same numbers, as one process would, and keep their own rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from relora.errors import UserError
from relora.lowrank.division import Division, Part, divide_, part_of
from relora.lowrank.linear import LowRankLinear
from relora.lowrank.storage.frozen_weight import FrozenWeight
from relora.lowrank.storage.nf4 import BLOCK


def divide_layer_(layer: LowRankLinear, division: Division) -> None:
    """Keep this process's rows of a whole low-rank layer: of its weight, in every form that is stored, and its factors.

    The bias, which is not the layer's alone, is divided by whoever divides the model.
    """
    base, weight = layer.base, layer.weight
    assert isinstance(weight, nn.Parameter)
    dim = 1 if base.transposed and weight.is_floating_point() else 0
    if base.master is not None:
        base.master = Part(division, int(base.transposed), layer.out_features).own(base.master)
    for name in layer.divided_buffers:
        buffer = getattr(layer, name)
        if buffer is not None and buffer.ndim == 2:
            setattr(layer, name, Part(division, 0, layer.out_features).own(buffer))
        elif buffer is not None:  # scales of nf4
            own = division.own(layer.out_features)
            setattr(layer, name, buffer[_blocks(layer, own.start) : _blocks(layer, own.stop)].clone())
    divide_(weight, division, dim)
    base.shape = layer.base.of_rows(weight.shape[dim])
    for factor in layer.factors.values():
        divide_(factor, division)
    layer.division = division


def check_divisible(layer_name: str, out_features: int, in_features: int, count: int) -> None:
    """Raise `UserError` if the nf4 codes of a layer cannot be divided, because blocks would lie in two parts.

    Args:
        count: number of processes that the layer is divided among.
    """
    if in_features % BLOCK and (out_features % count or out_features // count * in_features % BLOCK):
        raise UserError(
            f"lowrank.base: nf4 codes of {layer_name} [{out_features}, {in_features}] cannot be divided among {count} "
            f"processes, since {BLOCK} of them share a scale; choose int8, or distributed.strategy: replicate"
        )


def _blocks(layer: LowRankLinear, rows: int) -> int:
    """Return the number of nf4 blocks in so many rows of a layer."""
    return -(-rows * layer.in_features // BLOCK)


def gathered_storage(layer: LowRankLinear) -> Iterator[tuple[FrozenWeight | LowRankLinear, str, Tensor]]:
    """Bring together, one after the other, what a divided layer stores beside its parameters.

    Yields:
        Who has it, the name of the attribute, and the whole: the master of the weight, and the buffers of the layer.
    """
    division = layer.division
    if division is None:
        return
    if layer.base.master is not None:
        yield layer.base, "master", division.gather(layer.base.master, int(layer.base.transposed), layer.out_features)
    for name in layer.divided_buffers:
        if (buffer := getattr(layer, name)) is not None:
            rows = layer.out_features if buffer.ndim == 2 else _blocks(layer, layer.out_features)
            yield layer, name, division.gather(buffer, 0, rows)


@contextmanager
def whole_factors(layer: LowRankLinear, optimizer: torch.optim.Optimizer | None = None) -> Iterator[None]:
    """Bring `lora_A` and `lora_B` of a layer together inside the block, with their optimizer state.

    Afterwards this process has its rows of what they have become. W, and all that goes by its rows, stays divided. A
    layer that is not divided stays as it is.
    """
    if layer.division is None:
        yield
        return
    own_tensors = {}
    for factor in (layer.lora_A, layer.lora_B):
        own_tensors[factor], part = factor.data, part_of(factor)
        assert part is not None
        state = optimizer.state.get(factor, {}) if optimizer is not None else {}
        for key, value in list(state.items()):
            if isinstance(value, Tensor) and value.shape == factor.shape:
                state[key] = part.gathered(value)
        factor.data = part.gathered(factor.data)
    try:
        yield
    finally:
        for factor, own in own_tensors.items():
            part, whole = part_of(factor), factor.data
            assert part is not None
            state = optimizer.state.get(factor, {}) if optimizer is not None and factor in optimizer.state else {}
            for key, value in list(state.items()):
                if isinstance(value, Tensor) and value.shape == whole.shape:
                    state[key] = part.own(value)
            factor.data = own.copy_(part.own(whole))
