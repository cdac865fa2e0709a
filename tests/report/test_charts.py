import json
from collections.abc import Callable
from pathlib import Path

import pytest

from relora.report.charts import MAX_POINTS, charts, layer_mean_spectrum, thinned
from relora.report.history import read_history

MakeRun = Callable[..., Path]


def test_every_chart_over_tokens_shades_phases_and_marks_restarts(tmp_path: Path, make_run: MakeRun) -> None:
    history = read_history(make_run(tmp_path))
    figures = charts(history)
    assert [chart.id for chart in figures] == ["loss", "perplexity", "rate", "speed", "gradient", "spectrum"]
    for chart in figures[:-1]:
        shapes = chart.figure["layout"]["shapes"]
        shades = [shape["fillcolor"] for shape in shapes if shape["type"] == "rect"]
        marks = [shape["x0"] for shape in shapes if shape["type"] == "line"]
        assert shades == ["--warm-start"] + 6 * ["--low-rank"]
        assert marks == [restart["tokens"] for restart in history.restarts]
        for trace in chart.figure["data"]:
            assert len(trace["x"]) == len(trace["y"]) == len(trace["customdata"])
            assert "step %{customdata" in trace["hovertemplate"]
    assert [len(chart.lines) for chart in figures] == [2, 1, 2, 1, 1, 1]
    assert len(figures[-1].figure["data"]) == len(history.restarts)


def test_a_run_of_method_full_has_no_low_rank_line_and_no_spectrum(tmp_path: Path, make_run: MakeRun) -> None:
    figures = {chart.id: chart for chart in charts(read_history(make_run(tmp_path, method="full")))}
    assert "spectrum" not in figures
    assert [line.label for line in figures["rate"].lines] == ["full-rank weights"]
    assert figures["loss"].figure["layout"]["shapes"] == []


def test_a_run_with_one_evaluation_has_the_charts_it_can(tmp_path: Path) -> None:
    record = {"kind": "evaluation", "step": 0, "tokens": 0, "phase": "full", "cycle": 0, "validation_loss": 8.3}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    assert [chart.id for chart in charts(read_history(tmp_path))] == ["loss", "perplexity"]


def test_the_loss_axis_leaves_out_the_high_losses_of_the_first_steps(tmp_path: Path, make_run: MakeRun) -> None:
    loss, perplexity = charts(read_history(make_run(tmp_path)))[:2]
    low, high = loss.figure["layout"]["yaxis"]["range"]
    assert low < 3.1 < 4 < high < 6
    assert perplexity.figure["layout"]["yaxis"]["type"] == "log"


def test_the_loss_chart_marks_spikes_and_incidents(tmp_path: Path, make_run: MakeRun) -> None:
    folder = make_run(tmp_path)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        if record["kind"] == "train" and record["step"] == 1030:
            record["loss"] = 9.0
    skipped = {"kind": "skipped", "step": 1234, "tokens": 1234 * 8192, "phase": "low_rank", "cycle": 2, "loss": None}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [*records, skipped]))
    loss, *others = charts(read_history(folder))
    marks = loss.figure["data"][-1]
    assert (marks["mode"], marks["x"], marks["y"], marks["customdata"]) == ("markers", [1030 * 8192], [9.0], [1030])
    assert loss.figure["layout"]["yaxis"]["range"][1] > 9
    dotted = [shape["x0"] for shape in loss.figure["layout"]["shapes"] if shape["line"].get("dash") == "dot"]
    assert dotted == [1234 * 8192]
    assert not any(shape["line"].get("dash") for other in others[:-1] for shape in other.figure["layout"]["shapes"])


def test_thinning_keeps_the_end_and_ignores_null() -> None:
    points = [(step * 10, step, None if step % 2 else float(step)) for step in range(10 * MAX_POINTS)]
    thin = thinned(points)
    assert len(thin) == MAX_POINTS
    assert thin[0] == (90, 9, 4.0)
    assert thin[-1][:2] == points[-1][:2]
    assert thinned(points, max)[0] == (90, 9, 8.0)
    assert thinned(points[:5]) == points[:5]
    assert thinned([(step, step, None) for step in range(2 * MAX_POINTS)])[0] == (1, 1, None)


def test_layer_mean_spectrum_is_relative_and_takes_layers_of_different_rank() -> None:
    layers = [{"singular_values": [4.0, 2.0]}, {"singular_values": [10.0, 1.0, 0.5]}, {"singular_values": [0.0]}, {}]
    assert layer_mean_spectrum({"layers": layers}) == pytest.approx([1.0, 0.3, 0.05])
    assert layer_mean_spectrum({}) == []
