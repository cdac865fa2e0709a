"""Configuration of `relora pretrain`."""

from typing import Any, Literal

from pydantic import model_validator

from relora.config.sections import (
    DataSettings,
    PretrainingLowRankSettings,
    SampleSettings,
    ScheduleSettings,
    WarmStart,
    WarmStartSettings,
)
from relora.config.training import TrainingConfig
from relora.config.variants import fill_variant


class RunConfig(TrainingConfig):
    """All keys of `relora pretrain`."""

    data: DataSettings
    method: Literal["full", "lora", "relora"] = "relora"
    """Training method: full rank throughout, or factors after a warm start, without or with restarts."""
    variant: Literal["default", "paper"] = "default"
    """Defaults of restarts: those that came nearest to full rank in docs/results.md, or the paper's Algorithm 1."""
    lowrank: PretrainingLowRankSettings = PretrainingLowRankSettings()
    warm_start: WarmStart = WarmStartSettings()
    schedule: ScheduleSettings
    samples: SampleSettings = SampleSettings()

    @model_validator(mode="before")
    @classmethod
    def _fill_variant(cls, tree: Any) -> Any:
        """Give keys that are not given the defaults of the variant."""
        return fill_variant(tree) if isinstance(tree, dict) else tree

    @property
    def batch_tokens(self) -> int:
        """Tokens per optimizer step."""
        return self.batch.sequences * self.data.sequence_length

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.schedule.total_steps is not None:
            return self.schedule.total_steps
        assert self.schedule.total_tokens is not None  # ScheduleSettings has checked that one of the two is given
        return -(-self.schedule.total_tokens // self.batch_tokens)  # rounded up

    @property
    def switch_warmup_steps(self) -> int | None:
        """Warm-up of the factors after the switch, in steps; None for that of a restart, as in the paper."""
        if self.method == "relora" and self.variant == "paper":
            return self.lowrank.warmup_steps
        return self.schedule.warmup_steps if self.lowrank.warmup_steps is None else self.lowrank.warmup_steps

    @property
    def earliest_switch(self) -> int:
        """First step at which the warm start can end: with `auto`, two whole windows after the warm-up."""
        start = self.warm_start
        if not start.auto:
            return start.steps
        warmup_windows = -(-self.schedule.warmup_steps // start.window_steps)  # rounded up
        return (warmup_windows + 2) * start.window_steps

    @model_validator(mode="after")
    def _check_residual(self) -> "RunConfig":
        """Refuse the residual on weights that are stored too coarsely, or without the moments of AdamW."""
        if self.method == "full" or not self.lowrank.residual.scale:
            return self
        stored = "bf16" if (self.lowrank.base, self.precision.dtype) == ("auto", "bf16") else self.lowrank.base
        if stored not in ("auto", "fp32"):
            raise ValueError(
                f"lowrank.residual moves frozen weights in every step, and {stored} would round them each time; "
                "set `lowrank.base: fp32`"
            )
        if self.optimizer.name != "adamw":
            raise ValueError(
                f"lowrank.residual takes its rate from the moments of adamw, not of {self.optimizer.name}; "
                "set `optimizer.name: adamw`"
            )
        if self.optimizer.factors != "adamw":
            raise ValueError(
                "lowrank.residual takes its rate from AdamW's moments of the factors; set `optimizer.factors: adamw`"
            )
        return self

    @model_validator(mode="after")
    def _check_takeover(self) -> "RunConfig":
        """Refuse a takeover without a warm start."""
        if self.method != "full" and self.warm_start.takeover and not self.warm_start.steps:
            raise ValueError(
                "warm_start.takeover: without a warm start there is nothing to take over; raise `warm_start.steps` or "
                "set `takeover: false`"
            )
        return self

    @model_validator(mode="after")
    def _check_signals(self) -> "RunConfig":
        """Refuse decisions by measured signals where these signals are not measured."""
        start, by_moments = self.warm_start, self.lowrank.ranks == "spectrum"
        if self.method == "full" or not (start.auto or by_moments):
            return self
        by = {"optimizer.name": self.optimizer.name, "optimizer.matrices": self.optimizer.matrices}
        if unfit := next((own_key for own_key, own in by.items() if own != "adamw"), None):
            key = "warm_start.auto" if start.auto else "lowrank.ranks: spectrum"
            raise ValueError(f"{key} reads the moments of adamw, not of {by[unfit]}; set `{unfit}: adamw`")
        if by_moments and not start.steps:
            raise ValueError("lowrank.ranks: spectrum reads the moments of a warm start; give it `warm_start.steps`")
        if start.auto and self.earliest_switch >= start.steps:
            raise ValueError(
                f"warm_start.auto compares two windows after the warm-up, first at step {self.earliest_switch}; "
                f"raise its bound, warm_start.steps ({start.steps}), beyond that, or lower `warm_start.window_steps`"
            )
        return self

    @model_validator(mode="after")
    def _check_lengths(self) -> "RunConfig":
        """Refuse a run that is too long, and a warm-up or a warm start that is as long as the run."""
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
