"""The progress of a run as counts, i.e. all of its state that is neither a weight nor a moment.

The step determines everything else: learning rate, phase, cycle, batch and every random draw. The counts of incidents
stay 0 as long as every loss is finite. The decisions of a run, and the losses that they depend on, stay empty unless
the configuration leaves decisions to the run (see `train.adaptive`).
"""

import platform
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Annotated

import torch
from pydantic import Field

from relora.errors import UserError
from relora.train.schedule import Schedule

Count = Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True)
class Decisions:
    """Decisions that a run has taken about its own timetable (see `train.adaptive`)."""

    switch_step: Count | None = None
    """Step at which the warm start ended; None where it has not ended yet or ends as planned."""
    restart_steps: tuple[Count, ...] | None = None
    """Steps of the restarts so far; None where restarts are as planned."""
    ranks: dict[str, Count] = field(default_factory=dict)
    """Rank of each layer, by path; empty where it is not decided yet or one rank holds for all layers."""

    def applied_to(self, planned: Schedule) -> Schedule:
        """Return the schedule in force.

        Raises:
            UserError: these cannot be decisions of a run with the schedule `planned`.
        """
        try:
            return planned.decided(self.switch_step, self.restart_steps)
        except ValueError as error:
            raise UserError(f"the saved decisions are of another run: {error}") from None


@dataclass(frozen=True)
class LossWindow:
    """Training loss since the last decision was considered, to be compared with that of the previous window."""

    total: float = 0.0
    """Sum of the losses, nats per token."""
    steps: Count = 0
    before: float | None = None
    """Mean of the previous window; None where there is none to compare with."""

    @property
    def mean(self) -> float:
        """Mean loss over the steps of this window so far."""
        return self.total / self.steps

    @property
    def fall(self) -> float | None:
        """Decrease of the mean since the previous window, as a share of the previous mean; None without one."""
        if self.before is None:
            return None
        return (self.before - self.mean) / self.before if self.before else 0.0

    def is_flat(self, slope: float) -> bool:
        """Whether the mean has fallen by less than the share `slope`; False in the first window."""
        return self.fall is not None and self.fall < slope

    def with_loss(self, loss: float) -> "LossWindow":
        """Return this window with the loss of one more step."""
        return replace(self, total=self.total + loss, steps=self.steps + 1)

    def closed(self) -> "LossWindow":
        """Return the next window, before its first step."""
        return LossWindow(before=self.mean)


@dataclass(frozen=True)
class TrainState:
    """Counts of a run between two steps, with its decisions; saved in every checkpoint."""

    step: Count = 0
    """Optimizer steps done, skipped ones included."""
    tokens: Count = 0
    """Valid tokens trained on."""
    incidents: Count = 0
    """Steps that were skipped or rewound from because something was not finite."""
    skipped_batches: Count = 0
    """Number of the next batch minus `step`: rewinds set the step back, but no batch is used again."""
    decisions: Decisions = Decisions()
    window: LossWindow = LossWindow()

    @property
    def batch(self) -> int:
        """Number of the batch that the next step trains on."""
        return self.step + self.skipped_batches

    def after(self, tokens: int, loss: float | None = None) -> "TrainState":
        """Return the state after one more step of `tokens` tokens; `loss` is given where a decision depends on it."""
        window = self.window if loss is None else self.window.with_loss(loss)
        return replace(self, step=self.step + 1, tokens=self.tokens + tokens, window=window)

    def skipping(self) -> "TrainState":
        """Return the state after one more step whose update was skipped."""
        return replace(self, step=self.step + 1, incidents=self.incidents + 1)

    def gone_back_from(self, failed: "TrainState") -> "TrainState":
        """Return this earlier state with the data set past every batch up to the one that `failed` stopped at."""
        return replace(self, incidents=failed.incidents + 1, skipped_batches=failed.batch + 1 - self.step)


def numeric_environment(device: torch.device, dtype: str) -> dict[str, str | int]:
    """Describe what can change the last bits of a result under one configuration; saved with every checkpoint."""
    return {
        "relora": version("relora"),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "dtype": dtype,
    }
