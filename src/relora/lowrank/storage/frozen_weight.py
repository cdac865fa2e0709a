"""Storage of a low-rank layer's frozen weight: the stored form, the copy for coarser products, the fp32 master copy.

A weight in fp32 is exact as it is stored. A weight in bf16, int8 or nf4 is too coarse to merge into: in bf16 an update
below half a unit in the last place is rounded away, and after twenty merges of 0.2% each the error is 62% of their sum.
Such a weight keeps an fp32 master copy in main memory (4 bytes per parameter there, none on the device). A merge adds
to the master, and the stored weight is the master rounded once. Fine-tuning merges once or never, so it can do without
a master: the stored weight is then the exact one, and the first merge creates a master.

Products in an arithmetic that is coarser than the stored weight run on a copy (2 bytes per parameter in bf16, 1 in
int8), which is made again after every merge. The copy is used in training only: evaluation, generation and export use
the most precise weight on the device. Under autocast the copy is autocast's own cast of the weight, kept instead of
made again in every pass: it gives the same bits, so it is used wherever that autocast is on. Products with an nf4
weight dequantize the layer's codes in each call and keep nothing.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from relora.lowrank.kernel import Arithmetic, dense_weight
from relora.lowrank.storage.int8 import quantize_rows
from relora.lowrank.storage.nf4 import BLOCK, quantize_nf4

Storage = Literal["auto", "fp32", "bf16", "int8", "nf4"]
"""Stored form of a frozen weight; `auto` keeps the dtype that the weight has."""
_CHUNK_ROWS = 256
"""Rows that are quantized at a time."""
_DTYPES = {"bf16": torch.bfloat16, "int8": torch.int8, "nf4": torch.uint8}


class FrozenLinear(nn.Linear):
    """Linear layer whose weight is stored by a `FrozenWeight`; declares the two buffers that `FrozenWeight` registers.

    Both are None where they are not needed. Neither is saved, since both are computed from the weight.
    """

    frozen_copy: Tensor | None
    """Copy [out, in] of the weight in bf16 or int8, for products that are coarser than the stored weight."""
    frozen_scale: Tensor | None
    """fp32 scales of the codes: [out, 1] for int8, one per block of 64 for nf4."""


class FrozenWeight:
    """Storage of one layer's frozen `weight`, and the operands of the products with it.

    An nf4 weight is stored as codes [out, in / 2]; every other weight keeps its shape.

    Args:
        layer: the layer whose weight is stored; its weight is frozen and converted in place.
        storage: the stored form.
        arithmetic: arithmetic of the products in training.
        transposed: the weight has the shape [in, out] (GPT-2's `Conv1D`).
        cast: dtype of autocast in training, for a copy that native products under it run on; None: no such copy.
        keep_master: keep the fp32 master of a weight that was rounded to its stored form. Without it, the rounded
            weight counts as the exact one (see `release_master`) until something is added to it.
    """

    def __init__(
        self,
        layer: FrozenLinear,
        storage: Storage,
        arithmetic: Arithmetic,
        transposed: bool,
        *,
        cast: torch.dtype | None = None,
        keep_master: bool = True,
    ) -> None:
        self._layer, self.transposed, self._arithmetic = layer, transposed, arithmetic
        self._keep_master, self._cast = keep_master, cast if arithmetic == "native" else None
        self.master: Tensor | None = None
        """Exact fp32 weight in main memory; None as long as the stored weight itself is exact."""
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
        self._register_buffers()
        self._update_stored()

    def _register_buffers(self) -> None:
        """Register the layer's `frozen_copy` and `frozen_scale`, uninitialised, where the products need them."""
        layer, weight = self._layer, self._layer.weight
        copy = scale = None
        copy_dtype = self._cast if self._arithmetic == "native" else _DTYPES[self._arithmetic]
        if copy_dtype is not None and copy_dtype.itemsize < weight.dtype.itemsize:
            copy = torch.empty_like(self.reorient(weight.data), dtype=copy_dtype)
        if weight.dtype == torch.uint8:
            scale = weight.new_empty(-(-self.shape.numel() // BLOCK), dtype=torch.float32)
        elif torch.int8 in (weight.dtype, copy_dtype):
            scale = weight.new_empty(layer.out_features, 1, dtype=torch.float32)
        layer.register_buffer("frozen_copy", copy, persistent=False)
        layer.register_buffer("frozen_scale", scale, persistent=False)

    @property
    def exact(self) -> Tensor:
        """The exact weight, in its original shape: the master if there is one, else the stored weight.

        Where the stored weight is codes, this is a new fp32 tensor in main memory.
        """
        if self.master is not None:
            return self.master
        return self._layer.weight.data if self._layer.weight.is_floating_point() else self._dequantized()

    @property
    def exact_meta(self) -> Tensor:
        """A tensor on the meta device with the shape and dtype of `exact`."""
        coded = self.master is None and not self._layer.weight.is_floating_point()
        dtype = torch.float32 if coded else self.exact.dtype
        return torch.empty(self.shape, dtype=dtype, device="meta")

    def operand(self, training: bool) -> tuple[Tensor, Tensor | None, Arithmetic]:
        """Return the weight for a product ([out, in], or nf4 codes), its scale if it is codes, and the arithmetic."""
        copy = self._layer.frozen_copy
        if self._cast is not None and copy is not None:
            device = copy.device.type
            usable = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == copy.dtype
        else:
            usable = training
        copy = copy if usable else None
        weight = self._oriented_weight() if copy is None else copy
        scale = None if weight.is_floating_point() else self._layer.frozen_scale
        return weight, scale, self._arithmetic if training else "native"

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return a new tensor [out, in] of `dtype` with the most precise weight on the device."""
        weight, scale, _ = self.operand(training=False)
        return weight.to(dtype, copy=True) if scale is None else dense_weight(weight, scale, dtype)

    @property
    def rows(self) -> int:
        """Number of outputs whose weights this process holds; all of them unless the model is divided."""
        return self._oriented_weight().shape[0]

    def of_rows(self, rows: int) -> torch.Size:
        """Return the shape of the exact weight of so many outputs."""
        return self.reorient(torch.empty(rows, self._layer.in_features, device="meta")).shape

    def reorient(self, matrix: Tensor) -> Tensor:
        """Convert a matrix between the weight's own shape and [out, in]: transpose it if the weight is [in, out]."""
        return matrix.T if self.transposed else matrix

    @torch.no_grad()
    def add_(self, delta: Tensor) -> None:
        """Add `delta`, which has the weight's shape, to the exact weight in fp32 or better; update what is stored."""
        if self.master is None and self._layer.weight.dtype.itemsize < 4:
            # the stored low-precision weight was exact so far; from now on the master is
            self.master = self._in_main_memory(self.exact)
        self.exact.add_(delta.to(self.exact))
        self._update_stored()

    @torch.no_grad()
    def set_(self, exact: Tensor) -> None:
        """Set the exact weight, for example to the one loaded from a checkpoint, and update what is stored."""
        if self.master is None and exact.dtype.itemsize > self._layer.weight.dtype.itemsize:
            precise = torch.promote_types(exact.dtype, torch.float32)
            self.master = torch.empty_like(exact, dtype=precise, device="cpu")
        self.exact.copy_(exact)
        self._update_stored()
        if self.master is not None and not self._keep_master and self._equals_stored(self.master):
            self.master = None  # the saved weight was the stored one, so no master is needed

    def release_master(self) -> None:
        """Drop the master unless `keep_master`; then the stored weight is the exact one until something is added to it.

        Numbers that bf16, int8 or nf4 can represent round to themselves, so a stored weight that is saved and set again
        is unchanged.
        """
        if not self._keep_master:
            self.master = None

    @torch.no_grad()
    def _update_stored(self) -> None:
        """Round the exact weight into the stored weight, the copy for products, and the scales."""
        weight, copy, scale = self._layer.weight, self._layer.frozen_copy, self._layer.frozen_scale
        if scale is not None:
            self._quantize(self._oriented_weight().data if copy is None else copy, scale)
        elif copy is not None:
            copy.copy_(self.reorient(self.exact))
        if self.master is not None and weight.is_floating_point():
            weight.copy_(self.master)

    def _quantize(self, codes: Tensor, scale: Tensor) -> None:
        """Quantize the exact weight into `codes` and `scale`, in chunks of rows: no second copy of it is made."""
        nf4 = codes.dtype == torch.uint8
        quantize = quantize_nf4 if nf4 else quantize_rows
        chunk_scales = _CHUNK_ROWS * self._layer.in_features // BLOCK if nf4 else _CHUNK_ROWS
        chunks = zip(
            torch.split(self.reorient(self.exact), _CHUNK_ROWS),
            torch.split(codes, _CHUNK_ROWS),
            torch.split(scale, chunk_scales),
            strict=True,
        )
        for exact_chunk, codes_chunk, scale_chunk in chunks:
            new_codes, new_scale = quantize(exact_chunk.to(self._layer.weight.device))
            codes_chunk.copy_(new_codes)
            scale_chunk.copy_(new_scale)

    def _oriented_weight(self) -> Tensor:
        """Return the layer's weight as [out, in], or its nf4 codes, which are stored as [out, in / 2] in any case."""
        weight = self._layer.weight
        return weight if weight.dtype == torch.uint8 else self.reorient(weight)

    def _dequantized(self) -> Tensor:
        """Return the numbers that the stored weight represents, in the weight's shape, fp32, in main memory."""
        return self._in_main_memory(self.reorient(self.dense(torch.float32)), copy=False)

    def _equals_stored(self, exact: Tensor) -> bool:
        return torch.equal(self._dequantized().to(exact), exact)

    @staticmethod
    def _in_main_memory(weight: Tensor, *, copy: bool = True) -> Tensor:
        """Return the weight in fp32 on the CPU, or on the meta device if it is there."""
        return weight.to(weight.device if weight.is_meta else "cpu", torch.float32, copy=copy)
