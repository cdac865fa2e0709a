"""The gradients of a sharded model: FSDP2 adds each block's up over all processes and leaves each its own rows.

Everything is added up once for each micro-batch, while the backward pass goes on, so no process ever holds a whole
gradient. All processes must take the same number of passes; one that has fewer micro-batches repeats its last one
without a label, whose gradient is zero.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from relora.distributed.group import Group
from relora.distributed.reduce import Reduction, Share, losses_of_all
from relora.distributed.sharding import ShardedModel


class ShardedReduction(Reduction):
    """Sums of the gradients of a sharded model."""

    adds_rows_in_place = False

    def __init__(self, group: Group, sharded: ShardedModel) -> None:
        super().__init__(group)
        self._sharded = sharded
        self._shares: Sequence[Share] = ()

    def passes(self, shares: Sequence[Share]) -> int:
        counts = [0] * self.group.world
        for share in shares:
            counts[share.rank] += 1
        return max(counts)

    @contextmanager
    def step(self, parameters: Sequence[nn.Parameter], shares: Sequence[Share]) -> Iterator[None]:
        self._shares = shares
        with self.group.guarded("a pass through the sharded model"), self._sharded.passes():
            yield
        for parameter in parameters:
            if not parameter.ndim:  # FSDP2 leaves scalars alone
                parameter.grad = self.group.sum_(
                    torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                )

    def finish(self, micro_losses: list[Tensor]) -> Tensor:
        started = time.perf_counter()
        losses = losses_of_all(self.group, micro_losses, self._shares)
        self.waited_seconds += time.perf_counter() - started
        return losses

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """Return the norm of the whole gradient; scalars, which all processes have, count once."""
        device = self._sharded.device
        squares = torch.zeros(2, dtype=torch.float64, device=device)
        for gradient in gradients:
            squares[int(gradient.ndim > 0)] += torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
        return (squares[0] + self._sharded.division.sum_(squares[1])).sqrt().float()
