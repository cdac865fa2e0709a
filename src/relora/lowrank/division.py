"""A model divided among processes: each holds some rows of every parameter, as a plain tensor.

    rows of process k of n:  [k·c, (k + 1)·c),  c = rows / n rounded up       (the rule of `torch.chunk`, and of FSDP2)

A restart needs little more than these rows: W's own rows take up s·B A, of which B has the same rows, so only the
factors, r·(in + out) numbers of one layer at a time, are brought together (`whole_factors`). `lora_A` is divided by its
r rows, everything else of a layer by its outputs, so the own rows of W, B, the bias, DoRA's magnitude, the codes and
their scales belong together. How processes exchange tensors is handed in; nothing here knows of a process group.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from relora.lowrank.linear import LowRankLinear


class Part(NamedTuple):
    """Dimension by which a parameter is divided, and the size of the whole parameter in it."""

    dim: int
    size: int


@dataclass(frozen=True)
class Division:
    """Division of a model's parameters among processes, and the two exchanges that the method needs."""

    rank: int
    """Number of this process among those that together hold one copy of the model."""
    count: int
    """Number of these processes."""
    gather: Callable[[Tensor, Part], Tensor]
    """Bring together a tensor of which every process has its own part; every process gets the whole."""
    sum_: Callable[[Tensor], Tensor]
    """Add up a tensor over the processes, in place, and return it."""

    def own(self, size: int) -> slice:
        """Return the range that this process holds of `size` rows; it may be empty."""
        chunk = math.ceil(size / self.count)
        return slice(min(self.rank * chunk, size), min((self.rank + 1) * chunk, size))

    def own_part(self, whole: Tensor, part: Part) -> Tensor:
        """Return a contiguous copy of this process's part of a whole tensor."""
        own = self.own(part.size)
        return whole.narrow(part.dim, own.start, own.stop - own.start).clone(memory_format=torch.contiguous_format)

    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum of all entries over all processes, a scalar."""
        return self.sum_(tensor.sum())

    def norm(self, tensor: Tensor) -> float:
        """Return the Frobenius norm of the whole tensor of which each process has a part."""
        return math.sqrt(self.sum_(torch.linalg.vector_norm(tensor, dtype=torch.float64).square()).item())


def part_of(parameter: Tensor) -> Part | None:
    """Return how a parameter is divided; None if this process holds it whole."""
    part: Part | None = getattr(parameter, "part", None)
    return part


def whole_shape(parameter: Tensor) -> torch.Size:
    """Return the shape of the whole parameter, of which this process may hold some rows only."""
    part, shape = part_of(parameter), list(parameter.shape)
    if part is not None:
        shape[part.dim] = part.size
    return torch.Size(shape)


def whole_tensor(parameter: Tensor, division: Division | None) -> Tensor:
    """Return the numbers of a whole parameter; if it is divided, as a new tensor that was brought together."""
    part = part_of(parameter)
    return parameter if part is None or division is None else division.gather(parameter.detach(), part)


def divide_(parameter: nn.Parameter, division: Division, dim: int = 0) -> None:
    """Keep this process's part of a whole parameter and free the rest; a scalar stays whole."""
    if parameter.ndim:
        part = Part(dim, parameter.shape[dim])
        parameter.data = division.own_part(parameter.data, part)
        parameter.part = part  # type: ignore[attr-defined]


def gather_(parameter: nn.Parameter, division: Division) -> None:
    """Bring a divided parameter together on every process."""
    part = part_of(parameter)
    if part is not None:
        parameter.data = division.gather(parameter.data, part)
        del parameter.part  # type: ignore[attr-defined]


def divide_layer_(layer: "LowRankLinear", division: Division) -> None:
    """Keep this process's rows of a whole low-rank layer: of its weight, in every form that is stored, and its factors.

    The bias, which is not the layer's alone, is divided by whoever divides the model.
    """
    base, weight = layer.base, layer.weight
    assert isinstance(weight, nn.Parameter)
    dim = 1 if base.transposed and weight.is_floating_point() else 0
    if base.master is not None:
        base.master = division.own_part(base.master, Part(int(base.transposed), layer.out_features))
    for name in layer.divided_buffers:
        buffer = getattr(layer, name)
        if buffer is not None:
            rows = buffer.view(layer.out_features, -1)  # scales of nf4 are one per block of 64, row after row
            own = division.own_part(rows, Part(0, layer.out_features))
            setattr(layer, name, own if buffer.ndim == 2 else own.flatten())
    divide_(weight, division, dim)
    base.shape = layer.base.of_rows(weight.shape[dim])
    for factor in layer.factors.values():
        divide_(factor, division)
    layer.division = division


@contextmanager
def whole_factors(layer: "LowRankLinear", optimizer: torch.optim.Optimizer | None = None) -> Iterator[None]:
    """Bring `lora_A` and `lora_B` of a layer together inside the block, with their optimizer state.

    Afterwards this process has its rows of what they have become. W, and all that goes by its rows, stays divided. A
    layer that is not divided stays as it is.
    """
    division = layer.division
    if division is None:
        yield
        return
    own_tensors = {}
    for factor in (layer.lora_A, layer.lora_B):
        own_tensors[factor], part = factor.data, part_of(factor)
        assert part is not None
        state = optimizer.state.get(factor, {}) if optimizer is not None else {}
        for key, value in list(state.items()):
            if isinstance(value, Tensor) and value.shape == factor.shape:
                state[key] = division.gather(value, part)
        factor.data = division.gather(factor.data, part)
    try:
        yield
    finally:
        for factor, own in own_tensors.items():
            part, whole = part_of(factor), factor.data
            assert part is not None
            state = optimizer.state.get(factor, {}) if optimizer is not None and factor in optimizer.state else {}
            for key, value in list(state.items()):
                if isinstance(value, Tensor) and value.shape == whole.shape:
                    state[key] = division.own_part(value, part)
            factor.data = own.copy_(division.own_part(whole, part))
