"""How the frozen weight of a low-rank layer is stored, what its products run on, and the copy that merges go into.

A weight in fp32 is its own exact copy. A weight in bf16, int8 or nf4 is too coarse to merge into: in bf16 an update
below half a unit in the last place is rounded away, and twenty merges of 0.2% each arrive with an error of 62%. Such a
weight keeps an fp32 master in main memory (4 bytes a parameter there, none on the device); a merge adds to the master,
and the weight is the master, rounded once. Fine-tuning merges once or never: without a master, what is stored is the
exact weight, and the first merge makes one.

Products in coarser arithmetic than the weight's run on a copy (2 bytes a parameter in bf16, 1 in int8), made anew after
every merge. It serves training only: what is measured, generated and exported comes from the finest weight there is on
the device. Products with nf4 turn a layer's codes into numbers as they go, and keep none.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from relora.lowrank.kernel import Arithmetic, as_numbers
from relora.lowrank.storage.int8 import quantize_rows
from relora.lowrank.storage.nf4 import BLOCK, quantize_nf4

Storage = Literal["auto", "fp32", "bf16", "int8", "nf4"]
_ROWS = 256
_DTYPES = {"bf16": torch.bfloat16, "int8": torch.int8, "nf4": torch.uint8}


class Layer(nn.Linear):
    """What a `FrozenWeight` belongs to."""

    frozen_copy: Tensor | None
    frozen_scale: Tensor | None


class FrozenWeight:
    """Storage of one layer's frozen `weight`, and what its products run on.

    The layer gets two buffers, neither saved: `frozen_copy` [out, in] for products coarser than the weight, and
    `frozen_scale`, [out, 1] of int8 codes or one number a block of nf4's. nf4 codes are [out, in / 2]. `master` is None
    as long as the weight itself is exact; without `keep_master`, also while nothing was merged (see `settle`).
    """

    def __init__(
        self, layer: Layer, storage: Storage, arithmetic: Arithmetic, transposed: bool, *, keep_master: bool = True
    ) -> None:
        self._layer, self._transposed, self._arithmetic = layer, transposed, arithmetic
        self._keep_master = keep_master
        self.master: Tensor | None = None
        weight = layer.weight
        self.shape = weight.shape
        weight.requires_grad_(False)
        weight.grad = None
        if storage == "fp32":
            weight.data = weight.data.float()
        elif storage != "auto" and weight.dtype != _DTYPES[storage]:
            self.master = self._in_main_memory(weight.detach())
            if storage == "nf4":
                weight.data = weight.data.new_empty(layer.out_features, layer.in_features // 2, dtype=torch.uint8)
            else:
                weight.data = torch.empty_like(weight.data, dtype=_DTYPES[storage])
        copy_dtype = None if arithmetic == "native" else _DTYPES[arithmetic]
        copied = copy_dtype is not None and copy_dtype.itemsize < weight.dtype.itemsize
        copy = torch.empty_like(self.rows(weight.data), dtype=copy_dtype) if copied else None
        scale = None
        if weight.dtype == torch.uint8:
            scale = weight.new_empty(-(-self.shape.numel() // BLOCK), dtype=torch.float32)
        elif torch.int8 in (weight.dtype, copy_dtype):
            scale = weight.new_empty(layer.out_features, 1, dtype=torch.float32)
        layer.register_buffer("frozen_copy", copy, persistent=False)
        layer.register_buffer("frozen_scale", scale, persistent=False)
        self._renew()

    @property
    def exact(self) -> Tensor:
        """The weight without rounding: the master where there is one, else what is stored."""
        if self.master is not None:
            return self.master
        return self._layer.weight.data if self._layer.weight.is_floating_point() else self._stored()

    @property
    def outline(self) -> Tensor:
        """Shape and dtype of `exact`, without its numbers."""
        coded = self.master is None and not self._layer.weight.is_floating_point()
        dtype = torch.float32 if coded else self.exact.dtype
        return torch.empty(self.shape, dtype=dtype, device="meta")

    def operand(self, training: bool) -> tuple[Tensor, Tensor | None, Arithmetic]:
        """The weight for a product ([out, in], or nf4 codes), its scale if it is codes, and the arithmetic to use."""
        copy = self._layer.frozen_copy if training else None
        weight = self._coded_rows() if copy is None else copy
        scale = None if weight.is_floating_point() else self._layer.frozen_scale
        return weight, scale, self._arithmetic if training else "native"

    def dense(self, dtype: torch.dtype) -> Tensor:
        """A new tensor [out, in] of `dtype`: the finest weight on the device."""
        weight, scale, _ = self.operand(training=False)
        return weight.to(dtype, copy=True) if scale is None else as_numbers(weight, scale, dtype)

    def rows(self, weight: Tensor) -> Tensor:
        """What has the weight's shape as [out, in], and back."""
        return weight.T if self._transposed else weight

    @torch.no_grad()
    def add_(self, delta: Tensor) -> None:
        """weight += delta, accumulated in fp32 or better; `delta` has the weight's shape."""
        if self.master is None and self._layer.weight.dtype.itemsize < 4:
            # a weight that is stored in few bits is exact until something is added to it
            self.master = self._in_main_memory(self.exact)
        self.exact.add_(delta.to(self.exact))
        self._renew()

    @torch.no_grad()
    def set_(self, exact: Tensor) -> None:
        """Take over an exact weight, as loaded from a checkpoint."""
        if self.master is None and exact.dtype.itemsize > self._layer.weight.dtype.itemsize:
            precise = torch.promote_types(exact.dtype, torch.float32)
            self.master = torch.empty_like(exact, dtype=precise, device="cpu")
        self.exact.copy_(exact)
        self._renew()
        if self.master is not None and not self._keep_master and self._is_stored(self.master):
            self.master = None  # what was saved is what is stored

    def settle(self) -> None:
        """Without `keep_master`: what is stored is the exact weight from now on, until something is merged.

        Rounded numbers round to themselves (bf16's, and those that int8 and nf4 codes stand for), so what is saved of
        them and set again is what is stored.
        """
        if not self._keep_master:
            self.master = None

    @torch.no_grad()
    def _renew(self) -> None:
        """Round the exact weight to what is stored and multiplied."""
        weight, copy, scale = self._layer.weight, self._layer.frozen_copy, self._layer.frozen_scale
        if scale is not None:
            codes = self._coded_rows().data if copy is None else copy
            nf4 = codes.dtype == torch.uint8
            scales_in_part = _ROWS * self._layer.in_features // BLOCK if nf4 else _ROWS
            quantize = quantize_nf4 if nf4 else quantize_rows
            whole = ((self.rows(self.exact), _ROWS), (codes, _ROWS), (scale, scales_in_part))
            parts = (torch.split(tensor, size) for tensor, size in whole)
            for exact, part, part_scale in zip(*parts, strict=True):  # in parts: no second copy of the weight
                for place, new in zip((part, part_scale), quantize(exact.to(weight.device)), strict=True):
                    place.copy_(new)
        elif copy is not None:
            copy.copy_(self.rows(self.exact))
        if self.master is not None and weight.is_floating_point():
            weight.copy_(self.master)

    def _coded_rows(self) -> Tensor:
        """The layer's weight as [out, in]; of nf4 the codes as they are."""
        weight = self._layer.weight
        return weight if weight.dtype == torch.uint8 else self.rows(weight)

    def _stored(self) -> Tensor:
        """The numbers that are stored, in the weight's shape, in fp32 and in main memory."""
        return self._in_main_memory(self.rows(self.dense(torch.float32)), copy=False)

    def _is_stored(self, exact: Tensor) -> bool:
        return torch.equal(self._stored().to(exact), exact)

    @staticmethod
    def _in_main_memory(weight: Tensor, *, copy: bool = True) -> Tensor:
        return weight.to(weight.device if weight.is_meta else "cpu", torch.float32, copy=copy)
