"""Outcomes of runs and of comparisons, as data that other modules fill in, write to JSON and make tables of.

run        -> PretrainingOutcome or FinetuningOutcome
method     -> MethodResult: the outcomes of one pretraining method at its best rate, one for each seed
comparison -> Comparison: the results of all methods, and every run by which they were found
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from relora.evaluation.text_metrics import TextScores
from relora.train.memory import HeldBytes


@dataclass(frozen=True, kw_only=True)
class PretrainingOutcome:
    """Result and cost of one pretraining run; the fields are those of its `outcome.json`."""

    folder: str
    diverged: bool
    seed: int
    lr: float
    lowrank_lr: float | None
    """Learning rate of the factors; None in a full-rank run."""
    loss: float | None
    """Held-out loss of the final model, nats per token; None if the run diverged."""
    perplexity: float | None
    """Held-out perplexity of the final model; None if the run diverged."""
    held_out_tokens: int
    steps: int
    tokens: int
    """Number of tokens that the run was trained on."""
    trainable_parameters: int
    """Number of parameters that trained at the end of the run."""
    parameters: int
    """Number of parameters of the model without factors."""
    seconds: float
    """Seconds of training steps, without evaluation, checkpoints and the start."""
    tokens_per_second: float
    peak_memory_bytes: int
    """Peak of the run's process, or of its tensors on a GPU, over the whole run with its warm start."""
    memory: HeldBytes | None
    """Bytes by kind at the end of training; None if the run diverged."""

    @property
    def loss_or_infinity(self) -> float:
        """Held-out loss for ranking: infinite if the run diverged."""
        return math.inf if self.loss is None else self.loss


@dataclass(frozen=True)
class FinetuningOutcome:
    """Result and cost of one fine-tuning run; the fields are those of a run in `comparison.json`."""

    method: str
    lr: float
    """Learning rate of what the method trains: factors, prompts or weights."""
    loss: float
    """Held-out loss, nats per token of the responses."""
    perplexity: float
    steps: int
    tokens: int
    """Number of tokens that training scored."""
    trainable_parameters: int
    seconds: float
    """Seconds of training steps, without evaluation, restarts, checkpoints and the start."""
    peak_memory_bytes: int
    result_bytes: int
    """Size of the adapter or model that the run leaves."""
    checkpoint_bytes: int
    """Size of one checkpoint."""
    scores: TextScores
    """Scores of the answers to held-out prompts."""
    answers: tuple[dict[str, str], ...]
    """Keys `prompt`, `reference` and `answer` of the first held-out records."""


@dataclass(frozen=True)
class Attempt:
    """A pretraining run that a comparison asks for."""

    method: str
    rate: float
    """Learning rate of what the method tunes: `lowrank_lr` of a method with factors, `lr` of any other."""
    length: float
    """Share of the steps after the warm start at which the run is measured, 1 for its end."""
    seed: int


@dataclass(frozen=True, kw_only=True)
class MethodResult:
    """One method of a pretraining comparison: a row of its table."""

    method: str
    overrides: tuple[str, ...]
    rate: float
    """The best learning rate that was found, of what the method tunes."""
    at_edge: bool
    """Whether the best rate is the lowest or highest that was tried, so a better one may lie beyond it."""
    tuning_tokens: int
    """Tokens of all runs that chose the rate, the full-length ones at the first seed included; 0 if none chose it."""
    outcomes: tuple[PretrainingOutcome, ...]
    """Full-length runs at the best rate, one for each seed, the first seed first."""

    @property
    def diverged(self) -> int:
        """Number of runs that diverged."""
        return sum(outcome.diverged for outcome in self.outcomes)

    @property
    def perplexity(self) -> float:
        """Mean held-out perplexity over the seeds; infinite if a run diverged."""
        return fmean(math.inf if one.perplexity is None else one.perplexity for one in self.outcomes)

    @property
    def spread(self) -> float | None:
        """Standard deviation of the perplexity over the seeds; None for a single seed, or if a run diverged."""
        found = [outcome.perplexity for outcome in self.outcomes if outcome.perplexity is not None]
        return stdev(found) if 1 < len(found) == len(self.outcomes) else None

    def mean(self, field: str) -> float:
        """Mean over the seeds of a numeric field of the outcomes."""
        return fmean(getattr(outcome, field) for outcome in self.outcomes)


@dataclass(frozen=True)
class Comparison:
    """A finished comparison of pretraining methods."""

    folder: Path
    results: list[MethodResult]
    attempts: list[tuple[Attempt, PretrainingOutcome]]
    """Every run, in the order in which they were asked for."""

    def ratio(self, result: MethodResult) -> float | None:
        """Perplexity relative to that of full rank; None if one of the two diverged or full rank was not compared."""
        full = next((one.perplexity for one in self.results if one.method == "full"), math.inf)
        return result.perplexity / full if math.isfinite(full) and math.isfinite(result.perplexity) else None


def as_figures(comparison: Comparison) -> dict[str, Any]:
    """Convert a comparison to the tree of `comparison.json`; figures that a diverged run lacks are None."""
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
