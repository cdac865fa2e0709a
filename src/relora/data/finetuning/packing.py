"""Several examples in one row of a batch, without attention from one to another.

An example of n tokens takes n - 1 positions of a row: what goes in is all but its last token, and the label at each
position is the token after it; so no label crosses a border, and none is lost. The position numbers of a row start at
0 with every example. From such numbers the models of transformers 5 build a mask that is causal and block-diagonal
(`masking_utils.find_packed_sequence_indices`), if they are given no attention mask and keep no cache:

    sdpa, eager, flex attention   rows of any number
    flash attention               one row at a time; with more it takes no notice
    Bloom, MPT, Falcon, OPT       their masks are not told the positions
    Mamba, RWKV                   no mask; a state runs through

Which of these a model is, is not looked up but tried (`check_packing`).

Rows are filled by best fit, the longest example first: hardly ever more than 11/9 of the fewest rows possible
(Johnson et al. 1974), and in practice full to a percent or two. The price: which examples share a row is the same in
every epoch, and the rows' order alone is drawn anew.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from relora.data.sampling import permute
from relora.errors import UserError
from relora.seeding import keyed_seed

TRIED_POSITIONS = 6
"""Of each of the two examples with which a model is tried."""

SAME = 1e-5
"""Of the largest logit, in fp32: less is rounding, which may differ where experts are given other tokens."""


def pack(lengths: Sequence[int], capacity: int, seed: int) -> list[list[int]]:
    """Rows of examples' numbers, each row's lengths adding up to `capacity` at most.

    Among equally long examples the order is drawn by `seed`.
    """
    order = permute(np.arange(len(lengths)), len(lengths), keyed_seed(seed, "pack"))
    drawn = np.asarray(lengths)[order]
    rows: list[list[int]] = []
    by_room: list[list[list[int]]] = [[] for _ in range(capacity + 1)]  # rows with so many positions left
    rooms = 0  # bit r is set where by_room[r] has a row: the tightest fit is the lowest bit from a length upwards
    for number in order[np.argsort(-drawn, kind="stable")].tolist():
        length = lengths[number]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, []
            rows.append(row)
        row.append(number)
        by_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows


def check_packing(model: nn.Module, rows: int) -> None:
    """`UserError` if a model lets an example of a row see the one before it.

    Tried with `rows` rows, as many as go through the model at once: it is run on two batches that differ only in the
    first example of each row, and must make the same of the second.
    """
    device = next(model.parameters()).device
    positions = torch.arange(TRIED_POSITIONS, device=device).repeat(rows, 2)
    first = torch.arange(TRIED_POSITIONS, device=device) % 2  # ids that every vocabulary has
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
    tolerance = max(SAME, 2 * torch.finfo(one.dtype).eps) * one.abs().max()
    if (one - other).abs().max() > tolerance:
        raise UserError(
            "packing: the model lets an example see the one before it in its row, as Bloom, Falcon, OPT and state-space"
            " models do, and flash attention with several rows at once; set packing to false"
        )
