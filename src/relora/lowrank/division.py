"""A model divided among processes: each holds some rows of every parameter, as a plain tensor.

    rows of process k of n:  [k·c, (k + 1)·c),  c = rows / n rounded up       (the rule of `torch.chunk`, and of FSDP2)

How processes exchange tensors is handed in; nothing here knows of a process group. What a low-rank layer does with its
rows is in `divided_layer`.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Division:
    """Division of a model's parameters among processes, and the two exchanges that the method needs."""

    rank: int
    """Number of this process among those that together hold one copy of the model."""
    count: int
    """Number of these processes."""
    gather: Callable[[Tensor, int, int], Tensor]
    """Bring a tensor together whose dimension (the second argument), of a size (the third), is divided."""
    sum_: Callable[[Tensor], Tensor]
    """Add up a tensor over the processes, in place, and return it."""
    passes: Callable[[], AbstractContextManager[None]]
    """Context in which the model can run forward and backward."""

    def own(self, size: int) -> slice:
        """Return the range that this process holds of `size` rows; it may be empty."""
        chunk = math.ceil(size / self.count)
        return slice(min(self.rank * chunk, size), min((self.rank + 1) * chunk, size))

    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum of all entries over all processes, a scalar."""
        return self.sum_(tensor.sum())

    def norm(self, tensor: Tensor) -> float:
        """Return the Frobenius norm of the whole tensor of which each process has a part."""
        return math.sqrt(self.sum_(torch.linalg.vector_norm(tensor, dtype=torch.float64).square()).item())


@dataclass(frozen=True)
class Part:
    """How one parameter is divided."""

    division: Division
    dim: int
    """Dimension that is divided."""
    size: int
    """Size of the whole parameter in it."""

    def gathered(self, own: Tensor) -> Tensor:
        """Return the whole of a tensor that is divided like the parameter."""
        return self.division.gather(own, self.dim, self.size)

    def own(self, whole: Tensor) -> Tensor:
        """Return a contiguous copy of this process's part of a whole tensor."""
        own = self.division.own(self.size)
        rows = whole.narrow(self.dim, own.start, own.stop - own.start)
        return rows.clone(memory_format=torch.contiguous_format)


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


def division_of(model: nn.Module) -> Division | None:
    """Return how a model is divided; None if this process holds it whole."""
    parts = (part_of(parameter) for parameter in model.parameters())
    return next((part.division for part in parts if part is not None), None)


def whole_tensor(parameter: Tensor) -> Tensor:
    """Return the numbers of a whole parameter; if it is divided, as a new tensor that was brought together."""
    part = part_of(parameter)
    return parameter if part is None else part.gathered(parameter.detach())


def divide_(parameter: nn.Parameter, division: Division, dim: int = 0) -> None:
    """Keep this process's part of a whole parameter and free the rest; a scalar stays whole."""
    if parameter.ndim:
        part = Part(division, dim, parameter.shape[dim])
        parameter.data = part.own(parameter.data)
        parameter.part = part  # type: ignore[attr-defined]


def gather_(parameter: nn.Parameter) -> Division | None:
    """Bring a parameter together on every process; return how it was divided, None if it was whole."""
    part = part_of(parameter)
    if part is None:
        return None
    parameter.data = part.gathered(parameter.data)
    del parameter.part  # type: ignore[attr-defined]
    return part.division
