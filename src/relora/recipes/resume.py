"""Continuing a run: what changed since it began, and from which checkpoint it goes on.

Everything here is looked up and refused before anything is written; `runs.changes` says which keys may change.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from relora.config import TrainingConfig
from relora.distributed.group import ALONE, Group
from relora.errors import UserError
from relora.lowrank import LowRankConfig
from relora.lowrank.calibrate import calibrated, from_json, to_json
from relora.lowrank.costs import Rates
from relora.recipes.from_settings import adaptive_of
from relora.recipes.precision import begun_with
from relora.runs.changes import allowed_changes, check_settings
from relora.runs.settings import is_run
from relora.train.checkpoint import Checkpoints
from relora.train.checkpoint_format import Checkpoint
from relora.train.schedule import Schedule
from relora.train.state import numeric_environment

Config = TypeVar("Config", bound=TrainingConfig)


@dataclass(frozen=True)
class Start:
    """The place from which a job trains, and how it computes from there."""

    checkpoint: Checkpoint | None
    """None: from step 0."""
    lowrank: LowRankConfig
    settings: dict[str, str | int]
    """Everything beside the configuration that changes numbers; saved with every checkpoint."""
    warnings: list[str]

    @property
    def step(self) -> int:
        """Optimizer steps that are done."""
        return self.checkpoint.step if self.checkpoint else 0


def find_start(
    folder: Path,
    checkpoints: Checkpoints,
    config: Config,
    device: torch.device,
    content: Mapping[str, str],
    schedule_of: Callable[[Config], Schedule],
    lowrank_of: Callable[[Rates | None], LowRankConfig],
    *,
    strict: bool,
    group: Group = ALONE,
) -> Start:
    """Find the checkpoint to continue from in a run folder, and check that this configuration continues that run.

    Of several ranks all call this; they go on from the checkpoint that rank 0 finds, and compute by its rates.

    Args:
        content: fingerprints of the data and the model, under keys of `FIXED`, and the setting `HELD_OUT`.
        schedule_of, lowrank_of: see `relora.recipes.job.Job`.
        strict: see `relora.recipes.job.run_job`.

    Raises:
        UserError: the folder holds another run, no sound checkpoint, or one of other data; nothing was written.
    """
    warnings = changes_since(folder, config, schedule_of)
    checkpoint, damaged = newest(checkpoints, strict=strict)
    warnings += damaged
    # A continued run computes by the rates that it was begun with, whatever this machine measures today.
    kept = from_json(str(checkpoint.manifest.settings.get("rates"))) if checkpoint else None
    if kept is None and group.world > 1 and config.method in ("lora", "relora"):
        kept = from_json(group.broadcast(to_json(calibrated(device)) if group.is_first else None))
    lowrank = lowrank_of(kept)
    settings = {**numeric_environment(device, config.precision.dtype), **content}
    settings["compile"] = "inductor" if config.compile else "none"
    if device.type == "cuda":
        settings["sums"] = "in one order" if config.deterministic else "in any order"
    settings["frozen"] = lowrank.frozen
    settings["gradient_sums"] = _order_of_sums(config, group.world)
    if checkpoint:
        warnings += check_settings(checkpoint.manifest.settings, settings, strict=strict)
    if lowrank.rates:
        settings["rates"] = to_json(lowrank.rates)
    return Start(checkpoint, lowrank, settings, warnings)


def _order_of_sums(config: TrainingConfig, world: int) -> str:
    """Describe the order in which a step's gradients are added up, on which their last bits depend."""
    if config.distributed.deterministic:
        return "in a tree"
    return "in turn" if world == 1 else f"over {world} ranks"


def changes_since(folder: Path, config: Config, schedule_of: Callable[[Config], Schedule]) -> list[str]:
    """List the allowed changes between the run in `folder`, if there is one, and `config`: a line for each.

    Raises:
        UserError: a refused key differs, or the run has done more steps than `config` wants.
    """
    if not is_run(folder):
        return []
    there = begun_with(folder)
    if type(there) is not type(config):
        raise UserError(f"output_dir: {folder} holds a run of another verb; choose another output_dir")
    lines = allowed_changes(there, config, folder)
    done = max(Checkpoints(folder / "checkpoints").steps(), default=0)
    before, now = schedule_of(there), schedule_of(config)
    if now.total_steps < done:
        raise UserError(
            f"schedule: {folder} has done {done} steps, more than the {now.total_steps} asked for; "
            "see `relora export --checkpoint` for an earlier state"
        )
    if before.total_steps != now.total_steps and done:
        lines.append(_new_length(before, now, done, by_itself=adaptive_of(config).watches_loss))
    return lines


def newest(checkpoints: Checkpoints, *, strict: bool) -> tuple[Checkpoint | None, list[str]]:
    """Find the checkpoint to continue from (None: there is none yet), and a line for every damaged one passed over.

    Raises:
        UserError: there are checkpoints but none is sound; or there is a model but no checkpoint any more; or with
            `strict` the newest is damaged.
    """
    checkpoint, broken = checkpoints.latest()
    if checkpoint is None:
        finished = checkpoints.folder.with_name("model").exists()
        if broken or finished:
            reason = f"{broken[0]}; no checkpoint in" if broken else "the run has a model, but none of"
            raise UserError(
                f"{reason} {checkpoints.folder} is sound: put a copy of one there, "
                "or --fresh to move the run aside and start over"
            )
        return None, []
    if broken and strict:
        raise UserError(f"{broken[0]}; without --strict the run goes on from step {checkpoint.step}")
    return checkpoint, [f"{line}; an older checkpoint is used" for line in broken]


def _new_length(old: Schedule, new: Schedule, done: int, *, by_itself: bool) -> str:
    """Describe how another total of steps changes the schedule; `by_itself`: the run decides on its restarts."""
    if by_itself:  # The checkpoint holds the restarts so far, and later ones are not known yet.
        old, new, counted = old.decided(None, ()), new.decided(None, ()), "restarts as the run decides"
    else:
        # A restart that the old schedule left out, as too near to its end, is not done later.
        restarts = sum(step < done for step in old.restarts) + sum(step >= done for step in new.restarts)
        counted = f"{restarts} restarts in all instead of {len(old.restarts)}"
    return (
        f"the cosine now ends at step {new.total_steps} instead of {old.total_steps}: at step {done} the learning rate "
        f"goes from {old.lr_factor(min(done, old.total_steps - 1)):.3f} to {new.lr_factor(done):.3f} of its peak; "
        f"{counted}. A run of {new.total_steps} steps from "
        "the start would have had the new rates all along"
    )
