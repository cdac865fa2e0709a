"""How a search stands: its best trial, how many are done, running, waiting and given up, and the time left."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from relora.experiments.tune.rungs import Trial, is_pending
from relora.report.console import format_duration


@dataclass(frozen=True)
class Standing:
    """The standing of a search; as text it is half a line for the console."""

    trials: Sequence[Trial]
    rungs: Sequence[float]
    seconds_left: float | None

    def __str__(self) -> str:
        best = next(iter(best_trials(self.trials)), None)
        text = (
            "nothing measured yet"
            if best is None
            else f"best trial {best.number}, loss {loss_of(best, self.trials):.4f}"
        )
        if best is not None and best.state != "complete":
            text += f" at {max(best.losses)}% of the run"
        counts = self.counts()
        text += "; " + ", ".join(f"{count} {name}" for name, count in counts.items() if count or name != "failed")
        if self.seconds_left is not None:
            text += f"; about {format_duration(self.seconds_left)} left"
        return text

    def counts(self) -> dict[str, int]:
        """Return the number of trials that are done, running, waiting for a promotion, given up and failed."""
        pending = [trial for trial in self.trials if is_pending(trial, self.rungs)]
        return {
            "done": sum(trial.state == "complete" for trial in self.trials),
            "running": len(pending),
            "waiting": sum(trial.state == "running" for trial in self.trials) - len(pending),
            "pruned": sum(trial.state == "pruned" for trial in self.trials),
            "failed": sum(trial.state == "failed" for trial in self.trials),
        }


def best_trials(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials with a finite loss from the best to the worst.

    Those that reached a higher rung come first, since losses at different rungs do not compare; trials that were run
    with several seeds come before all others, by their mean. Repetitions are part of the trial that they repeat.
    """
    own = [trial for trial in trials if trial.repeats is None and trial.loss is not None and not trial.diverged]
    most_seeds = max((len(losses_of(trial, trials)) for trial in own), default=0)

    def rank(trial: Trial) -> tuple[bool, float, float, int]:
        losses = losses_of(trial, trials)
        return len(losses) < most_seeds, -trial.share, loss_of(trial, trials), trial.number

    return sorted(own, key=rank)


def losses_of(trial: Trial, trials: Sequence[Trial]) -> list[float]:
    """Return the loss of a trial and those of its finished repetitions with other seeds."""
    repeats = [one.loss for one in trials if one.repeats == trial.number and one.state == "complete"]
    return [loss for loss in (trial.loss, *repeats) if loss is not None]


def loss_of(trial: Trial, trials: Sequence[Trial]) -> float:
    """Return the loss of a trial at its highest rung, the mean over its seeds if it has several."""
    losses = losses_of(trial, trials)
    return fmean(losses) if losses else math.inf
