"""How the frozen weight of a low-rank layer is stored, and the exact copy that merges go into.

A weight in fp32 is its own exact copy. A weight in bf16 is too coarse to merge into: an update below half a unit in the
last place is rounded away, and twenty merges of 0.2% each arrive with an error of 62%. Such a weight keeps an fp32
master in main memory (4 bytes a parameter there, none on the device); a merge adds to the master, and the weight is the
master, rounded.
"""

from typing import Literal

import torch
from torch import Tensor, nn

Storage = Literal["auto", "fp32", "bf16"]


class FrozenWeight:
    """The storage of one frozen `weight` parameter. `master` is None as long as the weight itself is exact."""

    def __init__(self, weight: nn.Parameter, storage: Storage) -> None:
        self.weight = weight
        self.master: Tensor | None = None
        weight.requires_grad_(False)
        weight.grad = None
        if storage == "fp32":
            weight.data = weight.data.float()
        elif storage == "bf16" and weight.dtype != torch.bfloat16:
            self.master = weight.detach().to("cpu", torch.float32)
            weight.data = weight.data.bfloat16()

    @property
    def exact(self) -> Tensor:
        """The weight without rounding: the master where there is one."""
        return self.weight.data if self.master is None else self.master

    @torch.no_grad()
    def add_(self, delta: Tensor) -> None:
        """weight += delta, accumulated in fp32 or better; `delta` has the weight's shape."""
        if self.master is None and self.weight.dtype.itemsize >= 4:
            self.weight.add_(delta)
            return
        if self.master is None:  # a weight that came in half precision: exact until something is added to it
            self.master = self.weight.detach().to("cpu", torch.float32)
        self.master.add_(delta.to("cpu", torch.float32))
        self.weight.copy_(self.master)

    @torch.no_grad()
    def set_(self, exact: Tensor) -> None:
        """Take over an exact weight, as loaded from a checkpoint."""
        if self.master is None and exact.dtype.itemsize > self.weight.dtype.itemsize:
            self.master = torch.empty_like(exact, device="cpu")
        if self.master is not None:
            self.master.copy_(exact)
        self.weight.copy_(exact)
