"""The HTML page of a comparison: a table of the methods' results and costs, charts, and answers side by side."""

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
"""Number of line colours of the page, `--series-0` and so on; further lines reuse them with other dashes."""
DASHES = ("solid", "dash", "dot")
"""Dash styles of lines: the first for the first `COLORS` lines, and so on."""


class Curve(NamedTuple):
    """Points of one method in a chart."""

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
    """Write FOLDER/comparison.html and return its path.

    Args:
        columns: names of the table's columns.
        rows: cells of the table, one row for each method.
        charts: charts in the order of the page; those without lines are left out.
        answers: prompts, each with its answers as (method, text).
        note: text under the table.
    """
    return write_page(
        folder / "comparison.html", [("Methods", columns, rows)], charts=charts, answers=answers, note=note
    )


def write_page(
    path: Path,
    tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]],
    *,
    charts: Sequence[Chart] = (),
    answers: Sequence[tuple[str, Sequence[tuple[str, str]]]] = (),
    lead: Sequence[str] = (),
    note: str = "",
) -> Path:
    """Write a page about many runs and return its path; its title is the name of its folder.

    Args:
        tables: (title, names of the columns, cells by row); charts stand below the first one, others below them.
        lead: sentences at the top.
        charts, answers, note: see `write_comparison`.
    """
    charts = [chart for chart in charts if chart.lines]
    (title, columns, rows), *others = tables
    body = [f"<header><h1>{escape(path.parent.name)}</h1></header>"]
    body += [f'<p class="lead">{escape(line)}</p>' for line in lead]
    body.append(f"<h2>{escape(title)}</h2>{table(columns, rows)}")
    if note:
        body.append(f'<p class="note">{escape(note)}</p>')
    if charts:
        body.append(f'<section class="charts">{"".join(map(figure_html, charts))}</section>')
    body += [f"<h2>{escape(name)}</h2>{table(head, cells)}" for name, head, cells in others]
    if answers:
        body.append("<h2>Answers to held-out prompts</h2>")
    for prompt, given in answers:
        lines = "".join(f"<p><b>{escape(who)}</b>: {escape(text)}</p>" for who, text in given)
        body.append(f"<blockquote><pre>{escape(prompt)}</pre>{lines}</blockquote>")
    page = Template(files("relora.report").joinpath("page.html").read_text(encoding="utf-8"))
    text = page.substitute(
        title=escape(f"{path.parent.name} · relora"),
        body="\n".join(body),
        figures=script_json({chart.id: chart.figure for chart in charts}),
        plotly=get_plotlyjs() if charts else "",
    )
    write_text(path, text)
    return path


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a table as Markdown."""
    lines = [columns, ["---" for _ in columns], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def loss_chart(curves: Sequence[Curve]) -> Chart:
    """Draw held-out loss against tokens."""
    points = [point for curve in curves for point in curve.points]
    x_axis = {"title": {"text": "tokens"}, "unifiedhovertitle": {"text": "%{x:,} tokens"}}
    return _chart("loss", "Held-out loss", curves, x_axis, focused(points))


def rate_chart(curves: Sequence[Curve]) -> Chart:
    """Draw held-out loss against learning rate, for the rates of each method's first round."""
    rates = [rate for curve in curves for rate, _, _ in curve.points] or [1.0]
    x_axis = {"title": {"text": "learning rate"}} | log_axis(min(rates), max(rates)) | {"exponentformat": "e"}
    chart = _chart("rates", "Held-out loss in the first round of rates", curves, x_axis, {})
    return replace(chart, shows_last_value=False)


def _chart(name: str, title: str, curves: Sequence[Curve], x_axis: dict[str, Any], y_axis: dict[str, Any]) -> Chart:
    """Draw one line for each method that has points."""
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
    layout = layout_of(x_axis, y_axis) | {"hovermode": "x unified"}
    return Chart(name, title, ".3f", lines, {"data": traces_of(lines, ".3f"), "layout": layout})
