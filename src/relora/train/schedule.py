"""One object answers every question about time: the learning rate, the phase, the cycle, and whether a restart is due.

A step is numbered by the optimizer steps done before it: `lr_factor(t)` belongs to step t = 0 ... total_steps - 1, and
an event "at t" happens just before step t. Everything is a pure function of t, so a resumed run needs no replay and
nothing can drift.

    t < warmup_steps                   t / warmup_steps
    otherwise                          m + (1 - m) (1 + cos(pi (t - warmup) / (total - warmup))) / 2
    less than w after a boundary b     (t - b) / w of the value that the lines above give at b + w

with m = min_lr_ratio and w = restart_warmup_steps.

Boundaries are the switch from warm start to low rank (fresh factors start cold there, too) and every restart. Cycle k
lasts restart_every_steps · restart_growth^k steps; with turns it has so many restarts, each of a part of the factors.
Whether everything dips at a boundary, or the factors alone, is `restart_ramp`. Without growth and turns this is the
jagged cosine of ReLoRA (arXiv 2307.05695, section 3), equal to the published code's for every argument that it
accepts (no warm start: there that is a second run), and with none of its divisibility conditions.

With `switch_warmup_steps` the switch has a climb of its own, of the factors alone: they are new to their optimizer, all
else goes on. Restarts within it do not end it.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Literal

Phase = Literal["full", "warm_start", "low_rank"]
Ramp = Literal["all", "factors"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The timetable of a run, in optimizer steps.

    Args:
        total_steps: length of the run.
        warmup_steps: linear warm-up at its start.
        warm_start_steps: full-rank steps before the low-rank phase; `total_steps` for a run that stays at full rank.
        restart_every_steps: length of the first cycle, from the end of the warm start; None for no restarts (LoRA).
        restart_growth: every cycle is so many times as long as the one before.
        restart_turns: restarts in a cycle, each of another part of the factors; 1 for all of them at its end.
        restart_until: no restart after this share of the run.
        restart_warmup_steps: steps of the learning rate's climb after a boundary.
        restart_ramp: whose rate climbs there: everything's, or that of the factors drawn anew.
        switch_warmup_steps: steps of the factors' climb after the switch; None for what a restart has.
        restart_steps: the restarts themselves, where a run decides on them; None for those of the lengths above.
        min_lr_ratio: where the cosine ends, as a share of the peak.

    Raises:
        ValueError: a length is negative or does not fit into the one that holds it.
    """

    total_steps: int
    warmup_steps: int = 0
    warm_start_steps: int = 0
    restart_every_steps: int | None = None
    restart_growth: float = 1.0
    restart_turns: int = 1
    restart_until: float = 1.0
    restart_warmup_steps: int = 0
    restart_ramp: Ramp = "all"
    switch_warmup_steps: int | None = None
    restart_steps: tuple[int, ...] | None = None
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
        for name, steps in (
            ("restart_warmup_steps", self.restart_warmup_steps),
            ("switch_warmup_steps", self.switch_warmup_steps or 0),
        ):
            if steps < 0:
                raise ValueError(f"{name} ({steps}) must not be negative")
        if self.restart_every_steps is not None and self.restart_every_steps <= self.restart_warmup_steps:
            raise ValueError(
                f"restart_every_steps ({self.restart_every_steps}) must exceed "
                f"restart_warmup_steps ({self.restart_warmup_steps})"
            )
        if self.restart_growth < 1:
            raise ValueError(f"restart_growth ({self.restart_growth}) must be 1 or more")
        if not 1 <= self.restart_turns <= (self.restart_every_steps or self.restart_turns):
            raise ValueError(f"restart_turns ({self.restart_turns}) must lie in 1 ... restart_every_steps")
        for name, share in (("restart_until", self.restart_until), ("min_lr_ratio", self.min_lr_ratio)):
            if not 0 < share <= 1:
                raise ValueError(f"{name} ({share}) must lie in (0, 1]")
        starts = (self.warm_start_steps, *(self.restart_steps or ()))
        if any(later <= earlier for earlier, later in pairwise(starts)):
            raise ValueError(f"restart_steps must ascend from warm_start_steps ({self.warm_start_steps})")

    def lr_factor(self, step: int, turn: int | None = None) -> float:
        """Learning rate of a step, as a share of the peak: of the factors.

        Args:
            turn: of those that restart at this turn alone.
        """
        start = self.cycle_start(step) if turn is None else self._turn_start(step, turn)
        climb = self._after_restart(step, start)
        if self.switch_warmup_steps is None or self.phase(step) != "low_rank":
            return climb
        return min(climb, self._climbing(step, self.warm_start_steps, self.switch_warmup_steps))

    def rest_lr_factor(self, step: int) -> float:
        """The same of what is no factor."""
        return self._after_restart(step, self.cycle_start(step)) if self.restart_ramp == "all" else self._smooth(step)

    def phase(self, step: int) -> Phase:
        """`full` in a run without a low-rank phase, else `warm_start` or `low_rank`."""
        if self.warm_start_steps == self.total_steps:
            return "full"
        return "low_rank" if step >= self.warm_start_steps else "warm_start"

    def switch_due(self, step: int) -> bool:
        """Whether the low-rank phase begins just before this step."""
        return step == self.warm_start_steps < self.total_steps

    def restart_due(self, step: int) -> bool:
        """Whether factors are merged and drawn anew just before this step."""
        return self.cycle(step) > 0 and self.restarts[self.cycle(step) - 1] == step

    def cycle(self, step: int) -> int:
        """Restarts done before this step, the one just before it included."""
        return bisect_right(self.restarts, step)

    def cycle_start(self, step: int) -> int:
        """The last boundary at or before this step; 0 before the first."""
        if self.phase(step) != "low_rank":
            return 0
        cycle = self.cycle(step)
        return self.restarts[cycle - 1] if cycle else self.warm_start_steps

    @cached_property
    def restarts(self) -> tuple[int, ...]:
        """The steps at which a restart is due; one that would leave less than a warm-up before the end is not done."""
        if self.restart_steps is not None:
            return self.restart_steps
        if self.restart_every_steps is None or self.warm_start_steps == self.total_steps:
            return ()
        found: list[int] = []
        start, length = self.warm_start_steps, float(self.restart_every_steps)
        while True:
            for turn in range(1, self.restart_turns + 1):
                step = start + round(length * turn / self.restart_turns)
                if step > self.last_restart:
                    return tuple(found)
                found.append(step)
            start, length = found[-1], length * self.restart_growth

    @property
    def last_restart(self) -> int:
        """No restart is due after this step."""
        return min(self.total_steps - max(self.restart_warmup_steps, 1), int(self.restart_until * self.total_steps))

    def decided(self, switch_step: int | None, restart_steps: tuple[int, ...] | None) -> "Schedule":
        """The same with the switch and the restarts on which a run decided; None leaves what was planned.

        What it says of the steps before a decision stays what it said.
        """
        warm_start_steps = self.warm_start_steps if switch_step is None else switch_step
        return replace(self, warm_start_steps=warm_start_steps, restart_steps=restart_steps)

    def _turn_start(self, step: int, turn: int) -> int:
        """The last boundary of one part of the factors at or before this step; 0 before the first."""
        if self.phase(step) != "low_rank":
            return 0
        done = self.cycle(step)
        own = done - (done - 1 - turn) % self.restart_turns  # the last cycle up to this one that began with the turn
        return self.restarts[own - 1] if own > 0 else self.warm_start_steps

    def _after_restart(self, step: int, start: int) -> float:
        """Of what was drawn anew, or dips, at `start`."""
        at_switch = start == self.warm_start_steps and self.switch_warmup_steps is not None
        return self._smooth(step) if at_switch else self._climbing(step, start, self.restart_warmup_steps)

    def _climbing(self, step: int, start: int, steps: int) -> float:
        """From 0 at `start` to where the rate without dips is after so many steps, and that from there on."""
        if start > 0 and step - start < steps:
            return (step - start) / steps * self._smooth(start + steps)
        return self._smooth(step)

    def _smooth(self, step: int) -> float:
        """Warm-up and cosine, without dips."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        progress = min((step - self.warmup_steps) / (self.total_steps - self.warmup_steps), 1.0)
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
