"""A part of a trial, in a process of its own: what it found comes back to the search."""

import math
from dataclasses import dataclass, field

from relora.device import choose_device, peak_memory_bytes
from relora.experiments.parts import train_part
from relora.experiments.tune.spaces import Config

RESULTS = ("model", "adapter", "base", "tokenizer", "report.html")
"""Parts of a finished run that are deleted unless it is the best one."""
QUIET = ("log.trackers=[]", "checkpoint.keep_last=1")
"""Overrides of every trial; they change none of its numbers."""


@dataclass(frozen=True)
class Reached:
    """Outcome of a part of a trial."""

    loss: float
    """Held-out loss; infinite if the numbers stopped being finite."""
    figures: dict[str, float] = field(default_factory=dict)
    """Tokens, seconds of training steps, peak memory and sizes of the run so far."""


def run_part(config: Config, share: float) -> Reached:
    """Take a run to a share of its steps, or to its end, and return the held-out loss there."""
    part = train_part(config, share)
    steps, tokens = part.history.last
    figures = {"steps": steps, "tokens": tokens, "seconds": part.history.step_seconds}
    if part.result is None:
        return Reached(math.inf, figures)
    return Reached(
        part.result.evaluation.loss,
        {
            **figures,
            "peak_bytes": peak_memory_bytes(choose_device(config.device)),
            "trained_parameters": part.result.trainable_parameters,
            "held_out_tokens": part.result.evaluation.tokens,
        },
    )
