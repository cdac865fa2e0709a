"""Files that a search leaves: best.yaml, which runs as it is, tune.json, tune.md, tune.csv and the page tune.html."""

import csv
import io
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relora.config import RunConfig, to_yaml
from relora.experiments.tune.advice import advice
from relora.experiments.tune.charts import charts
from relora.experiments.tune.draws import Base, as_overrides
from relora.experiments.tune.importance import Effects, effects_of
from relora.experiments.tune.rungs import Trial
from relora.experiments.tune.spaces import Config, Space
from relora.experiments.tune.standing import best_trials, loss_of, losses_of
from relora.experiments.tune.study import Study
from relora.files.atomic import write_json, write_text
from relora.files.untrusted import read_json
from relora.report.comparison import markdown, write_page

BEST = "best.yaml"
RECORD = "tune.json"
NOTE = (
    "Losses are held-out losses at the highest rung that a trial reached, and compare at the same rung only. The "
    "search has chosen by this held-out part, so the best loss is a little too good: measure the winner on text that "
    "no trial saw."
)
MOST_BYTES = 2**28
"""Size of tune.json up to which it is read."""
FIGURES = ("tokens", "seconds", "peak_bytes", "adapter_bytes")


@dataclass(frozen=True)
class Result:
    """A search as far as it has come."""

    folder: Path
    path: Path
    overrides: tuple[str, ...]
    base: Base
    config: Config
    space: Space
    rungs: tuple[float, ...]
    trials: list[Trial]
    objectives: tuple[str, ...]

    @property
    def ranked(self) -> list[Trial]:
        """Trials of the search from the best to the worst, those without a loss last."""
        best = best_trials(self.trials)
        return [*best, *(trial for trial in self.trials if trial.repeats is None and trial not in best)]

    @property
    def best(self) -> Trial:
        """The best trial."""
        return best_trials(self.trials)[0]

    def command(self, trial: Trial) -> str:
        """Return the command that makes a trial's run again."""
        verb = "pretrain" if isinstance(self.config, RunConfig) else "finetune"
        values = [*self.overrides, *as_overrides(trial.values), f"seed={trial.seed}", f"output_dir={self.folder}-again"]
        return shlex.join(["relora", verb, str(self.path), *values])

    def front(self) -> list[Trial]:
        """Return the finished trials that no other one beats in every objective, by the first objective."""
        done = [trial for trial in best_trials(self.trials) if trial.state == "complete"]
        points = {trial.number: [_objective(trial, name, self.trials) for name in self.objectives] for trial in done}

        def is_beaten(trial: Trial) -> bool:
            own = points[trial.number]
            others = (points[other.number] for other in done)
            return any(other != own and all(a <= b for a, b in zip(other, own, strict=True)) for other in others)

        return [trial for trial in done if not is_beaten(trial)]


def write_files(result: Result, study: Study) -> None:
    """Write everything that a search leaves."""
    folder, best = result.folder, result.best
    config = result.base.with_values(best.values, f"output_dir={folder / 'best'}", f"seed={best.seed}")
    head = (
        f"# Best of {len(result.ranked)} trials: trial {best.number}, held-out loss {loss_of(best, result.trials):.4f}"
    )
    write_text(folder / BEST, f"{head} at {max(best.losses)}% of the run.\n{to_yaml(config)}")
    effects = effects_of(result.trials, result.space, study, result.rungs)
    words = advice(result.trials, result.space, effects, result.rungs)
    write_json(folder / RECORD, as_figures(result, effects, words), ensure_ascii=False)
    write_text(folder / "tune.csv", as_csv(result))
    names, cells = columns(result), rows(result)
    lines = [markdown(names, cells), NOTE, "", *(f"- {line}" for line in words), ""]
    write_text(folder / "tune.md", "\n".join(lines))
    write_page(
        folder / "tune.html",
        [("Trials", names, cells), *_tables(result, effects)],
        charts=charts(result.trials, result.space, effects, result.rungs),
        lead=words,
        note=NOTE,
    )


def recorded(result: Result) -> Any:
    """Return the tree of tune.json that `write_files` has written."""
    return read_json(result.folder / RECORD, MOST_BYTES)


def columns(result: Result) -> list[str]:
    """Return the names of the table's columns."""
    return [
        "trial",
        "state",
        "of the run",
        "loss",
        "perplexity",
        *result.space.settings,
        "tokens",
        "seconds",
        "peak MB",
    ]


