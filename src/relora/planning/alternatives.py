"""The same run with other settings: peak and time of a step for every method, base and activation checkpointing."""

from dataclasses import dataclass

import torch

from relora.config import RunConfig
from relora.errors import UserError
from relora.planning.phase_cost import PhaseCost, phase_cost
from relora.planning.variants import CHECKPOINTING, bases_for, with_changes

_LOW_RANK_ALONE = {"method": "lora", "warm_start": {"steps": 0, "auto": False}, "lowrank": {"ranks": "uniform"}}
"""Changes that turn a full-rank configuration into one that a low-rank step can be planned for."""


@dataclass(frozen=True)
class Alternative:
    """Peak and time of a run with other settings at the same batch; fields are keys of `relora plan --json`."""

    method: str
    base: str | None
    """Storage of frozen weights; None at full rank."""
    activation_checkpointing: str
    peak: int
    """Bytes at the worst moment of the run, while a checkpoint is written."""
    step_seconds: float
    """Seconds of a low-rank step; of any step in a full-rank run."""


def alternatives_of(config: RunConfig, process: int, device: torch.device) -> list[Alternative]:
    """Predict a run for every method, base and kind of activation checkpointing.

    Args:
        process: bytes of interpreter and libraries.

    Returns:
        Full rank first. Full rank alone if the configuration is of full rank and its low-rank settings, which it does
        not use, do not fit its model.
    """
    found = []
    full: dict[str, PhaseCost] = {}
    for checkpointing in CHECKPOINTING:
        changed = with_changes(config, {"method": "full", "memory": {"activation_checkpointing": checkpointing}})
        cost = phase_cost(changed, "full", 0, changed.total_steps, process, device)
        full[checkpointing] = cost
        found.append(Alternative("full", None, checkpointing, cost.checkpoint_peak, cost.figures.seconds))
    try:
        low_rank = config if config.method != "full" else with_changes(config, _LOW_RANK_ALONE)
        return found + _low_rank_alternatives(low_rank, full, process, device)
    except UserError:
        if config.method != "full":
            raise
        return found


def _low_rank_alternatives(
    config: RunConfig, full: dict[str, PhaseCost], process: int, device: torch.device
) -> list[Alternative]:
    """Predict LoRA (no warm start) and ReLoRA (a warm start, whose peak counts, too).

    Args:
        full: activation checkpointing -> cost of a full-rank step.
    """
    found = []
    for base in bases_for(config):
        for checkpointing in CHECKPOINTING:
            changed = with_changes(
                config, {"lowrank": {"base": base}, "memory": {"activation_checkpointing": checkpointing}}
            )
            cost = phase_cost(changed, "low_rank", 0, 1, process, device)
            lora_peak = cost.checkpoint_peak
            relora_peak = max(lora_peak, full[checkpointing].checkpoint_peak)
            for method, peak in (("lora", lora_peak), ("relora", relora_peak)):
                found.append(Alternative(method, base, checkpointing, peak, cost.figures.seconds))
    return found
