"""Where a run stands, and what is saved of it.

Weights and moments are the only state. The step decides everything else: learning rate, phase, cycle, batch, every
draw.
"""

import platform
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TrainState:
    """Optimizer steps done, and tokens trained on."""

    step: int = 0
    tokens: int = 0

    def after(self, tokens: int) -> "TrainState":
        """The state one step of `tokens` later."""
        return TrainState(self.step + 1, self.tokens + tokens)


def numeric_environment(device: torch.device, dtype: str) -> dict[str, str | int]:
    """What changes the last bits of a result though the configuration is the same. Saved with every checkpoint."""
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "dtype": dtype,
    }
