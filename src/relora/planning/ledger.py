"""What tensors take while code runs that has none of their memory, and how long its operations would take.

Inside a `FakeTensorMode` every operation is dispatched as on the real device, attention kernels and autograd included,
but a tensor is a shape and a dtype. The ledger sees each storage come and go, adds up what lives by kind, and keeps the
sums of the moment at which most lived. So what autograd saves, what an operation makes on the way and what custom
backward passes form and drop is counted, not listed, for whatever model and loss there are.

Seconds are those of each operation at measured rates: products by their shape and dtype, everything else by the bytes
that it reads and writes.

What is not seen: memory that a kernel takes by itself while it runs (a few MB), and what the allocator loses.
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

HEAP_BLOCK = 32 * 2**20
"""glibc's allocator asks the system for larger blocks one by one, and gives them back at once."""

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm: 0, _aten.addmm: 1, _aten.addmm_: 1, _aten.bmm: 0, _aten.baddbmm: 1, _aten._int_mm: 0}
"""Which argument is the left side."""
_ATTENTION = {"_scaled_dot_product": 4, "_flash_attention": 4, "_efficient_attention": 4}
"""Multiplications and additions per query, key and channel; the way back takes 2.5 times as many."""


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts while it is active; what is made is of the kind `kind`.

    Args:
        device: whose memory is counted; what lies elsewhere is in `elsewhere`.
        rates: of the device.
    """

    def __init__(self, device: torch.device, rates: Rates) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kind = "other"
        self.live: Counter[str] = Counter()
        """Bytes by kind, now."""
        self.peak: Counter[str] = Counter()
        """Bytes by kind, when most lived."""
        self.elsewhere: Counter[str] = Counter()
        """Bytes by kind, now, that are in main memory where `device` has its own."""
        self.heap_peak = self.mapped_peak = 0
        """Most bytes that lived in blocks of the allocator's heap, and in blocks asked for one by one."""
        self.seconds = 0.0
        self._device, self._rates = device, rates
        self._kinds: dict[int, tuple[str, int, Counter[str], weakref.ref[Any]]] = {}
        self._heap = self._mapped = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is _aten._local_scalar_dense.default:
            return 0  # a number is asked of a tensor that has none: nothing is ignored, no flag is up
        results = function(*args, **(kwargs or {}))
        made = [self.note(leaf) for leaf in tree_leaves(results) if isinstance(leaf, Tensor)]
        self.seconds += self._seconds(function, args, results, computes=any(made) or _writes(function))
        return results

    def note(self, tensor: Tensor) -> bool:
        """Count the tensor's storage if it is new, and tell whether it is."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._kinds:
            return False
        account = self.live if tensor.device.type == self._device.type else self.elsewhere
        self._kinds[key] = (self.kind, size, account, weakref.ref(storage, lambda _: self._gone(key)))
        self._add(account, self.kind, size, size)
        if self.live.total() > self.peak.total():
            self.peak = self.live.copy()
        self.heap_peak, self.mapped_peak = max(self.heap_peak, self._heap), max(self.mapped_peak, self._mapped)
        return True

    def relabel(self, tensor: Tensor, kind: str) -> None:
        """What was made as one thing is now another."""
        key = tensor.untyped_storage()._cdata
        if key not in self._kinds:
            self.note(tensor)
        old, size, account, reference = self._kinds[key]
        self._kinds[key] = (kind, size, account, reference)
        account[old] -= size
        account[kind] += size

    def forget_peak(self) -> None:
        """Begin anew from what lives now, with no time spent."""
        self.peak, self.seconds = self.live.copy(), 0.0
        self.heap_peak, self.mapped_peak = self._heap, self._mapped

    def _gone(self, key: int) -> None:
        kind, size, account, _ = self._kinds.pop(key)
        self._add(account, kind, -size, size)

    def _add(self, account: Counter[str], kind: str, change: int, block: int) -> None:
        account[kind] += change
        if account is self.live and block < HEAP_BLOCK:
            self._heap += change
        elif account is self.live:
            self._mapped += change

    def _seconds(self, function: Any, args: tuple[Any, ...], results: Any, computes: bool) -> float:
        packet = function.overloadpacket
        if packet in _PRODUCTS:
            left, right = args[_PRODUCTS[packet]], args[_PRODUCTS[packet] + 1]
            return self._product(left.dtype, left.shape.numel() // left.shape[-1], left.shape[-1], right.shape[-1])
        name = packet.__name__
        for start, operations in _ATTENTION.items():
            if name.startswith(start):
                back = "backward" in name
                query, key = args[back], args[back + 1]  # [batch, heads, tokens, channels]
                numbers = query.shape.numel() * key.shape[-2] * operations * (2.5 if back else 1) / 2  # causal: half
                return float(numbers / self._rate(query.dtype, query.shape[-1]))
        if not computes:
            return 0.0
        moved = [*tree_leaves(args), *tree_leaves(results)]
        return sum(leaf.numel() * leaf.itemsize for leaf in moved if isinstance(leaf, Tensor)) / self._rates.bandwidth

    def _product(self, dtype: torch.dtype, m: int, k: int, n: int) -> float:
        return 2 * m * k * n / self._rate(dtype, min(m, k, n)) if m * k * n else 0.0

    def _rate(self, dtype: torch.dtype, narrowest: int) -> float:
        """Operations in a second; a narrow side costs every dtype what it costs fp32."""
        fp32 = 2e9 / self._rates.product(1000, 1000, 1000)
        share = 2e6 * narrowest / self._rates.product(1000, 1000, narrowest) / fp32 if narrowest < 1000 else 1.0
        peaks = {torch.bfloat16: self._rates.bf16, torch.float16: self._rates.bf16, torch.int8: self._rates.int8}
        return share * (peaks.get(dtype) or fp32)


def _writes(function: Any) -> bool:
    return bool(function._schema.is_mutable)


Pass = Callable[[torch.nn.Module, Tensor], None]
"""(model, ids [sequences, length]): forward and backward of one micro-batch, as the loop does them."""
