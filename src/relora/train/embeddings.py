"""The gradient of an embedding, added to `weight.grad` row by row: dW[ids[t]] += dy[t].

Autograd allocates a gradient of the table's size for every micro-batch, zero except in the rows that were looked up,
and adds it to the gradient that exists. Here each row is added to `weight.grad` directly: the same sum, grouped
differently, without the memory and the traffic of one table per micro-batch. The gradient stays dense, so the update
is still AdamW's: momentum also moves the rows that are not in the batch.

Autograd's own gradient is kept where gradients are taken by hooks or apart for each micro-batch, as with several
processes (`distributed.reduce`), for layers that do more than look up rows, and on GPUs. There, adding rows in a
deterministic order needs a sort, which autograd does as well.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@contextmanager
def rows_added_in_place(model: nn.Module, allowed: bool = True) -> Iterator[None]:
    """Make forward and backward passes inside the block add the gradient of the model's embeddings row by row.

    Args:
        allowed: False to leave everything to autograd.
    """
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding) and _only_looks_up(module)]
    if not allowed or (torch.distributed.is_available() and torch.distributed.is_initialized()):
        tables = []
    for table in tables:
        table.forward = partial(_look_up, table)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for table in tables:
            del table.forward


def _only_looks_up(table: nn.Embedding) -> bool:
    """Whether a layer is torch's plain embedding, trainable, with a dense gradient, and on the CPU."""
    weight = table.weight
    plain = type(table).forward is nn.Embedding.forward and "forward" not in vars(table) and table.max_norm is None
    dense = not table.sparse and not table.scale_grad_by_freq
    return plain and dense and weight.requires_grad and weight.device.type == "cpu"


def _look_up(table: nn.Embedding, input: Tensor) -> Tensor:
    """Forward pass of an embedding by `_LookUp`."""
    rows: Tensor = _LookUp.apply(table.weight, input, table.padding_idx)  # type: ignore[no-untyped-call]
    return rows


class _LookUp(torch.autograd.Function):
    """Look up rows [..., d] of a table [V, d].

    The backward pass adds the gradient to `weight.grad` itself and returns None to autograd.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding_idx: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding_idx = weight, padding_idx
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, None, None]:
        weight, ids = ctx.weight, ctx.saved_tensors[0].flatten()  # [T]
        rows = grad_outputs[0].reshape(len(ids), -1)  # [T, d]
        if ctx.padding_idx is not None:
            rows = rows.masked_fill((ids == ctx.padding_idx)[:, None], 0)
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        weight.grad.index_add_(0, ids, rows)
        return None, None, None
