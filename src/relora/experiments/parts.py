"""A part of a run: its run folder is taken to a share of its steps, by the schedule of the whole run.

A search compares runs at a share of their steps, a rung, and lets the best of them go on. A folder that holds an
earlier part goes on from its checkpoint. So a part that was killed is made again by the same call, and a run that was
made in parts ends in the same bits as one that went through. `relora tune` and `relora compare --tune-lr` search so.
"""

import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from relora.config import FinetuneConfig, RunConfig
from relora.errors import Diverged
from relora.recipes.finetune import train_on
from relora.recipes.finetuning_inputs import gather_finetuning
from relora.recipes.from_settings import schedule_of
from relora.recipes.job import RunResult
from relora.recipes.pretrain import pretrain
from relora.report.history import History, read_history

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Part:
    """Outcome of a part of a run."""

    result: RunResult | None
    """None if the numbers of the run stopped being finite."""
    history: History
    """Records of the run from its first step on."""


def train_part(config: RunConfig | FinetuneConfig, share: float, *, first: int = 0) -> Part:
    """Take a run to a share of its steps, or to its end, and measure the held-out loss there.

    Args:
        first: number of steps at the beginning of which the share is not taken (see `step_of`).
    """
    try:
        result: RunResult | None = _train(config, share, first)
    except Diverged as error:
        print(f"{config.output_dir}: {error}", file=sys.stderr)
        result = None
    if result is not None and not math.isfinite(result.evaluation.loss):
        result = None
    return Part(result, read_history(Path(config.output_dir)))


def step_of(share: float, total: int, *, first: int = 0) -> int | None:
    """Return the step at which a part ends, a share of the steps after the first ones; None for the run's last step."""
    return None if share >= 1 else min(first + max(1, round(share * (total - first))), total)


def clear(folder: Path, *names: str) -> None:
    """Delete parts of a run folder that are there."""
    for name in names:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _train(config: RunConfig | FinetuneConfig, share: float, first: int) -> RunResult:
    """Train to the end of a part."""
    if isinstance(config, RunConfig):
        return pretrain(config, until=step_of(share, config.total_steps, first=first), quiet=True)
    inputs = gather_finetuning(config)
    steps = schedule_of(config, inputs.batches.steps_per_epoch).total_steps
    return train_on(config, inputs, until=step_of(share, steps, first=first), quiet=True)
