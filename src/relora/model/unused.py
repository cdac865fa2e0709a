"""Parameters that no logit depends on, such as the cross-attention of half an encoder-decoder: they are not trained."""

import re

from transformers import PreTrainedModel

from relora.lowrank.usage import usage_of

MOST_KINDS = 3
"""Kinds of parameters that a line names."""


def leave_out_unused(model: PreTrainedModel, length: int) -> str | None:
    """Freeze the parameters that no logit depends on in a way that has a gradient (see `lowrank.usage`).

    Args:
        length: tokens of a sequence in training.

    Returns:
        A line that names them; None if there are none.
    """
    usage = usage_of(model, length)
    if usage is None:
        return None
    unused = {name: one for name, one in model.named_parameters() if name not in usage.trained and one.requires_grad}
    for parameter in unused.values():
        parameter.requires_grad_(False)
    kinds = list(dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", name) for name in unused))
    if not kinds:
        return None
    more = f" and {len(kinds) - MOST_KINDS} more" if len(kinds) > MOST_KINDS else ""
    number = sum(parameter.numel() for parameter in unused.values())
    return (
        f"left out of training: {number:,} parameters to which no gradient comes back "
        f"({', '.join(kinds[:MOST_KINDS])}{more})"
    )
