"""Where a run stands, and what is saved of it.

Weights and moments are the only state. The step decides everything else: learning rate, phase, cycle, batch, every
draw. The two counts beside it stay 0 as long as every loss is a number.
"""

import platform
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Annotated

import torch
from pydantic import Field

Count = Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True)
class TrainState:
    """Optimizer steps done, and tokens trained on."""

    step: Count = 0
    tokens: Count = 0
    incidents: Count = 0
    """Steps that were skipped, or gone back from, because their loss or gradient was not finite."""
    skipped_batches: Count = 0
    """How far the data is ahead of the step, since the run went back past batches that it will not see again."""

    @property
    def batch(self) -> int:
        """The batch that the next step trains on."""
        return self.step + self.skipped_batches

    def after(self, tokens: int) -> "TrainState":
        """The state one step of `tokens` later."""
        return replace(self, step=self.step + 1, tokens=self.tokens + tokens)

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
