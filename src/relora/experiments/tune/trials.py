"""A part of a trial: its run folder is taken to a rung, in a process of its own, and what it found comes back.

A run folder that holds an earlier part goes on from its checkpoint. So a part that was killed is made again by the same
call, and a run that was made in parts ends in the same bits as one that went through.
"""

import math
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from relora.config import FinetuneConfig, RunConfig
from relora.device import choose_device, peak_memory_bytes
from relora.errors import Diverged
from relora.experiments.tune.spaces import Config
from relora.recipes.finetune import train_on
from relora.recipes.finetuning_inputs import gather_finetuning
from relora.recipes.from_settings import schedule_of
from relora.recipes.job import RunResult
from relora.recipes.pretrain import pretrain
from relora.report.history import read_history

CHECKPOINTS = "checkpoints"
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
    try:
        result, peak = _train(config, share)
    except Diverged as error:
        print(f"{config.output_dir}: {error}", file=sys.stderr)
        return Reached(math.inf)
    history = read_history(result.folder)
    loss = result.evaluation.loss
    return Reached(
        loss if math.isfinite(loss) else math.inf,
        {
            "steps": result.steps,
            "tokens": result.tokens,
            "seconds": history.step_seconds,
            "peak_bytes": peak,
            "trained_parameters": result.trainable_parameters,
            "held_out_tokens": result.evaluation.tokens,
        },
    )


def clear(folder: Path, *names: str) -> None:
    """Delete parts of a run folder that are there."""
    for name in names:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _train(config: Config, share: float) -> tuple[RunResult, int]:
    """Train to a share of the run; return what was reached, and the peak of this process in bytes."""
    if isinstance(config, RunConfig):
        result = pretrain(config, until=_steps(share, config.total_steps), quiet=True)
        return result, peak_memory_bytes(choose_device(config.device))
    assert isinstance(config, FinetuneConfig)
    inputs = gather_finetuning(config)
    steps = schedule_of(config, inputs.batches.steps_per_epoch).total_steps
    return train_on(config, inputs, until=_steps(share, steps), quiet=True), peak_memory_bytes(inputs.device)


def _steps(share: float, total: int) -> int | None:
    """Return the step at which a part ends; None for the last one of the run."""
    return None if share >= 1 else min(max(1, round(share * total)), total)
