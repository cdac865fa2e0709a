"""Peak memory of the tensors that operations create, counted by a dispatch mode."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class PeakBytes(TorchDispatchMode):
    """Context that counts the bytes of every storage that an operation inside it creates, for as long as it lives.

    `peak` is the largest number of such bytes that were alive at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: set[int] = set()
        self._live = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._known.add(tensor.untyped_storage().data_ptr())
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self._known:
                storage = tensor.untyped_storage()
                self._known.add(storage.data_ptr())
                self._live += storage.nbytes()
                weakref.finalize(storage, self._release, storage.data_ptr(), storage.nbytes())
        self.peak = max(self.peak, self._live)
        return result

    def _release(self, address: int, size: int) -> None:
        self._known.discard(address)
        self._live -= size
