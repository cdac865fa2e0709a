"""Charts of a run as plotly figures, i.e. plain dictionaries that the script of the page draws.

A colour is the name of a CSS variable (`--held-out`), which the page replaces by its value in the reader's light or
dark theme. Of the run's data only numbers go into a figure, no strings.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from relora.report.history import History
from relora.report.metrics import Record, number

MAX_POINTS = 1500
"""Most points of a line; of a longer series, neighbouring points are merged into buckets."""
MAX_MARKERS = 100
"""Most points of a line whose points have markers."""
MAX_NUMBERED_RESTARTS = 12
"""Most restarts whose lines are numbered; if there are more, none is."""

Point = tuple[float, int, float | None]
"""(x value, mostly tokens; step; y value)."""
Pick = Callable[[Sequence[float]], float]
"""Function that reduces the values of a bucket to one."""


@dataclass(frozen=True)
class Line:
    """One series of a chart; `label` names it in the chart's heading."""

    label: str
    color: str
    points: Sequence[Point]
    width: float = 1.5
    has_markers: bool = False
    dash: str = "solid"


@dataclass(frozen=True)
class Chart:
    """One figure of the page; `format` is the number format of its values, in the notation that Python and d3 share."""

    id: str
    title: str
    format: str
    lines: Sequence[Line]
    figure: dict[str, Any]
    shows_last_value: bool = True
    """Whether the heading gives the last value of every line."""


def charts(history: History) -> list[Chart]:
    """Return the charts for which the run has figures, in the order of the page."""
    return [chart for chart in _all_charts(history) if chart.lines]


def _all_charts(history: History) -> Iterator[Chart]:
    """Yield all charts of a run's page, those without lines included."""

    def series(key: str, pick: Pick = fmean) -> list[Point]:
        """Points of one figure of the logged steps against tokens."""
        return thinned([(r["tokens"], r["step"], number(r, key)) for r in history.train], pick)

    losses = thinned([(point.tokens, point.step, point.loss) for point in history.held_out])
    perplexities = thinned([(point.tokens, point.step, point.perplexity) for point in history.held_out])
    sample = " (sample)" if history.is_sampled else ""
    loss_lines = [
        Line("training", "--training", series("loss"), width=1.2),
        Line("held-out" + sample, "--held-out", losses, width=2, has_markers=True),
    ]
    perplexity_line = Line("", "--held-out", perplexities, width=2, has_markers=True)
    from_zero = {"rangemode": "tozero"}
    rate_lines = [
        Line("full-rank weights", "--training", series("lr")),
        Line("factors", "--factors", series("lowrank_lr")),
    ]
    spikes = _spikes(history)
    loss_axis = focused(series("loss") + losses, shown=[peak for _, _, peak in spikes])
    yield _with_incidents(history, spikes, _over_tokens(history, "loss", "Loss", ".3f", loss_lines, loss_axis))
    title, axis = f"Held-out perplexity{sample}", focused(perplexities, log=True)
    yield _over_tokens(history, "perplexity", title, ",.2f", [perplexity_line], axis)
    yield _over_tokens(history, "rate", "Learning rate", ".1e", rate_lines, from_zero | {"exponentformat": "e"})
    speed = Line("", "--training", series("tokens_per_second"))
    yield _over_tokens(history, "speed", "Tokens per second", ",.0f", [speed], from_zero)
    # a bucket shows its largest value: its mean would hide spikes
    norm = Line("", "--training", series("grad_norm", max), width=1)
    yield _over_tokens(history, "gradient", "Gradient norm", ".3f", [norm], from_zero)
    yield _spectra(history)


def thinned(points: list[Point], pick: Pick = fmean) -> list[Point]:
    """Reduce a series to at most `MAX_POINTS` points: each bucket of neighbours becomes a point at its last place."""
    size = max(1, math.ceil(len(points) / MAX_POINTS))
    thin = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        values = [value for _, _, value in bucket if value is not None]
        thin.append((bucket[-1][0], bucket[-1][1], pick(values) if values else None))
    return thin


