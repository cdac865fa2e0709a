"""How the frozen weight of a low-rank layer is stored, what its products run on, and the copy that merges go into.

A weight in fp32 is its own exact copy. A weight in bf16 or int8 is too coarse to merge into: in bf16 an update below
half a unit in the last place is rounded away, and twenty merges of 0.2% each arrive with an error of 62%. Such a weight
keeps an fp32 master in main memory (4 bytes a parameter there, none on the device); a merge adds to the master, and the
weight is the master, rounded once.

Products in coarser arithmetic than the weight's run on a copy (2 bytes a parameter in bf16, 1 in int8), made anew after
every merge. It serves training only: what is measured, generated and exported comes from the finest weight there is on
the device.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from relora.lowrank.int8 import quantize_rows
from relora.lowrank.kernel import Arithmetic

Storage = Literal["auto", "fp32", "bf16", "int8"]
_ROWS = 256
_DTYPES = {"bf16": torch.bfloat16, "int8": torch.int8}


class Layer(nn.Linear):
    """What a `FrozenWeight` belongs to."""

    frozen_copy: Tensor | None
    frozen_scale: Tensor | None


class FrozenWeight:
    """Storage of one layer's frozen `weight`, and what its products run on.

    The layer gets two buffers, neither saved: `frozen_copy` [out, in] for products coarser than the weight, and
    `frozen_scale` [out, 1] of int8 codes. `master` is None as long as the weight itself is exact.
    """

    def __init__(self, layer: Layer, storage: Storage, arithmetic: Arithmetic, transposed: bool) -> None:
        self._layer, self._transposed, self._arithmetic = layer, transposed, arithmetic
        self.master: Tensor | None = None
        weight = layer.weight
        weight.requires_grad_(False)
        weight.grad = None
        if storage == "fp32":
            weight.data = weight.data.float()
        elif storage != "auto" and weight.dtype != _DTYPES[storage]:
            self.master = self._in_main_memory(weight.detach())
            weight.data = torch.empty_like(weight.data, dtype=_DTYPES[storage])
        copy_dtype = None if arithmetic == "native" else _DTYPES[arithmetic]
        copied = copy_dtype is not None and copy_dtype.itemsize < weight.dtype.itemsize
        copy = torch.empty_like(self._rows(weight.data), dtype=copy_dtype) if copied else None
        coded = torch.int8 in (weight.dtype, copy_dtype)
        scale = weight.new_empty(layer.out_features, 1, dtype=torch.float32) if coded else None
        layer.register_buffer("frozen_copy", copy, persistent=False)
        layer.register_buffer("frozen_scale", scale, persistent=False)
        self._renew()

    @property
    def exact(self) -> Tensor:
        """The weight without rounding: the master where there is one."""
        return self._layer.weight.data if self.master is None else self.master

    def operand(self, training: bool) -> tuple[Tensor, Tensor | None, Arithmetic]:
        """The weight [out, in] for a product, its scale [out, 1] if it is int8 codes, and the arithmetic to use."""
        copy = self._layer.frozen_copy if training else None
        weight = self._rows(self._layer.weight) if copy is None else copy
        scale = self._layer.frozen_scale if weight.dtype == torch.int8 else None
        return weight, scale, self._arithmetic if training else "native"

    @torch.no_grad()
    def add_(self, delta: Tensor) -> None:
        """weight += delta, accumulated in fp32 or better; `delta` has the weight's shape."""
        if self.master is None and self._layer.weight.dtype.itemsize < 4:
            # a weight that came in half precision is exact until something is added to it
            self.master = self._in_main_memory(self._layer.weight.detach())
        self.exact.add_(delta.to(self.exact))
        self._renew()

    @torch.no_grad()
    def set_(self, exact: Tensor) -> None:
        """Take over an exact weight, as loaded from a checkpoint."""
        if self.master is None and exact.dtype.itemsize > self._layer.weight.dtype.itemsize:
            self.master = torch.empty_like(exact, device="cpu")
        self.exact.copy_(exact)
        self._renew()

    @torch.no_grad()
    def _renew(self) -> None:
        """Round the exact weight to what is stored and multiplied."""
        weight, copy, scale = self._layer.weight, self._layer.frozen_copy, self._layer.frozen_scale
        if scale is not None:
            codes = self._rows(weight.data) if copy is None else copy
            parts = (torch.split(rows, _ROWS) for rows in (self._rows(self.exact), codes, scale))
            for exact, part, part_scale in zip(*parts, strict=True):  # in parts: no second copy of the weight
                for place, new in zip((part, part_scale), quantize_rows(exact.to(weight.device)), strict=True):
                    place.copy_(new)
        elif copy is not None:
            copy.copy_(self._rows(self.exact))
        if self.master is not None and weight.dtype != torch.int8:
            weight.copy_(self.master)

    def _rows(self, weight: Tensor) -> Tensor:
        """As [out, in]."""
        return weight.T if self._transposed else weight

    @staticmethod
    def _in_main_memory(weight: Tensor) -> Tensor:
        return weight.to(weight.device if weight.is_meta else "cpu", torch.float32, copy=True)
