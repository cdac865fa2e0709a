"""What `relora pretrain` reads."""

from typing import Literal

from pydantic import model_validator

from relora.config.sections import DataSettings, SampleSettings, ScheduleSettings, WarmStartSettings
from relora.config.training import TrainingConfig


class RunConfig(TrainingConfig):
    """Everything that `relora pretrain` reads."""

    data: DataSettings
    method: Literal["full", "lora", "relora"] = "relora"
    warm_start: WarmStartSettings = WarmStartSettings()
    schedule: ScheduleSettings
    samples: SampleSettings = SampleSettings()

    @property
    def batch_tokens(self) -> int:
        """Tokens per optimizer step."""
        return self.batch.sequences * self.data.sequence_length

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.schedule.total_steps is not None:
            return self.schedule.total_steps
        assert self.schedule.total_tokens is not None  # ScheduleSettings sees to it
        return -(-self.schedule.total_tokens // self.batch_tokens)

    @model_validator(mode="after")
    def _times_fit(self) -> "RunConfig":
        total = self.total_steps
        if total >= 10**8:
            raise ValueError(f"schedule: a run has fewer than 100 million steps, this one would have {total:,}")
        if self.schedule.warmup_steps >= total:
            raise ValueError(
                f"schedule.warmup_steps ({self.schedule.warmup_steps}) must be shorter than the run ({total} steps)"
            )
        if self.method != "full" and self.warm_start.steps >= total:
            raise ValueError(
                f"warm_start.steps ({self.warm_start.steps}) must be shorter than the run ({total} steps); "
                "for a full-rank run set `method: full`"
            )
        return self
