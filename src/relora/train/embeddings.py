"""The gradient of an embedding, added where it belongs: dW[ids[t]] += dy[t].

Autograd makes a fresh gradient as large as the table for every micro-batch, zero but for the rows that were looked up,
and adds it to the one that is there. Here the rows are added to `weight.grad` as they come: the same sum, grouped
differently, without the memory and the traffic of one table per micro-batch. The gradient stays dense, so that AdamW
stays AdamW: momentum moves the rows that are not in the batch, too.

Autograd's way stays where the gradient is not ours alone (a process group reduces it), where the layer does more than
look up, and on GPUs, on which adding rows in an order that is always the same takes a sort, as autograd's way does.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@contextmanager
def rows_added_in_place(model: nn.Module) -> Iterator[None]:
    """Forward and backward passes inside add the gradient of the model's embeddings row by row."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding) and _only_looks_up(module)]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        tables = []
    for table in tables:
        table.forward = partial(_look_up, table)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for table in tables:
            del table.forward


def _only_looks_up(table: nn.Embedding) -> bool:
    weight = table.weight
    plain = type(table).forward is nn.Embedding.forward and "forward" not in vars(table) and table.max_norm is None
    dense = not table.sparse and not table.scale_grad_by_freq
    return plain and dense and weight.requires_grad and weight.device.type == "cpu"


def _look_up(table: nn.Embedding, input: Tensor) -> Tensor:
    rows: Tensor = _LookUp.apply(table.weight, input, table.padding_idx)  # type: ignore[no-untyped-call]
    return rows


class _LookUp(torch.autograd.Function):
    """Rows [..., d] of a table [V, d]; the way back returns no gradient, it has added it already."""

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
