"""The timetable of a run: learning rate, phase, cycle, and whether a restart is due, all answered by one object.

A step is numbered by the optimizer steps done before it: `lr_factor(t)` belongs to step t = 0 ... total_steps - 1, and
an event "at t" happens just before step t. Every answer is a pure function of t, so a resumed run replays nothing, and
the learning rate cannot disagree with the restarts. The learning rate as a share of its peak:

    t < warmup_steps                   t / warmup_steps
    otherwise                          m + (1 - m) (1 + cos(pi (t - warmup) / (total - warmup))) / 2
    less than w after a boundary b     (t - b) / w of the value that the two lines above give at b + w

with m = min_lr_ratio and w = restart_warmup_steps. The third line is the warm-up after a boundary.

Boundaries are the switch from warm start to low rank (where the factors are new as well) and every restart. Cycle k
lasts restart_every_steps · restart_growth^k steps; with restart_turns > 1 it has that many restarts, each of another
part of the factors. `restart_ramp` says whether the warm-up after a boundary applies to the whole model or to the
factors alone. With growth and turns at 1 this is the learning rate of ReLoRA (arXiv 2307.05695, section 3), equal to
that of the published code for every argument that the code accepts, and without its conditions on divisibility. A warm
start is the one exception: there it is a second run.

With `switch_warmup_steps` the switch has a warm-up of its own length, of the factors alone: they are new to their
optimizer, while everything else goes on. A restart within that warm-up does not end it.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Literal

Phase = Literal["full", "warm_start", "low_rank"]
WarmupScope = Literal["all", "factors"]
"""Scope of the warm-up after a boundary: everything that trains, or the factors alone."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The timetable of a run, in optimizer steps.

    Args:
        total_steps: length of the run.
        warmup_steps: linear warm-up at its start.
        warm_start_steps: full-rank steps before the low-rank phase; `total_steps` for a run that stays at full rank.
        restart_every_steps: length of the first cycle, from the end of the warm start; None for no restarts (LoRA).
        restart_growth: length of a cycle over that of the cycle before it.
        restart_turns: restarts in a cycle, each of another part of the factors; 1 to restart all of them at its end.
        restart_until: share of the run after which there is no restart.
        restart_warmup_steps: steps of the linear warm-up after a boundary.
        restart_ramp: what that warm-up applies to: everything (`all`), or the factors that were redrawn (`factors`).
        switch_warmup_steps: steps of the factors' warm-up after the switch; None for a warm-up as after a restart.
        restart_steps: the restarts themselves, where a run decides on them; None to compute them from the above.
        min_lr_ratio: end of the cosine, as a share of the peak.

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
    restart_ramp: WarmupScope = "all"
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
        """Learning rate of the factors at a step, as a share of their peak.

        Args:
            turn: which part of the factors, 0 ... restart_turns - 1; None for the part that restarted last.
        """
        start = self.cycle_start(step) if turn is None else self._turn_start(step, turn)
        factor = self._after_boundary(step, start)
        if self.switch_warmup_steps is None or self.phase(step) != "low_rank":
            return factor
        return min(factor, self._warming_up(step, self.warm_start_steps, self.switch_warmup_steps))

    def rest_lr_factor(self, step: int) -> float:
        """Learning rate at a step of everything except the factors, as a share of its peak."""
        if self.restart_ramp == "all":
            return self._after_boundary(step, self.cycle_start(step))
        return self._cosine(step)

    def phase(self, step: int) -> Phase:
        """Phase of a step: `full` in a run without a low-rank phase, otherwise `warm_start` or `low_rank`."""
        if self.warm_start_steps == self.total_steps:
            return "full"
        return "low_rank" if step >= self.warm_start_steps else "warm_start"

    def switch_due(self, step: int) -> bool:
        """Whether the low-rank phase begins just before this step."""
        return step == self.warm_start_steps < self.total_steps

    def restart_due(self, step: int) -> bool:
        """Whether factors are merged and redrawn just before this step."""
        return self.cycle(step) > 0 and self.restarts[self.cycle(step) - 1] == step

    def cycle(self, step: int) -> int:
        """Number of restarts done before this step, including one that is due just before it."""
        return bisect_right(self.restarts, step)

    def cycle_start(self, step: int) -> int:
        """Step of the last boundary at or before this step; 0 before the first boundary."""
        if self.phase(step) != "low_rank":
            return 0
        cycle = self.cycle(step)
        return self.restarts[cycle - 1] if cycle else self.warm_start_steps

    @cached_property
    def restarts(self) -> tuple[int, ...]:
        """Steps at which a restart is due; none that leaves fewer steps than its warm-up before the end of the run."""
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
        """Step after which no restart is due."""
        return min(self.total_steps - max(self.restart_warmup_steps, 1), int(self.restart_until * self.total_steps))

    def decided(self, switch_step: int | None, restart_steps: tuple[int, ...] | None) -> "Schedule":
        """Return this schedule with the switch and the restarts that a run decided on; None keeps what was planned.

        The answers for steps before a decision do not change by it.

        Raises:
            ValueError: these decisions do not fit this schedule.
        """
        warm_start_steps = self.warm_start_steps if switch_step is None else switch_step
        return replace(self, warm_start_steps=warm_start_steps, restart_steps=restart_steps)

    def _turn_start(self, step: int, turn: int) -> int:
        """Step of the last boundary of one part of the factors at or before this step; 0 before the first boundary."""
        if self.phase(step) != "low_rank":
            return 0
        done = self.cycle(step)
        # restart number n (from 1) is one of turn (n - 1) % restart_turns; this is the last one of `turn`, if positive
        last_own = done - (done - 1 - turn) % self.restart_turns
        return self.restarts[last_own - 1] if last_own > 0 else self.warm_start_steps

    def _after_boundary(self, step: int, start: int) -> float:
        """Factor at a step that follows the boundary `start`, with the warm-up of a restart.

        A switch with a warm-up length of its own gets no warm-up here: `lr_factor` applies that one to the factors.
        """
        if start == self.warm_start_steps and self.switch_warmup_steps is not None:
            return self._cosine(step)
        return self._warming_up(step, start, self.restart_warmup_steps)

    def _warming_up(self, step: int, start: int, steps: int) -> float:
        """Factor with a linear warm-up over `steps` steps from 0 at `start`; it ends at the cosine's value there.

        Afterwards, and where `start` is 0 (no boundary yet), the factor is that of the run's own warm-up and cosine.
        """
        if start > 0 and step - start < steps:
            return (step - start) / steps * self._cosine(start + steps)
        return self._cosine(step)

    def _cosine(self, step: int) -> float:
        """Factor of the run's own warm-up and cosine, without any warm-up after a boundary."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        progress = min((step - self.warmup_steps) / (self.total_steps - self.warmup_steps), 1.0)
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
