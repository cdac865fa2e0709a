"""The tables of comparisons: means, spreads, ratios, and the cells of runs that diverged."""

import csv
import io
import json
from pathlib import Path

import pytest

from relora.cli.tables.comparison import print_comparison
from relora.experiments.results import Attempt, Comparison, MethodResult, PretrainingOutcome, as_figures
from relora.experiments.tables import PRETRAINING_COLUMNS, as_csv, pretraining_rows, write_pretraining_files
from relora.train.memory import HeldBytes


def outcome(folder: Path, loss: float | None, *, seed: int = 0, lowrank_lr: float | None = None) -> PretrainingOutcome:
    """Return the outcome of a run whose perplexity is 100 times its loss; its folder has one evaluation."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "kind": "evaluation",
        "step": 4,
        "tokens": 400,
        "phase": "full",
        "cycle": 0,
        "validation_loss": loss or 9.0,
    }
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    return PretrainingOutcome(
        folder=str(folder),
        diverged=loss is None,
        seed=seed,
        lr=2e-3,
        lowrank_lr=lowrank_lr,
        loss=loss,
        perplexity=None if loss is None else 100 * loss,
        held_out_tokens=1000,
        steps=4,
        tokens=400,
        trainable_parameters=1_234_567,
        parameters=2_000_000,
        seconds=10.0 + seed,
        tokens_per_second=40.0,
        peak_memory_bytes=500_000_000,
        memory=None
        if loss is None
        else HeldBytes(weights=8_000_000, factors=0, gradients=5_000_000, moments=9_900_000),
    )


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    full = (outcome(tmp_path / "a", 2.0), outcome(tmp_path / "b", 2.2, seed=1))
    relora = (outcome(tmp_path / "c", 2.1, lowrank_lr=4e-3), outcome(tmp_path / "d", 2.31, seed=1, lowrank_lr=4e-3))
    bad = (outcome(tmp_path / "e", 3.0), outcome(tmp_path / "f", None, seed=1))
    rows = [("full", 2e-3, False, full), ("relora", 4e-3, True, relora), ("bad", 1.0, False, bad)]
    results = [
        MethodResult(method=name, overrides=(), rate=rate, at_edge=edge, tuning_tokens=1200, outcomes=runs)
        for name, rate, edge, runs in rows
    ]
    tried = [(Attempt("full", rate, 0.25, 0), outcome(tmp_path / f"{rate}", rate * 1e3)) for rate in (4e-3, 2e-3)]
    runs = [(Attempt(name, rate, 1.0, one.seed), one) for name, rate, _, found in rows for one in found]
    return Comparison(tmp_path, results, [*tried, *runs])


def test_cells(comparison: Comparison) -> None:
    full, relora, bad = pretraining_rows(comparison)
    assert dict(zip(PRETRAINING_COLUMNS, full, strict=True)) == {
        "method": "full",
        "held-out perplexity": "210.00 ± 14.14",
        "of full": "1.000",
        "rate": "0.002",
        "of factors": "-",
        "trained": "1,234,567",
        "memory MB": "8.0 + 0.0 + 5.0 + 9.9",
        "peak MB": "500",
        "tokens/s": "40",
        "seconds": "10",
        "tuned on": "1,200",
    }
    assert relora[2:5] == ["1.050", "0.002", "0.004 (edge)"]  # the mark stands at the rate that was tuned
    assert bad[1:3] == ["diverged (1 of 2)", "-"]


def test_one_seed_has_no_spread_and_without_full_there_is_no_ratio(comparison: Comparison) -> None:
    [_, relora, bad] = comparison.results
    one = MethodResult(**{**vars(relora), "outcomes": relora.outcomes[:1]})
    alone = Comparison(comparison.folder, [one], [])
    assert pretraining_rows(alone)[0][1:3] == ["210.00", "-"] and one.spread is None
    lost = MethodResult(**{**vars(bad), "outcomes": bad.outcomes[1:]})
    diverged = Comparison(comparison.folder, [lost], [])
    assert pretraining_rows(diverged)[0][1] == "diverged"
    assert as_figures(diverged)["results"][0]["perplexity"] is None


def test_figures_are_json_without_infinities(comparison: Comparison) -> None:
    figures = as_figures(comparison)
    assert json.loads(json.dumps(figures, allow_nan=False)) == json.loads(json.dumps(figures))
    assert figures["results"][1]["of_full"] == pytest.approx(1.05) and figures["results"][2]["of_full"] is None


def test_csv_has_a_line_for_every_seed(comparison: Comparison) -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(comparison))))
    assert [(row["method"], row["perplexity"], row["weights_bytes"]) for row in rows] == [
        ("full", "200.0", "8000000"),
        ("full", "220.00000000000003", "8000000"),
        ("relora", "210.0", "8000000"),
        ("relora", "231.0", "8000000"),
        ("bad", "300.0", "8000000"),
        ("bad", "", ""),
    ]


def test_files_and_terminal(comparison: Comparison, capsys: pytest.CaptureFixture[str]) -> None:
    write_pretraining_files(comparison)
    print_comparison(PRETRAINING_COLUMNS, pretraining_rows(comparison))
    out = capsys.readouterr().out
    assert "210.00 ± 14.14" in out and "diverged (1 of 2)" in out and "8.0 + 0.0 + 5.0 + 9.9" in out
    text = (comparison.folder / "comparison.md").read_text()
    assert "| relora | 220.50 ± 14.85 | 1.050 |" in text and "over 2 seeds" in text
    page = (comparison.folder / "comparison.html").read_text()
    # the chart of rates has those of full, in order; the other methods tried a single rate
    assert '"x":[0.002,0.004],"y":[2.0,4.0]' in page
    assert (comparison.folder / "comparison.csv").read_text() == as_csv(comparison)
