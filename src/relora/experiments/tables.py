"""A comparison of pretraining methods for people and spreadsheets: table, CSV, page.

Perplexity is the mean over the seeds, with its standard deviation; what a run takes is the mean over its seeds, too.
"""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

from relora.experiments.results import Comparison, Result
from relora.files.atomic import write_durably
from relora.report.comparison import Curve, loss_chart, markdown, rate_chart, write_comparison
from relora.report.history import read_history

PRETRAINING_COLUMNS = (
    *("method", "held-out perplexity", "of full", "rate", "of factors", "trained"),
    *("memory MB", "peak MB", "tokens/s", "seconds", "tuned on"),
)
KINDS = ("weights", "factors", "gradients", "moments")
NOTE = (
    "Perplexity of the final model on the held-out tokens: mean and standard deviation over {seeds} seeds. The rate is "
    "that of what trains at full rank, and beside it that of factors; (edge): no rate beyond it was tried. Memory is "
    "that of weights + factors + gradients + optimizer state at the end of training, the peak that of the process or "
    "device over the whole run, warm start included. Tuned on: tokens trained to choose the rate."
)


def write_tables(comparison: Comparison) -> None:
    """FOLDER/comparison.md, .csv and .html."""
    folder, rows = comparison.folder, pretraining_rows(comparison)
    note = NOTE.format(seeds=len(comparison.results[0].outcomes))
    write_durably(folder / "comparison.md", markdown(PRETRAINING_COLUMNS, rows) + f"\n{note}\n")
    write_durably(folder / "comparison.csv", as_csv(comparison))
    charts = [loss_chart(_curves(comparison.results)), rate_chart(_tried(comparison))]
    write_comparison(folder, PRETRAINING_COLUMNS, rows, charts=charts, note=note)


def pretraining_rows(comparison: Comparison) -> list[list[str]]:
    """The cells of the table under `PRETRAINING_COLUMNS`, a row for each method."""
    return [cells(one, comparison) for one in comparison.results]


def cells(one: Result, comparison: Comparison) -> list[str]:
    """One row of the table."""
    first, ratio = one.outcomes[0], comparison.ratio(one)
    edge = " (edge)" if one.at_edge else ""
    memory = first.memory
    return [
        one.method,
        _perplexity(one),
        "-" if ratio is None else f"{ratio:.3f}",
        f"{first.lr:g}" + (edge if first.lowrank_lr is None else ""),
        "-" if first.lowrank_lr is None else f"{first.lowrank_lr:g}{edge}",
        f"{first.trainable_parameters:,}",
        "-" if memory is None else " + ".join(f"{getattr(memory, kind) / 1e6:,.1f}" for kind in KINDS),
        f"{one.mean('peak_memory_bytes') / 1e6:,.0f}",
        f"{one.mean('tokens_per_second'):,.0f}",
        f"{one.mean('seconds'):,.0f}",
        f"{one.tuning_tokens:,}",
    ]


def as_csv(comparison: Comparison) -> str:
    """A line for every run at full length that counts: method, seed, and all figures as plain numbers in bytes."""
    text = io.StringIO()
    names = ("seed", "perplexity", "loss", "lr", "lowrank_lr", "steps", "tokens", "trainable_parameters", "parameters")
    times = ("seconds", "tokens_per_second", "peak_memory_bytes")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("method", *names, *times, *(f"{kind}_bytes" for kind in KINDS), "tuning_tokens"))
    for one in comparison.results:
        for outcome in one.outcomes:
            memory = [getattr(outcome.memory, kind) if outcome.memory else None for kind in KINDS]
            figures = [getattr(outcome, name) for name in (*names, *times)]
            writer.writerow((one.method, *figures, *memory, one.tuning_tokens))
    return text.getvalue()


def _perplexity(one: Result) -> str:
    if one.diverged:
        return "diverged" if one.diverged == len(one.outcomes) else f"diverged ({one.diverged} of {len(one.outcomes)})"
    return f"{one.perplexity:,.2f}" + ("" if one.spread is None else f" ± {one.spread:.2f}")


def _curves(results: Sequence[Result]) -> list[Curve]:
    """Held-out loss over tokens of every method's first seed."""
    histories = [(one.method, read_history(Path(one.outcomes[0].folder))) for one in results]
    return [
        Curve(name, [(point.tokens, point.step, point.loss) for point in history.held_out])
        for name, history in histories
    ]


def _tried(comparison: Comparison) -> list[Curve]:
    """Loss over learning rate in each method's first round, where there was one."""
    curves = []
    for method in (one.method for one in comparison.results):
        own = [(attempt, outcome) for attempt, outcome in comparison.attempts if attempt.method == method]
        shortest = min(attempt.length for attempt, _ in own)
        first = {
            attempt.rate: (outcome.steps, outcome.score)
            for attempt, outcome in own
            if (attempt.length, attempt.seed) == (shortest, own[0][0].seed) and math.isfinite(outcome.score)
        }
        if len(first) > 1:
            curves.append(Curve(method, [(rate, *first[rate]) for rate in sorted(first)]))
    return curves