def rows(result: Result) -> list[list[str]]:
    """Return a row for each trial, from the best to the worst."""
    return [_cells(trial, result) for trial in result.ranked]


def as_figures(result: Result, effects: Effects, words: Sequence[str]) -> dict[str, Any]:
    """Convert a search to the tree of tune.json; a loss that is not finite is None."""
    best = result.best
    return {
        "best": {"trial": best.number, "loss": loss_of(best, result.trials), "percent": max(best.losses)},
        "config": str(result.folder / BEST),
        "trials": [_figures(trial, result) for trial in result.ranked],
        "objectives": list(result.objectives),
        "front": [trial.number for trial in result.front()],
        "importance": {key: {"mean": mean, "deviation": spread} for key, (mean, spread) in effects.importance.items()},
        "advice": list(words),
    }


def as_csv(result: Result) -> str:
    """Return a CSV of plain numbers with a line for each trial and each of its seeds."""
    text, keys = io.StringIO(), list(result.space.settings)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("trial", "repeats", "seed", "state", "percent", "loss", *keys, *FIGURES, "reason"))
    for trial in result.trials:
        percent, figures = max(trial.losses, default=0), (trial.figures.get(name, "") for name in FIGURES)
        values = (trial.values.get(key, "") for key in keys)
        head = (trial.number, "" if trial.repeats is None else trial.repeats, trial.seed, trial.state, percent)
        writer.writerow((*head, "" if trial.loss is None else trial.loss, *values, *figures, trial.reason or ""))
    return text.getvalue()


def _figures(trial: Trial, result: Result) -> dict[str, Any]:
    """Return what tune.json says of a trial."""
    finite = {percent: loss if math.isfinite(loss) else None for percent, loss in trial.losses.items()}
    return {
        "trial": trial.number,
        "state": trial.state,
        "values": trial.values,
        "losses": finite,
        "seeds": [loss if math.isfinite(loss) else None for loss in losses_of(trial, result.trials)],
        "diverged": trial.diverged,
        **trial.figures,
        "reason": trial.reason,
        "command": result.command(trial),
    }


def _cells(trial: Trial, result: Result) -> list[str]:
    """Return the cells of a trial under `columns`."""
    losses = losses_of(trial, result.trials)
    loss, perplexity = "-", "-"
    if losses and all(map(math.isfinite, losses)):
        mean = loss_of(trial, result.trials)
        loss = f"{mean:.4f}" + (f" (mean of {len(losses)} seeds)" if len(losses) > 1 else "")
        perplexity = f"{math.exp(min(mean, 700.0)):,.2f}"
    state = "diverged" if trial.diverged else trial.state
    settings = [_value(trial.values[key]) if key in trial.values else "-" for key in result.space.settings]
    tokens, seconds, peak = (trial.figures.get(name) for name in ("tokens", "seconds", "peak_bytes"))
    return [
        str(trial.number),
        state,
        f"{max(trial.losses, default=0)}%",
        loss,
        perplexity,
        *settings,
        "-" if tokens is None else f"{tokens:,.0f}",
        "-" if seconds is None else f"{seconds:,.1f}",
        "-" if peak is None else f"{peak / 1e6:,.0f}",
    ]


def _tables(result: Result, effects: Effects) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return the further tables of the page: importance, the Pareto front, failures."""
    tables = []
    if effects.importance:
        found = sorted(effects.importance.items(), key=lambda item: -item[1][0])
        cells = [[key, f"{mean:.2f}", f"± {spread:.2f}"] for key, (mean, spread) in found]
        tables.append(("Importance", ["setting", "share of the variation", "uncertainty"], cells))
    if len(result.objectives) > 1:
        cells = [
            [str(trial.number), *(f"{_objective(trial, name, result.trials):,.4g}" for name in result.objectives)]
            for trial in result.front()
        ]
        tables.append(("Pareto front of the finished trials", ["trial", *result.objectives], cells))
    reasons = [[str(trial.number), trial.state, trial.reason] for trial in result.trials if trial.reason]
    if failed := [row for row in reasons if row[1] == "failed"]:
        tables.append(("Failed", ["trial", "state", "reason"], [[str(cell) for cell in row] for row in failed]))
    return tables


def _objective(trial: Trial, name: str, trials: Sequence[Trial]) -> float:
    """Return an objective of a finished trial."""
    if name == "loss":
        return loss_of(trial, trials)
    return trial.figures.get({"memory": "peak_bytes", "adapter": "adapter_bytes"}.get(name, name), math.inf)


def _value(value: Any) -> str:
    """Format a drawn value for the table."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
