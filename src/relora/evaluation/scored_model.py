"""Open the model that an evaluation scores, and check the settings that all evaluations have in common."""

import math
from pathlib import Path

from transformers import PreTrainedModel

from relora.errors import NonFinite, UserError
from relora.inference.loading import LoadedModel, load_model_or_run
from relora.model.finite import why_not_finite
from relora.model.load import max_positions

BATCH = 8
"""Windows, prompts or examples in a forward pass, unless asked otherwise; a run measures its result with so many, too,
since the sums of batches of other sizes are rounded differently."""


def open_scored_model(
    model_or_run: str | Path, adapter: str | None, *, device: str, dtype: str, trust_remote_code: bool
) -> LoadedModel:
    """Open the model to be scored: as `load_model_or_run` opens it, or with `adapter` in use.

    Raises:
        UserError: as for `load_model_or_run`.
    """
    adapters = [] if adapter is None else [adapter]
    loaded = load_model_or_run(
        model_or_run, adapters=adapters, device=device, dtype=dtype, trust_remote_code=trust_remote_code
    )
    if adapter is not None:
        loaded.adapters.use(loaded.adapters.names[-1])
    return loaded


def scored_length(loaded: LoadedModel, sequence_length: int | None) -> int:
    """Return the number of tokens that the model is given at once: `sequence_length`, or that of its training.

    Raises:
        UserError: the model has fewer positions.
    """
    length = sequence_length or loaded.sequence_length
    positions = max_positions(loaded.model)
    if positions is not None and length > positions:
        raise UserError(f"sequence_length ({length:,}) is more than the model's {positions:,} positions; shorten it")
    return length


def check_counts(**counts: int | None) -> None:
    """Raise `UserError` for the first of the named numbers that is less than 1; None stands for a default."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be 1 or more")


def check_loss(loss: float, model: PreTrainedModel, source: str) -> None:
    """Check that a model's loss on a source is a number.

    Raises:
        NonFinite: it is infinite or NaN; the message names the first weight that is not finite.
    """
    if not math.isfinite(loss):
        raise NonFinite(f"{source}: the model's loss is {loss}: {why_not_finite(model)}")
