"""One object answers every question about time: the learning rate, the phase, the cycle, and whether a restart is due.

A step is numbered by the optimizer steps done before it: `lr_factor(t)` belongs to step t = 0 ... total_steps - 1, and
an event "at t" happens just before step t. Everything is a pure function of t, so a resumed run needs no replay and
nothing can drift.

    t < warmup_steps                   t / warmup_steps
    otherwise                          m + (1 - m) (1 + cos(pi (t - warmup) / (total - warmup))) / 2
    less than w after a boundary b     (t - b) / w of the value that the lines above give at b + w

with m = min_lr_ratio and w = restart_warmup_steps.

Boundaries are the switch from warm start to low rank (fresh factors start cold there, too) and every restart. This is
the jagged cosine of ReLoRA (arXiv 2307.05695, section 3), equal to the published code's for every argument that it
accepts (no warm start: there that is a second run), and with none of its divisibility conditions.
"""

import math
from dataclasses import dataclass
from typing import Literal

Phase = Literal["full", "warm_start", "low_rank"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The timetable of a run, in optimizer steps.

    Args:
        total_steps: length of the run.
        warmup_steps: linear warm-up at its start.
        warm_start_steps: full-rank steps before the low-rank phase; `total_steps` for a run that stays at full rank.
        restart_every_steps: steps between restarts, counted from the end of the warm start; None for no restarts
            (LoRA).
        restart_warmup_steps: steps of the learning rate's climb after a boundary.
        min_lr_ratio: where the cosine ends, as a share of the peak.

    Raises:
        ValueError: a length is negative or does not fit into the one that holds it.
    """

    total_steps: int
    warmup_steps: int = 0
    warm_start_steps: int = 0
    restart_every_steps: int | None = None
    restart_warmup_steps: int = 0
    min_lr_ratio: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_steps < self.total_steps:
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) must lie in 0 ... total_steps - 1 ({self.total_steps - 1})"
            )
        if not 0 <= self.warm_start_steps <= self.total_steps:
            raise ValueError(
                f"warm_start_steps ({self.warm_start_steps}) must lie in 0 ... total_steps ({self.total_steps})"
            )
        if self.restart_warmup_steps < 0:
            raise ValueError(f"restart_warmup_steps ({self.restart_warmup_steps}) must not be negative")
        if self.restart_every_steps is not None and self.restart_every_steps <= self.restart_warmup_steps:
            raise ValueError(
                f"restart_every_steps ({self.restart_every_steps}) must exceed "
                f"restart_warmup_steps ({self.restart_warmup_steps})"
            )
        if not 0 < self.min_lr_ratio <= 1:
            raise ValueError(f"min_lr_ratio ({self.min_lr_ratio}) must lie in (0, 1]")

    def lr_factor(self, step: int) -> float:
        """Learning rate of a step, as a share of the peak."""
        since = step - self.cycle_start(step)
        if self.cycle_start(step) > 0 and since < self.restart_warmup_steps:
            return since / self.restart_warmup_steps * self._smooth(step - since + self.restart_warmup_steps)
        return self._smooth(step)

    def phase(self, step: int) -> Phase:
        """`full` in a run without a low-rank phase, else `warm_start` or `low_rank`."""
        if self.warm_start_steps == self.total_steps:
            return "full"
        return "low_rank" if step >= self.warm_start_steps else "warm_start"

    def switch_due(self, step: int) -> bool:
        """Whether the low-rank phase begins just before this step."""
        return step == self.warm_start_steps < self.total_steps

    def restart_due(self, step: int) -> bool:
        """Whether the factors are merged and drawn anew just before this step."""
        return step in self.restarts

    def cycle(self, step: int) -> int:
        """Restarts done before this step, the one just before it included."""
        if self.restart_every_steps is None or step < self.warm_start_steps:
            return 0
        return min((step - self.warm_start_steps) // self.restart_every_steps, len(self.restarts))

    def cycle_start(self, step: int) -> int:
        """The last boundary at or before this step; 0 before the first."""
        if self.phase(step) != "low_rank":
            return 0
        return self.warm_start_steps + self.cycle(step) * (self.restart_every_steps or 0)

    @property
    def restarts(self) -> range:
        """The steps at which a restart is due; one that would leave less than a warm-up before the end is not done."""
        if self.restart_every_steps is None or self.warm_start_steps == self.total_steps:
            return range(0)
        first = self.warm_start_steps + self.restart_every_steps
        last = self.total_steps - max(self.restart_warmup_steps, 1)
        return range(first, last + 1, self.restart_every_steps)

    def _smooth(self, step: int) -> float:
        """Warm-up and cosine, without dips."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        progress = min((step - self.warmup_steps) / (self.total_steps - self.warmup_steps), 1.0)
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
