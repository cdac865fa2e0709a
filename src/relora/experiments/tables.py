"""Comparisons for people and spreadsheets: rows of the table, and the files comparison.json, .md, .csv and .html.

In the table of pretraining methods, perplexity is the mean over the seeds with its standard deviation; seconds, peak
memory and tokens per second are means over the seeds, too.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from relora.experiments.results import Comparison, FinetuningOutcome, MethodResult, as_figures
from relora.files.atomic import write_json, write_text
from relora.report.charts import Chart
from relora.report.comparison import Curve, loss_chart, markdown, rate_chart, write_comparison
from relora.report.history import read_history

RECORD = "comparison.json"
PRETRAINING_COLUMNS = (
    *("method", "held-out perplexity", "of full", "rate", "of factors", "trained"),
    *("memory MB", "peak MB", "tokens/s", "seconds", "tuned on"),
)
FINETUNING_COLUMNS = (
    *("method", "rate", "held-out loss", "of full", "ROUGE-L", "trainable", "seconds", "peak MB"),
    *("result MB", "checkpoint MB"),
)
MEMORY_KINDS = ("weights", "factors", "gradients", "moments")
NOTE = (
    "Perplexity of the final model on the whole held-out part: mean and standard deviation over {seeds} seeds; "
    "curves are of at most `evaluate.tokens` tokens of it. The rate is that of what trains at full rank, and beside"
    " it that of factors; (edge): no rate beyond it was tried. Memory is that of weights + factors + gradients + "
    "optimizer state at the end of training, the peak that of the process or device over the whole run, warm start "
    "included. Tuned on: tokens trained to choose the rate."
)


def write_pretraining_files(comparison: Comparison) -> None:
    """Write FOLDER/comparison.json, .md, .csv and .html of a comparison of pretraining methods."""
    folder = comparison.folder
    write_json(folder / RECORD, as_figures(comparison), ensure_ascii=False)
    write_text(folder / "comparison.csv", as_csv(comparison))
    charts = [loss_chart(_loss_curves(comparison.results)), rate_chart(_rate_curves(comparison))]
    note = NOTE.format(seeds=len(comparison.results[0].outcomes))
    _write_table(folder, PRETRAINING_COLUMNS, pretraining_rows(comparison), charts=charts, note=note)


def write_finetuning_files(
    folder: Path, best: Sequence[FinetuningOutcome], outcomes: Sequence[FinetuningOutcome]
) -> None:
    """Write FOLDER/comparison.json, .md and .html of a comparison of fine-tuning methods.

    Args:
        best: one run of each method, those of the table.
        outcomes: all runs; comparison.json has them, too.
    """
    record = {"best": [asdict(one) for one in best], "all": [asdict(one) for one in outcomes]}
    write_json(folder / RECORD, record, ensure_ascii=False)
    _write_table(folder, FINETUNING_COLUMNS, finetuning_rows(best), answers=_answers_by_prompt(best))


def _write_table(
    folder: Path,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    charts: Sequence[Chart] = (),
    answers: Sequence[tuple[str, Sequence[tuple[str, str]]]] = (),
    note: str = "",
) -> None:
    """Write the table as FOLDER/comparison.md and, with charts and answers, as the page FOLDER/comparison.html."""
    text = markdown(columns, rows)
    if note:
        text += f"\n{note}\n"
    write_text(folder / "comparison.md", text)
    write_comparison(folder, columns, rows, charts=charts, answers=answers, note=note)


def pretraining_rows(comparison: Comparison) -> list[list[str]]:
    """Return the cells of the table under `PRETRAINING_COLUMNS`, one row for each method."""
    return [_pretraining_cells(one, comparison) for one in comparison.results]


def _pretraining_cells(result: MethodResult, comparison: Comparison) -> list[str]:
    """Return the cells of one method; figures that are the same for every seed are those of the first."""
    first, ratio, memory = result.outcomes[0], comparison.ratio(result), result.outcomes[0].memory
    lr, lowrank_lr = f"{first.lr:g}", "-" if first.lowrank_lr is None else f"{first.lowrank_lr:g}"
    if result.at_edge and first.lowrank_lr is None:  # the mark stands at the rate that was searched
        lr += " (edge)"
    elif result.at_edge:
        lowrank_lr += " (edge)"
    return [
        result.method,
        _perplexity(result),
        "-" if ratio is None else f"{ratio:.3f}",
        lr,
        lowrank_lr,
        f"{first.trainable_parameters:,}",
        "-" if memory is None else " + ".join(f"{getattr(memory, kind) / 1e6:,.1f}" for kind in MEMORY_KINDS),
        f"{result.mean('peak_memory_bytes') / 1e6:,.0f}",
        f"{result.mean('tokens_per_second'):,.0f}",
        f"{result.mean('seconds'):,.0f}",
        f"{result.tuning_tokens:,}",
    ]


def finetuning_rows(outcomes: Sequence[FinetuningOutcome]) -> list[list[str]]:
    """Return the cells of the table under `FINETUNING_COLUMNS`, one row for each method."""
    full_loss = next((one.loss for one in outcomes if one.method == "full"), None)
    return [
        [
            one.method,
            f"{one.lr:g}",
            f"{one.loss:.4f}",
            "-" if full_loss is None else f"{one.loss / full_loss:.3f}",
            f"{one.scores.rougeL:.1f}",
            f"{one.trainable_parameters:,}",
            f"{one.seconds:,.0f}",
            f"{one.peak_memory_bytes / 1e6:,.0f}",
            f"{one.result_bytes / 1e6:,.2f}",
            f"{one.checkpoint_bytes / 1e6:,.2f}",
        ]
        for one in outcomes
    ]


def as_csv(comparison: Comparison) -> str:
    """Return a CSV of plain numbers (sizes in bytes) with a line for each seed of each method at its best rate."""
    text = io.StringIO()
    names = ("seed", "perplexity", "loss", "lr", "lowrank_lr", "steps", "tokens", "trainable_parameters", "parameters")
    times = ("seconds", "tokens_per_second", "peak_memory_bytes")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("method", *names, *times, *(f"{kind}_bytes" for kind in MEMORY_KINDS), "tuning_tokens"))
    for result in comparison.results:
        for outcome in result.outcomes:
            memory = [getattr(outcome.memory, kind) if outcome.memory else None for kind in MEMORY_KINDS]
            figures = [getattr(outcome, name) for name in (*names, *times)]
            writer.writerow((result.method, *figures, *memory, result.tuning_tokens))
    return text.getvalue()


def _perplexity(result: MethodResult) -> str:
    """Format mean and standard deviation of the perplexity, or how many runs diverged."""
    runs = len(result.outcomes)
    if result.diverged:
        return "diverged" if result.diverged == runs else f"diverged ({result.diverged} of {runs})"
    return f"{result.perplexity:,.2f}" + ("" if result.spread is None else f" ± {result.spread:.2f}")


def _loss_curves(results: Sequence[MethodResult]) -> list[Curve]:
    """Return the held-out loss against tokens of each method's first seed."""
    histories = [(one.method, read_history(Path(one.outcomes[0].folder))) for one in results]
    return [
        Curve(name, [(point.tokens, point.step, point.loss) for point in history.held_out])
        for name, history in histories
    ]


def _rate_curves(comparison: Comparison) -> list[Curve]:
    """Return the loss against the learning rate in the first round of each method that tried several rates."""
    curves = []
    for method in (one.method for one in comparison.results):
        own = [(attempt, outcome) for attempt, outcome in comparison.attempts if attempt.method == method]
        shortest = min(attempt.length for attempt, _ in own)
        first_seed = own[0][0].seed
        first_round = {
            attempt.rate: (outcome.steps, outcome.loss)
            for attempt, outcome in own
            if (attempt.length, attempt.seed) == (shortest, first_seed) and outcome.loss is not None
        }
        if len(first_round) > 1:
            curves.append(Curve(method, [(rate, *first_round[rate]) for rate in sorted(first_round)]))
    return curves


def _answers_by_prompt(outcomes: Sequence[FinetuningOutcome]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return (prompt, answers) pairs, where the answers are those of the reference and of every method, by name."""
    return [
        (
            first["prompt"],
            [("reference", first["reference"]), *((one.method, one.answers[index]["answer"]) for one in outcomes)],
        )
        for index, first in enumerate(outcomes[0].answers)
    ]
