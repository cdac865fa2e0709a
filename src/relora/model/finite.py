"""Checks that the weights of a model are finite numbers in the dtype in which they are stored.

The largest number of fp16 is 65,504; a larger weight would be stored as infinity, and the model would compute NaN from
it. bf16 has the range of fp32.
"""

import logging
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from relora.errors import NonFinite, UserError

_log = logging.getLogger(__name__)


def cast_finite(weight: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return a floating-point weight in `dtype`.

    An entry that is infinite already stays so, with a warning: some models have a bias of minus infinity for what is
    never to be chosen.

    Args:
        name: the weight's name, for the message.

    Raises:
        NonFinite: an entry of the weight is not a number.
        UserError: an entry is beyond the range of `dtype`.
    """
    cast = weight.to(dtype)
    infinite = int(cast.isinf().sum())
    if weight.isnan().any():
        raise NonFinite(f"{name} holds {int(weight.isnan().sum()):,} entries that are not numbers; nothing was written")
    if infinite > int(weight.isinf().sum()):
        largest = weight.detach().abs().where(weight.isfinite(), 0).max().item()
        name_of_dtype, limit = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
        raise UserError(
            f"{name} holds {largest:.6g}, which {name_of_dtype} cannot hold (its largest number is {limit:,.6g}); "
            "nothing was written; write bf16 or fp32"
        )
    if infinite:
        _log.warning("warning: %s holds %s infinite entries, and is written with them", name, f"{infinite:,}")
    return cast


@torch.no_grad()
def check_computes(model: PreTrainedModel, source: str) -> None:
    """Check that a model computes numbers from one token, the first of its vocabulary.

    Args:
        source: folder, hub id or run of the model, for the message.

    Raises:
        NonFinite: a logit is not a number; the message names the first weight that is not finite.
    """
    ids = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    if model(input_ids=ids, use_cache=False).logits.isnan().any():
        raise NonFinite(f"{source}: what the model computes is not a number: {why_not_finite(model)}")


def check_weights(model: PreTrainedModel, path: str | Path) -> None:
    """Raise `UserError` if a weight of an opened model holds an entry that is not a number, and name the weight.

    Infinite entries pass: some models have a bias of minus infinity for what is never to be chosen.

    Args:
        path: the model's name for the message.
    """
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            return
        weight = parameter.detach()
        if weight.sum().isnan() and weight.isnan().any():
            raise UserError(f"{path}: {_damage(name, int(weight.isnan().sum()))}")


def why_not_finite(model: nn.Module) -> str:
    """Say why the outputs of a model are not finite: name the first parameter that is not, one with NaN before others.

    A cast makes no NaN, and only one to fp16 makes infinities of ordinary weights. So any others are in the files.
    """
    infinite = ""
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or parameter.detach().isfinite().all():
            continue
        if number := int(parameter.isnan().sum()):
            return _damage(name, number)
        held = f"{name} holds {int(parameter.isinf().sum()):,} infinite entries"
        cast = parameter.dtype == torch.float16
        reason = ", in float16, whose range ends at 65,504; try bf16 or fp32" if cast else ": they are in its files"
        infinite = infinite or f"{held}{reason}"
    return (
        infinite or "its weights are finite, so it computes numbers beyond the range of their dtype; try fp32 or bf16"
    )


def _damage(name: str, entries: int) -> str:
    """Say that a parameter holds entries that are not numbers."""
    return (
        f"{name} holds {entries:,} entries that are not numbers, so the checkpoint itself is damaged; "
        "copy or download it again, or take an older one"
    )
