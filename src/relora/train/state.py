"""Where a run stands, and what is saved of it.

Weights and moments are the only state. The step decides everything else: learning rate, phase, cycle, batch, every
draw. The counts beside it stay 0 as long as every loss is a number; what a run decides by its own signals, and the
losses that it decides by, stay empty where nothing is left to it.
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
    """What a run has settled by its own signals (see `train.decisions`)."""

    switch_step: Count | None = None
    """Where the warm start ended; None: not yet, or as planned."""
    restart_steps: tuple[Count, ...] | None = None
    """The restarts so far; None: as planned."""
    ranks: dict[str, Count] = field(default_factory=dict)
    """Of the layers, by path; empty: not yet, or one for all."""

    def applied_to(self, planned: Schedule) -> Schedule:
        """The timetable in force; `UserError` where these cannot be decisions of that run."""
        try:
            return planned.decided(self.switch_step, self.restart_steps)
        except ValueError as error:
            raise UserError(f"the saved decisions are of another run: {error}") from None


@dataclass(frozen=True)
class LossWindow:
    """The training loss since it was last looked at, beside that of the window before."""

    total: float = 0.0
    steps: Count = 0
    before: float | None = None
    """Mean of the window before; None where there is none to compare with."""

    @property
    def mean(self) -> float:
        """Of the steps so far."""
        return self.total / self.steps

    @property
    def fall(self) -> float | None:
        """By how much of itself the mean has fallen since the window before."""
        if self.before is None:
            return None
        return (self.before - self.mean) / self.before if self.before else 0.0

    def is_flat(self, slope: float) -> bool:
        """Whether the mean has fallen by less than `slope` of itself; not before there are two windows."""
        return self.fall is not None and self.fall < slope

    def with_loss(self, loss: float) -> "LossWindow":
        """One step later."""
        return replace(self, total=self.total + loss, steps=self.steps + 1)

    def closed(self) -> "LossWindow":
        """The next window, before its first step."""
        return LossWindow(before=self.mean)


@dataclass(frozen=True)
class TrainState:
    """Optimizer steps done, and tokens trained on."""

    step: Count = 0
    tokens: Count = 0
    incidents: Count = 0
    """Steps that were skipped, or gone back from, because their loss or gradient was not finite."""
    skipped_batches: Count = 0
    """How far the data is ahead of the step, since the run went back past batches that it will not see again."""
    decisions: Decisions = Decisions()
    window: LossWindow = LossWindow()

    @property
    def batch(self) -> int:
        """The batch that the next step trains on."""
        return self.step + self.skipped_batches

    def after(self, tokens: int, loss: float | None = None) -> "TrainState":
        """The state one step of `tokens` later; `loss` is given where something will be decided by it."""
        window = self.window if loss is None else self.window.with_loss(loss)
        return replace(self, step=self.step + 1, tokens=self.tokens + tokens, window=window)

    def skipping(self) -> "TrainState":
        """The state one step later that trained on nothing."""
        return replace(self, step=self.step + 1, incidents=self.incidents + 1)

    def gone_back_from(self, failed: "TrainState") -> "TrainState":
        """This earlier state, with the data set past all that `failed` has seen, its next batch included."""
        return replace(self, incidents=failed.incidents + 1, skipped_batches=failed.batch + 1 - self.step)


def numeric_environment(device: torch.device, dtype: str) -> dict[str, str | int]:
    """What changes the last bits of a result though the configuration is the same. Saved with every checkpoint."""
    return {
        "relora": version("relora"),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "dtype": dtype,
    }
