"""Packing: put several examples into one row of a batch, without attention from one to another.

An example of n tokens takes n - 1 positions of a row: its input is all tokens but the last, and the label at each
position is the next token. So no label belongs to another example than its position, and no label is lost. The position
numbers of a row start at 0 with every example. From such numbers the models of transformers 5 make a mask that is
causal and block-diagonal (`masking_utils.find_packed_sequence_indices`), if they get no attention mask and use no
cache:

    sdpa, eager, flex attention   work with any number of rows
    flash attention               works with one row at a time; with more, examples attend to one another
    Bloom, MPT, Falcon, OPT       do not work: their masks do not depend on the position numbers
    Mamba, RWKV                   do not work: they have no mask, and their state passes from one example to the next

Whether a model works is not looked up in such a list but tried (`check_packing`).

Rows are filled by best fit, the longest example first. This needs hardly ever more than 11/9 of the smallest possible
number of rows (Johnson et al. 1974), and in practice leaves one or two percent of the positions empty. The price: the
same examples share a row in every epoch; only the order of the rows is drawn anew.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from relora.data.sampling import permute
from relora.errors import UserError
from relora.seeding import keyed_seed

TRIED_POSITIONS = 6
"""Positions of each of the two examples in a row with which a model is tried."""

LOGIT_TOLERANCE = 1e-5
"""Largest difference between equal logits in fp32, relative to the largest logit. Rounding may differ even where
attention does not, because experts then process other tokens together."""


def pack(lengths: Sequence[int], capacity: int, seed: int) -> list[list[int]]:
    """Distribute examples over rows by best fit, the longest example first.

    Args:
        lengths: positions that each example takes, none more than `capacity`.
        capacity: positions of a row.
        seed: draws the order of examples of equal length.

    Returns:
        For each row, the numbers of its examples; their lengths add up to at most `capacity`.
    """
    order = permute(np.arange(len(lengths)), len(lengths), keyed_seed(seed, "pack"))
    drawn = np.asarray(lengths)[order]
    rows: list[list[int]] = []
    rows_by_free: list[list[list[int]]] = [[] for _ in range(capacity + 1)]  # rows with this many free positions
    free_bits = 0  # bit f is set where rows_by_free[f] has a row, so the best fit is the lowest bit from `length` on
    for number in order[np.argsort(-drawn, kind="stable")].tolist():
        length = lengths[number]
        fitting_bits = free_bits >> length
        if fitting_bits:
            lowest_bit = (fitting_bits & -fitting_bits).bit_length() - 1
            free = length + lowest_bit
            row = rows_by_free[free].pop()
            if not rows_by_free[free]:
                free_bits ^= 1 << free
        else:
            free, row = capacity, []
            rows.append(row)
        row.append(number)
        rows_by_free[free - length].append(row)
        free_bits |= 1 << (free - length)
    return rows


def check_packing(model: nn.Module, rows: int) -> None:
    """Raise `UserError` if in a model an example of a row depends on the example before it.

    The model is run on two batches which differ only in the first example of each row; the logits of the second
    example must be equal.

    Args:
        model: a causal language model.
        rows: rows of a micro-batch; a model may work with one row and not with several.
    """
    device = next(model.parameters()).device
    positions = torch.arange(TRIED_POSITIONS, device=device).repeat(rows, 2)
    first = torch.arange(TRIED_POSITIONS, device=device) % 2  # ids 0 and 1, which every vocabulary has
    second = torch.full_like(first, 2)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            one, other = (
                model(
                    input_ids=torch.cat([ids, second]).repeat(rows, 1), position_ids=positions, use_cache=False
                ).logits[:, TRIED_POSITIONS:]
                for ids in (first, 1 - first)
            )
    except TypeError as error:
        raise UserError(f"packing: the model takes no position numbers ({error}); set packing to false") from None
    finally:
        for module in training:
            module.training = True
    tolerance = max(LOGIT_TOLERANCE, 2 * torch.finfo(one.dtype).eps) * one.abs().max()
    if (one - other).abs().max() > tolerance:
        raise UserError(
            "packing: the model lets an example see the one before it in its row, as Bloom, Falcon, OPT and state-space"
            " models do, and flash attention with several rows at once; set packing to false"
        )
