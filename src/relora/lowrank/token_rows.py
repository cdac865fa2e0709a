"""Training of some rows of an embedding and of the head, while all other rows are frozen.

    W' = W with the rows `ids` replaced by R        R: [n, width], the only part that trains; it begins as W[ids]

This is PEFT's `trainable_token_indices`. Gradients and moments have n rows. The price: each forward pass copies W, and
a backward pass through the head makes a gradient of the size of W.
"""

import types
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from relora.errors import UserError

MODULE = r"parametrizations\.weight\.0"
"""Pattern of `trained_modules` that matches the rows."""


class TrainedRows(nn.Module):
    """Replacement of some rows of a weight.

    Args:
        weight: [rows, width], from which the rows begin.
        ids: numbers of the rows that train.
    """

    def __init__(self, weight: Tensor, ids: Sequence[int]) -> None:
        super().__init__()
        self.ids: Tensor
        self.register_buffer("ids", torch.tensor(ids, device=weight.device), persistent=False)
        self.rows = nn.Parameter(weight.detach()[self.ids].clone())
        # a batch may have none of these tokens in its input, and then no gradient is right (see `train.step`)
        self.rows.zero_until = torch.zeros(1)  # type: ignore[attr-defined]

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with the rows in place."""
        return weight.index_copy(0, self.ids, self.rows.to(weight.dtype))


def train_rows(modules: Iterable[nn.Module], ids: Sequence[int]) -> int:
    """Let rows of the modules' weights train, in place; modules with one weight in common share the rows.

    Args:
        modules: an embedding, and the head if there is one; their weights are frozen.
        ids: numbers of the rows.

    Returns:
        Number of parameters that train.

    Raises:
        UserError: there is no such row.
    """
    by_weight: dict[int, TrainedRows] = {}
    for module in modules:
        weight: nn.Parameter = module.weight  # type: ignore[assignment]
        if not 0 <= min(ids) <= max(ids) < len(weight):
            raise UserError(
                f"lowrank.trainable_tokens: the ids are {min(ids)} to {max(ids)}, the model has {len(weight)} rows"
            )
        rows = by_weight.setdefault(id(weight), TrainedRows(weight, ids))
        weight.requires_grad_(False)
        parametrize.register_parametrization(module, "weight", rows)
        if isinstance(module, nn.Embedding):  # so that nobody takes it for a plain look-up in a trained table
            module.forward = types.MethodType(type(module).forward, module)  # type: ignore[method-assign]
    return sum(rows.rows.numel() for rows in by_weight.values())


def trained_rows(model: nn.Module) -> dict[str, dict[int, Tensor]]:
    """Return the rows that train, by name of the weight and number of the row; a tied weight has its first name."""
    found: dict[str, dict[int, Tensor]] = {}
    seen: set[TrainedRows] = set()
    for path, _, rows in _with_rows(model):
        if rows not in seen:
            found[f"{path}.weight"] = dict(zip(rows.ids.tolist(), rows.rows.detach(), strict=True))
            seen.add(rows)
    return found


@torch.no_grad()
def fold_rows(model: nn.Module) -> None:
    """Write the rows into their weights, in place, and put the plain modules back."""
    for _, module, rows in list(_with_rows(model)):
        original: Tensor = module.parametrizations.weight.original  # type: ignore[union-attr, assignment]
        original[rows.ids] = rows.rows.to(original.dtype)
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
        vars(module).pop("forward", None)


def _with_rows(model: nn.Module) -> Iterator[tuple[str, nn.Module, TrainedRows]]:
    """Yield each module of whose weight some rows train, with its path and the rows."""
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            rows = module.parametrizations.weight[0]
            if isinstance(rows, TrainedRows):
                yield path, module, rows
