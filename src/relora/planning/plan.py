"""`relora plan`: memory and time that a run will take, phase by phase, told before anything is built.

The memory of a run is that of its worst moment over all phases (see `phase_cost`); its time is that of its steps.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from relora.config import RunConfig
from relora.device import choose_device
from relora.model.unused import leave_out_unused
from relora.planning.alternatives import Alternative, alternatives_of
from relora.planning.phase_cost import PhaseCost, phase_cost, phases_of
from relora.planning.probe import probe, process_bytes
from relora.recipes.from_settings import adaptive_of, lowrank_notes, most_restarts
from relora.recipes.precision import settle_dtype
from relora.recipes.pretraining_inputs import open_configured_model


@dataclass(frozen=True)
class Plan:
    """Memory and time of a run; the fields are keys of `relora plan --json`."""

    method: str
    device: str
    process: int
    """Bytes of interpreter and libraries."""
    phases: list[PhaseCost]
    restarts: int
    """Largest possible number of restarts."""
    adaptive_switch: bool
    """Whether the run itself ends its warm start; the phases are then those of the longest one."""
    alternatives: list[Alternative]
    """The same run with other settings; empty unless asked for."""
    notes: list[str]
    """Lines on the dtype that was chosen, on parameters that never train, and on what gets no factors."""

    @property
    def peak(self) -> int:
        """Bytes at the worst moment of the run."""
        return max(phase.checkpoint_peak for phase in self.phases)

    @property
    def seconds(self) -> float:
        """Seconds of all steps."""
        return sum(phase.seconds for phase in self.phases)


def make_plan(config: RunConfig, *, probed: bool = False, alternatives: bool = True) -> Plan:
    """Predict what a configuration takes.

    Args:
        probed: also take real steps of each phase; their peak and time replace the predicted ones.
        alternatives: also predict the methods, bases and kinds of activation checkpointing that were not chosen.

    Raises:
        UserError: the run would refuse the configuration for the same reason.
        RunStopped: a real step failed, for example for lack of memory.
    """
    device, process = choose_device(config.device), process_bytes()
    phases = [phase_cost(config, name, first, steps, process, device) for name, first, steps in phases_of(config)]
    if probed:
        phases = [replace(phase, measured=probe(config, phase.name)) for phase in phases]
    adaptive_switch = adaptive_of(config).warm_start is not None
    others = alternatives_of(config, process, device) if alternatives else []
    return Plan(
        config.method,
        str(device),
        process,
        phases,
        most_restarts(config),
        adaptive_switch,
        others,
        _notes(config, device),
    )


def _notes(config: RunConfig, device: torch.device) -> list[str]:
    """Say which dtype was chosen, which parameters never train, and what gets no factors."""
    with torch.device("meta"):
        model = open_configured_model(config, trust_remote_code=config.model.trust_remote_code)
    _, dtype_line = settle_dtype(config, device, lambda: model)
    unused = leave_out_unused(model, config.data.sequence_length)
    return [line for line in (dtype_line, unused, *lowrank_notes(config, model)) if line]


def as_figures(plan: Plan) -> dict[str, Any]:
    """Convert a plan to the tree of `relora plan --json`, with the sums that the table shows."""
    tree = asdict(plan)
    for phase, cost in zip(tree["phases"], plan.phases, strict=True):
        phase |= {name: getattr(cost, name) for name in ("predicted_peak", "peak", "checkpoint_peak", "seconds")}
    return {**tree, "peak": plan.peak, "seconds": plan.seconds}
