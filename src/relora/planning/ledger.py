"""Count of the bytes that tensors would take while code runs without their memory, and of the seconds it would take.

Inside a `FakeTensorMode` every operation is dispatched as on the real device, attention kernels and autograd included,
but a tensor is only a shape and a dtype. The ledger sees each storage come and go, sums the bytes in use by kind, and
keeps the sums of the moment at which they were largest. So tensors that autograd saves, that an operation creates on
the way, and that custom backward passes create and free are all counted, whatever the model and the loss.

The seconds of an operation follow from measured rates: of a product from its shape and dtype, of anything else from the
bytes that it reads and writes.

Not counted: memory that a kernel takes by itself while it runs (a few MB), and the loss of the allocator.
"""

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from relora.lowrank.costs import Rates
from relora.lowrank.usage import stand_in

HEAP_BLOCK = 32 * 2**20
"""Smallest block that glibc's allocator requests from the system alone, and returns to it when it is freed."""

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm: 0, _aten.addmm: 1, _aten.addmm_: 1, _aten.bmm: 0, _aten.baddbmm: 1, _aten._int_mm: 0}
"""Matrix product -> position of its left matrix among the arguments; the right one follows."""
_ATTENTION = {"_scaled_dot_product": 4, "_flash_attention": 4, "_efficient_attention": 4}
"""Beginning of an attention kernel's name -> operations per query, key and channel; a backward pass has 2.5 times."""


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts bytes and seconds of the operations inside its `with` block.

    Args:
        device: the device whose memory is counted in `live` and `peak`; other memory is counted in `elsewhere`.
        rates: measured rates of the device.
        fake: whether the tensors have no numbers, so that some results must be chosen (see `stand_in`).
    """

    def __init__(self, device: torch.device, rates: Rates, *, fake: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kind = "other"
        """Kind under which new storages are counted; set it before the code that creates them."""
        self.live: Counter[str] = Counter()
        """Bytes in use by kind, now."""
        self.peak: Counter[str] = Counter()
        """Bytes in use by kind, at the moment at which their sum was largest."""
        self.elsewhere: Counter[str] = Counter()
        """Bytes in use by kind, now, in main memory if `device` has memory of its own."""
        self.heap_peak = self.mapped_peak = 0
        """Largest number of bytes in use in blocks of the allocator's heap, and in blocks requested alone."""
        self.seconds = 0.0
        """Predicted time of the operations so far."""
        self._device, self._rates, self._fake = device, rates, fake
        self._storages: dict[int, tuple[str, int, Counter[str], weakref.ref[Any]]] = {}
        """Address of a storage -> kind, bytes, counter, and a reference that sees the storage freed."""
        self._heap = self._mapped = 0
        """Bytes in use now in blocks of the heap, and in blocks requested alone."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        chosen: tuple[Any] | None = None
        if self._fake or function is _aten._local_scalar_dense.default:  # one way through the loss, with numbers or not
            args, chosen = stand_in(function, args)
        results = function(*args, **(kwargs or {})) if chosen is None else chosen[0]
        made = [self.note(leaf) for leaf in tree_leaves(results) if isinstance(leaf, Tensor)]
        self.seconds += self._seconds(function, args, results, computes=any(made) or _writes(function))
        return results

    def note(self, tensor: Tensor) -> bool:
        """Count the tensor's storage if it is new, and return whether it is."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return False
        account = self.live if tensor.device.type == self._device.type else self.elsewhere
        self._storages[key] = (self.kind, size, account, weakref.ref(storage, lambda _: self._freed(key)))
        self._add(account, self.kind, size, size)
        if self.live.total() > self.peak.total():
            self.peak = self.live.copy()
        self.heap_peak, self.mapped_peak = max(self.heap_peak, self._heap), max(self.mapped_peak, self._mapped)
        return True

    def relabel(self, tensor: Tensor, kind: str) -> None:
        """Count the tensor's storage under another kind from now on."""
        key = tensor.untyped_storage()._cdata
        if key not in self._storages:
            self.note(tensor)
        old, size, account, reference = self._storages[key]
        self._storages[key] = (kind, size, account, reference)
        account[old] -= size
        account[kind] += size

    def forget_peak(self) -> None:
        """Set the peaks to what is in use now, and the seconds to 0."""
        self.peak, self.seconds = self.live.copy(), 0.0
        self.heap_peak, self.mapped_peak = self._heap, self._mapped

    def _freed(self, key: int) -> None:
        """Stop counting a storage that was freed."""
        kind, size, account, _ = self._storages.pop(key)
        self._add(account, kind, -size, size)

    def _add(self, account: Counter[str], kind: str, change: int, block: int) -> None:
        """Add bytes (negative to subtract) to a counter, and to heap or mapped blocks by the size of their block."""
        account[kind] += change
        if account is self.live and block < HEAP_BLOCK:
            self._heap += change
        elif account is self.live:
            self._mapped += change

    def _seconds(self, function: Any, args: tuple[Any, ...], results: Any, computes: bool) -> float:
        """Return the predicted time of an operation.

        Args:
            computes: False for a view, which only gives a tensor another shape and takes no time.
        """
        packet = function.overloadpacket
        if packet is _aten._grouped_mm:
            left, right = args[0], args[1]  # the rows of all groups together are those of one side
            return self._product(left.dtype, left.shape[-2], left.shape[-1], right.shape[-1])
        if packet in _PRODUCTS:
            left, right = args[_PRODUCTS[packet]], args[_PRODUCTS[packet] + 1]
            return self._product(left.dtype, left.shape[:-1].numel(), left.shape[-1], right.shape[-1])
        name = packet.__name__
        for start, operations in _ATTENTION.items():
            if name.startswith(start):
                if "backward" in name:  # its first argument is the gradient of the output
                    query, key, factor = args[1], args[2], 2.5
                else:
                    query, key, factor = args[0], args[1], 1.0
                # query and key are [batch, heads, tokens, channels]; a causal mask leaves half of the products
                total = query.shape.numel() * key.shape[-2] * operations * factor / 2
                return float(total / self._rate(query.dtype, query.shape[-1]))
        if not computes:
            return 0.0
        moved = [*tree_leaves(args), *tree_leaves(results)]
        return sum(leaf.numel() * leaf.itemsize for leaf in moved if isinstance(leaf, Tensor)) / self._rates.bandwidth

    def _product(self, dtype: torch.dtype, m: int, k: int, n: int) -> float:
        """Return the seconds of a product of [m, k] and [k, n]."""
        return 2 * m * k * n / self._rate(dtype, min(m, k, n)) if m * k * n else 0.0

    def _rate(self, dtype: torch.dtype, narrowest: int) -> float:
        """Return operations per second of products; a narrow side slows every dtype down as much as fp32."""
        fp32 = 2e9 / self._rates.product(1000, 1000, 1000)
        share = 1.0
        if narrowest < 1000:
            share = 2e6 * narrowest / self._rates.product(1000, 1000, narrowest) / fp32
        peaks = {torch.bfloat16: self._rates.bf16, torch.float16: self._rates.bf16, torch.int8: self._rates.int8}
        return share * (peaks.get(dtype) or fp32)


def _writes(function: Any) -> bool:
    """Return whether an operation writes to one of its arguments."""
    return bool(function._schema.is_mutable)


Pass = Callable[[torch.nn.Module, Tensor], None]
"""Function of (model, ids [sequences, length]) that runs forward and backward of one micro-batch as the loop does."""