def layer_mean_spectrum(restart: Record) -> list[float]:
    """Return the singular values of the merged update, relative to the largest, averaged over the layers."""
    spectra = []
    for layer in restart.get("layers") or ():
        values = [value for value in layer.get("singular_values") or () if isinstance(value, int | float)]
        if values and values[0] > 0:
            spectra.append([value / values[0] for value in values])
    length = max(map(len, spectra), default=0)
    return [fmean(spectrum[i] for spectrum in spectra if i < len(spectrum)) for i in range(length)]


def _over_tokens(
    history: History, name: str, title: str, number_format: str, lines: Sequence[Line], y_axis: dict[str, Any]
) -> Chart:
    """Build a chart against tokens, with phases shaded, restarts marked, and the step in the hover text."""
    lines = [line for line in lines if any(value is not None for _, _, value in line.points)]
    end = max((segment.last[1] for segment in history.segments), default=None)
    x_axis = {
        "title": {"text": "tokens"},
        "range": [0, end] if end else None,
        "unifiedhovertitle": {"text": "%{x:,} tokens"},
    }
    shapes, annotations = _events(history)
    layout = layout_of(x_axis, y_axis) | {
        "hovermode": "x unified",
        "shapes": shapes,
        "annotations": annotations,
    }
    return Chart(name, title, number_format, lines, {"data": traces_of(lines, number_format), "layout": layout})


def traces_of(lines: Sequence[Line], number_format: str) -> list[dict[str, Any]]:
    """Convert lines to plotly traces, with the step in the hover text."""
    return [
        {
            "type": "scatter",
            "mode": "lines+markers" if line.has_markers and len(line.points) <= MAX_MARKERS else "lines",
            "x": [x_value for x_value, _, _ in line.points],
            "y": [value for _, _, value in line.points],
            "customdata": [step for _, step, _ in line.points],
            "line": {"color": line.color, "width": line.width, "dash": line.dash},
            "marker": {"color": line.color, "size": 5},
            "hovertemplate": f"{line.label} %{{y:{number_format}}} at step %{{customdata:,}}<extra></extra>",
        }
        for line in lines
    ]


def _spikes(history: History) -> list[tuple[int, int, float]]:
    """Return (tokens, step, loss) of the peak of every loss spike after a boundary."""
    tokens = {record["step"]: record["tokens"] for record in history.train}
    return [(tokens[rise.peak_step], rise.peak_step, rise.peak) for rise in history.rises if rise.is_spike]


def _with_incidents(history: History, spikes: Sequence[tuple[int, int, float]], chart: Chart) -> Chart:
    """Mark loss spikes and incidents (skipped steps and rewinds) in the chart of the loss."""
    if spikes and chart.lines:
        chart.figure["data"].append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [tokens for tokens, _, _ in spikes],
                "y": [peak for _, _, peak in spikes],
                "customdata": [step for _, step, _ in spikes],
                "marker": {"color": "--alert", "size": 8, "symbol": "triangle-down"},
                "hovertemplate": f"spike %{{y:{chart.format}}} at step %{{customdata:,}}<extra></extra>",
            }
        )
    style: dict[str, Any] = {"yref": "paper", "y0": 0, "y1": 1, "line": {"color": "--alert", "width": 1, "dash": "dot"}}
    chart.figure["layout"]["shapes"] += [
        {"type": "line", "x0": record["tokens"], "x1": record["tokens"], **style} for record in history.incidents
    ]
    return chart


def _spectra(history: History) -> Chart:
    """Build the chart of the merged updates' singular values, one line for each restart; later ones are more opaque."""
    spectra = [(restart, layer_mean_spectrum(restart)) for restart in history.measured_restarts]
    spectra = [(restart, spectrum) for restart, spectrum in spectra if spectrum]
    traces = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": list(range(1, len(spectrum) + 1)),
            "y": [value if value > 0 else None for value in spectrum],
            "line": {"color": "--factors", "width": 1.5},
            "opacity": 0.25 + 0.75 * (index + 1) / len(spectra),
            "hovertemplate": f"restart {number(restart, 'cycle') or 0:.0f}: "
            "%{y:.3g} of the largest, direction %{x}<extra></extra>",
        }
        for index, (restart, spectrum) in enumerate(spectra)
    ]
    lowest = min((value for _, spectrum in spectra for value in spectrum if value > 0), default=1.0)
    layout = layout_of({"title": {"text": "direction"}}, log_axis(lowest, 1.0)) | {"hovermode": "closest"}
    lines = [Line("first to last restart, pale to strong", "--factors", ())] if traces else []
    title = "Singular values of the merged update, largest = 1"
    return Chart("spectrum", title, ".3g", lines, {"data": traces, "layout": layout})


