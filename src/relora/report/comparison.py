"""The page of a comparison: a table of what each method reached and took, charts, and answers side by side."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from plotly.offline import get_plotlyjs

from relora.files.atomic import write_text
from relora.report.charts import Chart, Line, Point, focused, layout_of, log_axis, thinned, traces_of
from relora.report.html import figure_html, script_json, table

COLORS = 10
"""Of the page, `--series-0` and so on; the next lines take them again, dashed."""
DASHES = ("solid", "dash", "dot")


class Curve(NamedTuple):
    """One method's line in a chart."""

    method: str
    points: list[Point]


def write_comparison(
    folder: Path,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    charts: Sequence[Chart] = (),
    answers: Sequence[tuple[str, Sequence[tuple[str, str]]]] = (),
    note: str = "",
) -> Path:
    """Write FOLDER/comparison.html; `answers` are prompts with (who, what they answered)."""
    charts = [chart for chart in charts if chart.lines]
    body = [f"<header><h1>{escape(folder.name)}</h1></header>", "<h2>Methods</h2>", table(columns, rows)]
    if note:
        body.append(f'<p class="note">{escape(note)}</p>')
    if charts:
        body.append(f'<section class="charts">{"".join(map(figure_html, charts))}</section>')
    if answers:
        body.append("<h2>Answers to held-out prompts</h2>")
    for prompt, given in answers:
        lines = "".join(f"<p><b>{escape(who)}</b>: {escape(text)}</p>" for who, text in given)
        body.append(f"<blockquote><pre>{escape(prompt)}</pre>{lines}</blockquote>")
    page = Template(files("relora.report").joinpath("page.html").read_text(encoding="utf-8"))
    path = folder / "comparison.html"
    text = page.substitute(
        title=escape(f"{folder.name} · relora"),
        body="\n".join(body),
        figures=script_json({chart.id: chart.figure for chart in charts}),
        plotly=get_plotlyjs() if charts else "",
    )
    write_text(path, text)
    return path


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table for a document."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def loss_chart(curves: Sequence[Curve]) -> Chart:
    """Held-out loss against tokens."""
    points = [point for curve in curves for point in curve.points]
    across = {"title": {"text": "tokens"}, "unifiedhovertitle": {"text": "%{x:,} tokens"}}
    return _chart("loss", "Held-out loss", curves, across, focused(points))


def rate_chart(curves: Sequence[Curve]) -> Chart:
    """Loss against learning rate, in each method's first round."""
    rates = [rate for curve in curves for rate, _, _ in curve.points] or [1.0]
    across = {"title": {"text": "learning rate"}} | log_axis(min(rates), max(rates)) | {"exponentformat": "e"}
    chart = _chart("rates", "Held-out loss in the first round of rates", curves, across, {})
    return replace(chart, tells_last=False)


def _chart(name: str, title: str, curves: Sequence[Curve], across: dict[str, Any], up: dict[str, Any]) -> Chart:
    lines = [
        Line(
            curve.method,
            f"--series-{index % COLORS}",
            thinned(curve.points),
            width=1.8,
            has_markers=True,
            dash=DASHES[index // COLORS % len(DASHES)],
        )
        for index, curve in enumerate(curves)
        if curve.points
    ]
    layout = layout_of(across, up) | {"hovermode": "x unified"}
    return Chart(name, title, ".3f", lines, {"data": traces_of(lines, ".3f"), "layout": layout})
