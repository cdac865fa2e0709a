"""Successive halving: which trial goes on from one rung to the next (ASHA, Li et al. 2018, arXiv 1810.05934).

    rungs 0.25, 0.5, 1:   every trial runs to a quarter; the better half of them to a half; of these the better half on

Trials come one after the other, and nobody waits for a round to be full: as soon as n trials have come to a rung, the
best n * rung / next of them may go on. When nothing more can come to a rung, at least one goes on, so that a search
ends with a trial that is finished.

A rung is a share of the whole run. A trial goes to it by the schedule of its whole run, and stops there with a
checkpoint, from which it goes on when its turn comes (`relora.recipes.job`), to the same bits as a run that went
through. Runs whose schedule is shortened instead would be ranked in another order: a learning rate that decays within
the first quarter favours higher rates than the same quarter of the whole schedule. The price: early rungs compare rates
that have not decayed, which favours lower ones a little; it is paid once, not once for each rung.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from relora.errors import UserError

DEFAULT_RUNGS = (0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Trial:
    """One trial of a study, as its storage has it."""

    number: int
    state: str
    """`running`, `complete`, `pruned` or `failed`; a trial that waits to be promoted is running, too."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """Key -> what was chosen."""
    values: dict[str, Any] = field(default_factory=dict)
    """Key of the configuration -> value."""
    losses: dict[int, float] = field(default_factory=dict)
    """Percent of the run -> held-out loss there; infinite if the numbers stopped being finite."""
    target: int = 0
    """Rung that the trial has been sent to."""
    repeats: int | None = None
    """Trial whose settings this one repeats with another seed."""
    seed: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    """Tokens, seconds and bytes that the trial has taken so far."""
    reason: str | None = None
    """Why the trial failed, or why it was given up."""

    @property
    def loss(self) -> float | None:
        """Loss at the highest rung that was reached; None before the first."""
        return self.losses[max(self.losses)] if self.losses else None

    @property
    def share(self) -> float:
        """Share of the run that is done, as far as the storage knows."""
        return max(self.losses, default=0) / 100

    @property
    def diverged(self) -> bool:
        """Whether the numbers of the run stopped being finite."""
        return self.loss is not None and not math.isfinite(self.loss)


def percent(share: float) -> int:
    """Return the name of a rung in the storage: percent of the run."""
    return round(100 * share)


def parse_rungs(text: str) -> tuple[float, ...]:
    """Read the value of `--rungs`, such as `0.25,0.5,1`.

    Raises:
        UserError: these are no ascending shares that end with 1.
    """
    try:
        rungs = tuple(float(part) for part in text.split(","))
    except ValueError:
        rungs = ()
    names = [percent(rung) for rung in rungs if 0 < rung <= 1]
    rising = all(before < after for before, after in pairwise([0, *names]))
    if not rungs or rungs[-1] != 1 or len(names) < len(rungs) or not rising:
        raise UserError(f"--rungs {text}: give ascending shares of the run that end with 1, e.g. 0.25,0.5,1")
    return rungs


def is_pending(trial: Trial, rungs: Sequence[float]) -> bool:
    """Whether a trial is still on its way to the rung that it was sent to."""
    return trial.state == "running" and percent(rungs[trial.target]) not in trial.losses


def next_promotion(trials: Sequence[Trial], rungs: Sequence[float], *, more_to_come: bool) -> Trial | None:
    """Return the trial that should go on to the rung after its own, from the highest rung on; None if none should.

    Args:
        trials: all trials of the search, those that were given up and failed included.
        rungs: ascending shares of the run, the last of which is 1.
        more_to_come: whether trials will still be added.
    """
    found, open_below = None, more_to_come
    for index in range(len(rungs) - 1):
        open_below = open_below or any(is_pending(one, rungs) and one.target <= index for one in trials)
        candidate = _best_waiting(trials, rungs, index, at_least=0 if open_below else 1)
        if candidate is not None:
            found, open_below = candidate, True
    return found


def may_go_on(trial: Trial, index: int) -> bool:
    """Whether a trial at a rung is not out of the search: gone on, waiting, or finished."""
    return trial.target > index or trial.state == "running"


def _best_waiting(trials: Sequence[Trial], rungs: Sequence[float], index: int, *, at_least: int) -> Trial | None:
    """Return the best trial that waits at a rung, if it is among those that may go on."""
    name = percent(rungs[index])
    arrived = [trial for trial in trials if name in trial.losses]
    allowed = max(at_least, int(len(arrived) * rungs[index] / rungs[index + 1] + 1e-9))
    ranked = sorted(arrived, key=lambda trial: (trial.losses[name], trial.number))
    able = [trial for trial in ranked if math.isfinite(trial.losses[name]) and may_go_on(trial, index)]
    waiting = (trial for trial in able[:allowed] if trial.state == "running" and trial.target == index)
    return next(waiting, None)
