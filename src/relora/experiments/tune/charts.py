"""Charts of a search: its history, parallel coordinates of its settings, and a slice for each setting that matters."""

import math
from collections.abc import Sequence
from typing import Any

from relora.experiments.tune.draws import plain
from relora.experiments.tune.importance import Effects
from relora.experiments.tune.rungs import Trial
from relora.experiments.tune.spaces import Space
from relora.experiments.tune.standing import best_trials
from relora.report.charts import Chart, Line, focused, layout_of

MOST_SLICES = 8
"""Settings that get a chart of their own, the most important first."""


def charts(trials: Sequence[Trial], space: Space, effects: Effects, rungs: Sequence[float]) -> list[Chart]:
    """Return the charts of a search in the order of the page."""
    own = [trial for trial in trials if trial.repeats is None and trial.loss is not None and not trial.diverged]
    if not own:
        return []
    importance = {key: effects.importance.get(key, (0.0, 0.0))[0] for key in space.settings}
    shown = [
        key for key in sorted(importance, key=lambda key: -importance[key]) if any(key in t.parameters for t in own)
    ]
    slices = [_slice(index, key, own, space) for index, key in enumerate(shown[:MOST_SLICES])]
    return [_history(own), _parallel(own, shown, space), *slices]


def _history(own: Sequence[Trial]) -> Chart:
    """Draw the loss of each trial by its number, one colour for each rung, and the best finished one so far."""
    by_rung: dict[int, list[Trial]] = {}
    for trial in own:
        by_rung.setdefault(max(trial.losses), []).append(trial)
    data, lines = [], []
    for index, (name, some) in enumerate(sorted(by_rung.items())):
        color = f"--series-{index % 10}"
        lines.append(Line(f"{name}% of the run", color, ()))
        data.append(_points(some, [trial.number for trial in some], color))
    best: list[tuple[float, int, float | None]] = []
    for trial in (trial for trial in own if trial.state == "complete"):
        assert trial.loss is not None
        lowest = min(trial.loss, best[-1][2] or math.inf) if best else trial.loss
        best.append((trial.number, trial.number, lowest))
    data.append(
        {
            "type": "scatter",
            "mode": "lines",
            "x": [x for x, _, _ in best],
            "y": [y for _, _, y in best],
            "line": {"color": "--muted", "width": 1, "shape": "hv"},
            "hoverinfo": "skip",
        }
    )
    layout = layout_of({"title": {"text": "trial"}}, focused([(t.number, t.number, t.loss) for t in own]))
    return Chart("history", "Held-out loss of each trial", ".4f", lines, {"data": data, "layout": layout}, False)


def _parallel(own: Sequence[Trial], keys: Sequence[str], space: Space) -> Chart:
    """Draw each trial as a line through its settings, coloured by its place among all."""
    ranked = best_trials(own)
    places = {trial.number: place for place, trial in enumerate(ranked)}
    dimensions = [_dimension(key, ranked, space) for key in keys]
    trace = {
        "type": "parcoords",
        "line": {
            "color": [places[trial.number] for trial in ranked],
            "colorscale": [[0, "--held-out"], [1, "--rule"]],
        },
        "labelangle": -20,
        "labelside": "bottom",
        "dimensions": [*dimensions, {"label": "place", "values": [places[trial.number] + 1 for trial in ranked]}],
    }
    layout = layout_of({}, {}) | {"margin": {"l": 60, "r": 40, "t": 20, "b": 90}}
    lines = [Line("best to worst, strong to pale", "--held-out", ())]
    return Chart("parallel", "Settings of each trial", "d", lines, {"data": [trace], "layout": layout}, False)


def _dimension(key: str, ranked: Sequence[Trial], space: Space) -> dict[str, Any]:
    """Build the axis of one setting: choices at equal distances, numbers by their size or logarithm."""
    setting, label = space.settings[key], key.rpartition(".")[2]
    if setting.choices is not None:
        choices = plain(setting.choices)
        values = [choices.index(t.parameters[key]) if key in t.parameters else 0 for t in ranked]
        return {
            "label": label,
            "values": values,
            "tickvals": list(range(len(choices))),
            "ticktext": [_short(one) for one in choices],
            "range": [0, max(len(choices) - 1, 1)],
        }
    assert setting.low is not None and setting.high is not None
    scale = math.log10 if setting.log else float
    numbers = [scale(t.parameters.get(key, setting.low)) for t in ranked]
    ticks = [setting.low, math.sqrt(setting.low * setting.high) if setting.log else (setting.low + setting.high) / 2]
    ticks.append(setting.high)
    return {
        "label": label,
        "values": numbers,
        "range": [scale(setting.low), scale(setting.high)],
        "tickvals": [scale(one) for one in ticks],
        "ticktext": [f"{one:.3g}" for one in ticks],
    }


def _slice(index: int, key: str, own: Sequence[Trial], space: Space) -> Chart:
    """Draw the loss at the highest rung of each trial against one setting."""
    setting = space.settings[key]
    some = [trial for trial in own if key in trial.parameters]
    kind = {"type": "category"} if setting.choices is not None else {"type": "log" if setting.log else "linear"}
    values = [_short(t.parameters[key]) if setting.choices is not None else t.parameters[key] for t in some]
    layout = layout_of(kind, focused([(t.number, t.number, t.loss) for t in some]))
    lines = [Line("loss at the highest rung of each trial", "--held-out", ())]
    data = [_points(some, values, "--held-out")]
    return Chart(f"slice-{index}", key, ".4f", lines, {"data": data, "layout": layout}, False)


def _points(some: Sequence[Trial], x: Sequence[Any], color: str) -> dict[str, Any]:
    """Build a scatter of losses."""
    return {
        "type": "scatter",
        "mode": "markers",
        "x": list(x),
        "y": [trial.loss for trial in some],
        "customdata": [[trial.number, max(trial.losses)] for trial in some],
        "marker": {"color": color, "size": 7},
        "hovertemplate": "%{y:.4f}, trial %{customdata[0]} at %{customdata[1]}%<extra></extra>",
    }


def _short(value: Any) -> str:
    """Shorten a choice for an axis."""
    text = str(value)
    return text if len(text) <= 18 else f"{text[:17]}…"