def _events(history: History) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Build the shapes for phases and restarts, and the annotations that number the restarts' lines."""
    shades = {"warm_start": "--warm-start", "low_rank": "--low-rank"}
    full_height: dict[str, Any] = {"yref": "paper", "y0": 0, "y1": 1, "layer": "below"}
    shapes: list[dict[str, Any]] = [
        {
            "type": "rect",
            "x0": segment.first[1],
            "x1": segment.last[1],
            "fillcolor": shades[segment.phase],
            "line": {"width": 0},
            **full_height,
        }
        for segment in history.segments
        if segment.phase in shades
    ]
    marks = [(restart["cycle"], restart["tokens"]) for restart in history.measured_restarts]
    line = {"color": "--mark", "width": 1}
    shapes += [{"type": "line", "x0": tokens, "x1": tokens, "line": line, **full_height} for _, tokens in marks]
    if len(marks) > MAX_NUMBERED_RESTARTS:
        return shapes, []
    numbers: list[dict[str, Any]] = [
        {
            "x": tokens,
            "y": 1,
            "yref": "paper",
            "yanchor": "bottom",
            "text": str(cycle),
            "showarrow": False,
            "font": {"size": 10, "color": "--muted"},
        }
        for cycle, tokens in marks
    ]
    return shapes, numbers


def layout_of(x_axis: dict[str, Any], y_axis: dict[str, Any]) -> dict[str, Any]:
    """Build the layout that all charts share, with settings of the two axes added to the common ones."""
    font = {"family": "system-ui, sans-serif", "size": 12, "color": "--muted"}
    spike = {"spikecolor": "--muted", "spikethickness": 1, "spikedash": "solid"}
    quiet = {"zeroline": False, "linecolor": "--rule", "tickcolor": "--rule", "exponentformat": "B"}
    return {
        "margin": {"l": 52, "r": 12, "t": 18, "b": 40},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": font,
        "showlegend": False,
        "hoverlabel": {"bgcolor": "--paper", "bordercolor": "--rule", "font": font | {"color": "--ink"}},
        "xaxis": quiet
        | spike
        | {"showgrid": False, "showline": True, "ticks": "outside", "ticklen": 4, "nticks": 7}
        | x_axis,
        "yaxis": quiet | {"gridcolor": "--rule", "nticks": 6} | y_axis,
    }


def focused(points: Sequence[Point], log: bool = False, shown: Sequence[float] = ()) -> dict[str, Any]:
    """Choose the range of an axis so that the high values of the first steps do not flatten the rest of a line.

    The range ends near the 88th percentile of the values; two double-clicks show the whole line.

    Args:
        log: use a logarithmic axis if the values in range span a factor of three or more.
        shown: values that the range must include.
    """
    values = sorted(value for _, _, value in points if value is not None and value > 0)
    if len(values) < 3:
        return {}
    percentile = values[min(int(0.88 * len(values)), len(values) - 2)]
    low, high = values[0], max(percentile, *shown, 0.0)
    if not log or high < 3 * low:
        return {"range": [low - 0.05 * (high - low), high + 0.05 * (high - low)]}
    return log_axis(low, values[-1]) | {"range": [math.log10(low / 1.05), math.log10(high * 1.05)]}


def log_axis(low: float, high: float) -> dict[str, Any]:
    """Build a logarithmic axis with ticks at 1, 2, 3, 5, 10, ...; plotly labels those within a decade by one digit."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return {"type": "log", "tickvals": [digit * 10.0**decade for decade in decades for digit in (1, 2, 3, 5)]}
