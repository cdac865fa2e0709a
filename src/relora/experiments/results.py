"""What a comparison found: its runs, a row for each method, and all of it as figures."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from relora.experiments.launch import Outcome


@dataclass(frozen=True)
class Attempt:
    """A run as it was asked for."""

    method: str
    rate: float
    length: float
    """As a share of the configured run."""
    seed: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """One method: a row of the table."""

    method: str
    overrides: tuple[str, ...]
    rate: float
    at_edge: bool
    """Whether a better rate may lie beyond those that were tried."""
    tuning_tokens: int
    """Of all runs by which the rate was chosen, the full one at the first seed included; 0 where none was."""
    outcomes: tuple[Outcome, ...]
    """One for each seed, the first seed first."""

    @property
    def diverged(self) -> int:
        """How many of the runs."""
        return sum(outcome.diverged for outcome in self.outcomes)

    @property
    def perplexity(self) -> float:
        """Mean over the seeds; infinite if a run diverged."""
        return fmean(math.inf if one.perplexity is None else one.perplexity for one in self.outcomes)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None for a single one, or if a run diverged."""
        found = [outcome.perplexity for outcome in self.outcomes if outcome.perplexity is not None]
        return stdev(found) if 1 < len(found) == len(self.outcomes) else None

    def mean(self, figure: str) -> float:
        """Of a figure of the outcomes."""
        return fmean(getattr(outcome, figure) for outcome in self.outcomes)


@dataclass(frozen=True)
class Comparison:
    """All of it."""

    folder: Path
    results: list[Result]
    attempts: list[tuple[Attempt, Outcome]]
    """Every run, in the order in which they were asked for."""

    def ratio(self, result: Result) -> float | None:
        """Perplexity over that of full rank; None where one of them is not there."""
        full = next((one.perplexity for one in self.results if one.method == "full"), math.inf)
        return result.perplexity / full if math.isfinite(full) and math.isfinite(result.perplexity) else None


def as_figures(comparison: Comparison) -> dict[str, Any]:
    """For another program to read; a figure that a diverged run does not have is None."""
    results = [
        {
            **asdict(one),
            "perplexity": one.perplexity if math.isfinite(one.perplexity) else None,
            "spread": one.spread,
            "of_full": comparison.ratio(one),
        }
        for one in comparison.results
    ]
    attempts = [{**asdict(attempt), "outcome": asdict(outcome)} for attempt, outcome in comparison.attempts]
    return {"results": results, "attempts": attempts}
