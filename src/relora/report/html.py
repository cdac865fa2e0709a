"""Report of a run: one HTML file that needs no network, for a finished run or one that still goes on.

Everything that comes from data or configuration is escaped: text by `html.escape`, and figures by writing every `<` of
their JSON as `\\u003c`, so that no string can end the script element that holds them. A content security policy
forbids the page to load anything.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from statistics import median
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs

from relora.errors import RunStopped
from relora.files.atomic import write_text
from relora.files.untrusted import check_folder
from relora.report.charts import Chart, charts
from relora.report.console import PHASE_NAMES, describe_rise, describe_size, format_duration, format_figure
from relora.report.history import HeldOut, History, Segment, perplexity, read_history
from relora.report.metrics import Record, mean_effective_rank, mean_relative_update, number
from relora.report.spikes import NOISE_FACTOR, Rise

PHASE_COLUMNS = ("Phase", "Steps", "Tokens", "Perplexity before", "Perplexity after", "Change")
RESTART_COLUMNS = (
    "Restart",
    "Step",
    "Held-out loss before",
    "Held-out loss after",
    "Lowest perplexity of its cycle",
    "Perplexity at its end",
    "|ΔW| / |W|",
    "Effective rank",
    "Training loss rose by",
    "Back after steps",
    "Seconds",
)
INCIDENT_COLUMNS = ("Step", "What was done", "Loss", "Gradient norm", "Where in the data")
INCIDENT_NAMES = {"skipped": "step left out", "rewind": "gone back to this step"}
RESTART_NOTE = (
    "A restart merges the factors into the weights and draws new ones, so the held-out loss stays what it was up to "
    "rounding. |ΔW| / |W| is the Frobenius norm of the merged update (of balanced factors with what they began with) "
    "over that of the weight; it and the effective rank are means over the layers. The cycle of a restart is the "
    "training that follows it. The training loss is "
    "noisy, so its highest value after a restart lies above its mean before; only a rise of more than "
    f"{NOISE_FACTOR:g} times the noise counts as a spike, and is marked."
)


def write_report(run_folder: Path) -> Path:
    """Write RUN/report.html from the files of the run and return its path.

    Raises:
        UserError: the run has no records yet, or one of its files is damaged.
        RunStopped: the report cannot be written.
    """
    check_folder(run_folder)
    history = read_history(run_folder)
    path = run_folder / "report.html"
    try:
        write_text(path, render(history))
    except OSError as error:
        raise RunStopped(f"{path}: cannot be written: {error.strerror}; free some space or mend its rights") from None
    return path


def render(history: History) -> str:
    """Return the whole page as HTML."""
    figures = charts(history)
    page = Template(files("relora.report").joinpath("page.html").read_text(encoding="utf-8"))
    return page.substitute(
        title=escape(f"{history.name} · relora"),
        body="\n".join(_body(history, figures)),
        figures=script_json({chart.id: chart.figure for chart in figures}),
        plotly=get_plotlyjs(),
    )


def script_json(value: Any) -> str:
    """Return JSON that is safe inside a `<script>` element, whatever strings it contains."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _body(history: History, figures: Sequence[Chart]) -> Iterator[str]:
    """Yield the parts of the page in their order; parts for which the run has no figures are left out."""
    yield f"<header><h1>{escape(history.name)}</h1>{_lead(history)}{_key_figures(history)}</header>"
    yield _legend(history)
    yield f'<section class="charts">{"".join(map(figure_html, figures))}</section>'
    if history.held_out:
        yield "<h2>Phases</h2>" + table(PHASE_COLUMNS, map(_phase_row, history.segments))
        if history.is_sampled:
            yield f'<p class="note">{_sample_note(history)}</p>'
    if history.restarts:
        measured = history.measured_restarts
        yield "<h2>Restarts</h2>" + table(RESTART_COLUMNS, (_restart_row(history, r) for r in measured))
        if len(measured) < len(history.restarts):
            yield f'<p class="note">{len(measured):,} of {len(history.restarts):,} restarts were measured.</p>'
        yield f'<p class="note">{RESTART_NOTE}</p>'
    if (switch_rise := _rise(history, cycle=0)) is not None:
        yield f'<p class="note">{escape(describe_rise(switch_rise).capitalize())}.</p>'
    if history.incidents:
        yield "<h2>Not finite</h2>" + table(INCIDENT_COLUMNS, map(_incident_row, history.incidents))
    if history.samples:
        yield "<h2>Samples</h2>" + "".join(map(_sample, history.samples))
    yield "<h2>How it was made</h2>"
    if history.config_text:
        yield f"<details><summary>Configuration</summary><pre>{escape(history.config_text)}</pre></details>"
    if history.environment:
        lines = "\n".join(f"{key}: {value}" for key, value in history.environment.items() if key != "notes")
        yield f"<details><summary>Environment</summary><pre>{escape(lines)}</pre></details>"


def _lead(history: History) -> str:
    """Build the sentence with the result, one if the run is not finished, and lines on what gets no factors."""
    last_step, last_tokens = history.last
    result = f"<b>{last_tokens:,} tokens</b> in {format_duration(history.seconds)} of training."
    measured = _last_measured(history)
    loss = number(measured, "validation_loss")
    if loss is None and history.held_out:
        loss = history.held_out[-1].loss
    if loss is not None:
        result = f"Held-out perplexity <b>{perplexity(loss):,.2f}</b> ({describe_size(measured)}) after {result}"
    total = history.setting("schedule", "total_steps")
    if isinstance(total, int) and last_step < total:
        result += f" Not finished: step {last_step:,} of {total:,}."
    notes = history.environment.get("notes")
    lines = [str(note) for note in notes] if isinstance(notes, list) else []
    return f'<p class="lead">{result}</p>' + "".join(f'<p class="note">{escape(line)}.</p>' for line in lines)


def _last_measured(history: History) -> Record:
    """Return the record of the result's measurement, or of the last one in training; empty where there is none."""
    return history.final or (history.evaluations[-1] if history.evaluations else {})


def _sample_note(history: History) -> str:
    """Build the note that held-out figures in training are of a sample."""
    sample = next(record for record in reversed(history.evaluations) if record.get("sample") is True)
    note = f"Held-out figures in training are of a {describe_size(sample)}, the same ones at every measurement."
    return escape(note + ("" if history.final is None else " The figure at the top is of the result on the whole."))


def _key_figures(history: History) -> str:
    """Build the list of key figures: method, model, speed, memory and others that are known."""
    last_evaluation = _last_measured(history)
    model = history.setting("model", "preset") or history.setting("model", "path")
    parameters = number(history.environment, "parameters")
    speeds = [speed for record in history.train if (speed := number(record, "tokens_per_second")) is not None]
    peak = max((number(record, "peak_memory_bytes") or 0 for record in history.train), default=0)
    bits_per_byte = number(last_evaluation, "bits_per_byte")
    figures = [
        ("Method", history.setting("method")),
        ("Model", model),
        ("Parameters", None if parameters is None else f"{parameters:,.0f}"),
        ("Bits per byte", None if bits_per_byte is None else f"{bits_per_byte:.3f}"),
        ("Restarts", len(history.restarts) or None),
        ("Tokens per second", f"{median(speeds):,.0f}" if speeds else None),
        ("Peak memory", f"{peak / 2**30:.2f} GiB" if peak else None),
    ]
    items = (f"<div><dt>{name}</dt><dd>{escape(str(value))}</dd></div>" for name, value in figures if value is not None)
    return f'<dl class="figures">{"".join(items)}</dl>'


def _legend(history: History) -> str:
    """Build the legend of the charts' shades and marks, for those that the run has."""
    phases = {segment.phase for segment in history.segments}
    items = [
        f'<span><i style="background: var(--{phase.replace("_", "-")})"></i>{PHASE_NAMES[phase]}</span>'
        for phase in ("warm_start", "low_rank")
        if phase in phases
    ]
    if history.restarts:
        items.append('<span><i class="restart"></i>restart</span>')
    if any(rise.is_spike for rise in history.rises):
        items.append('<span><b class="spike">&#9660;</b>loss spike</span>')
    if history.incidents:
        items.append('<span><i class="incident"></i>step left out or gone back to</span>')
    items.append("<span>drag to zoom, double-click to zoom out</span>")
    return f'<div class="key">{"".join(items)}</div>'


def figure_html(chart: Chart) -> str:
    """Build the element that a chart is drawn in, under a heading with the names and last values of its lines."""
    words = []
    for line in chart.lines:
        value = next((value for _, _, value in reversed(line.points) if value is not None), None)
        figure = "" if value is None or not chart.shows_last_value else format(value, chart.format)
        words.append(f'<span style="color: var({line.color})">{escape(line.label)} {figure}</span>')
    return (
        f"<figure><figcaption>{chart.title} {''.join(words)}</figcaption>"
        f'<div id="{chart.id}" role="img" aria-label="{chart.title}"></div></figure>'
    )


def _phase_row(segment: Segment) -> list[str]:
    """Build the cells of one segment in the table of phases."""
    name = PHASE_NAMES.get(segment.phase, segment.phase)
    if segment.phase == "low_rank":
        several = segment.last_cycle > segment.cycle
        cycles = f"cycles {segment.cycle} to {segment.last_cycle}" if several else f"cycle {segment.cycle}"
        name += f", {cycles}"
    (first_step, first_tokens), (last_step, last_tokens) = segment.first, segment.last
    change = "-"
    if segment.before and segment.after:
        change = f"{100 * (segment.after.perplexity / segment.before.perplexity - 1):+.1f} %"
    steps, tokens = f"{first_step:,} to {last_step:,}", f"{last_tokens - first_tokens:,}"
    return [name, steps, tokens, _perplexity(segment.before), _perplexity(segment.after), change]


def _restart_row(history: History, restart: Record) -> list[str]:
    """Build the cells of one restart in the table of restarts."""
    cycle = restart["cycle"]
    segments = [item for item in history.segments if item.phase == "low_rank" and item.cycle == cycle]
    segment = segments[0] if segments else None
    rank = format_figure(mean_effective_rank(restart), 1)
    r = history.setting("lowrank", "r")
    return [
        str(cycle),
        f"{restart['step']:,}",
        format_figure(number(restart, "loss_before")),
        format_figure(number(restart, "loss_after")),
        _perplexity(segment.lowest if segment else None),
        _perplexity(segment.after if segment else None),
        format_figure(mean_relative_update(restart)),
        rank if r is None else f"{rank} of {r}",
        *_rise_cells(_rise(history, cycle)),
        format_figure(number(restart, "seconds"), 1),
    ]


def _rise(history: History, cycle: int) -> Rise | None:
    """Return the rise of the training loss at the beginning of a cycle; None where it was not measured."""
    return next((rise for rise in history.rises if rise.boundary.cycle == cycle), None)


def _rise_cells(rise: Rise | None) -> tuple[str, str]:
    """Build two cells: the rise of the training loss, and the steps until it recovered (only for a spike)."""
    if rise is None:
        return "-", "-"
    if not rise.is_spike:
        return f"{rise.rise:+.3f}", "noise"
    return f"{rise.rise:+.3f} \N{BLACK DOWN-POINTING TRIANGLE}", str(rise.recovered_after or "not back")


def _incident_row(record: Record) -> list[str]:
    """Build the cells of one skipped step or rewind."""
    done = INCIDENT_NAMES[record["kind"]]
    if (failed := number(record, "failed_step")) is not None:
        done += f", from step {failed:,.0f}"
    figures = (format_figure(number(record, key)) for key in ("loss", "grad_norm"))
    return [f"{record['step']:,}", done, *figures, str(record.get("batch", "-"))]


def _perplexity(point: HeldOut | None) -> str:
    """Format the perplexity of a measurement; a dash without one."""
    return "-" if point is None else f"{point.perplexity:,.2f}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Build an HTML table with all cells escaped."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _sample(sample: Record) -> str:
    """Build the quotation of one generated text, with its prompt in bold."""
    prompt, text = str(sample.get("prompt", "")), str(sample.get("text", ""))
    text = text.removeprefix(prompt)
    return (
        f"<blockquote><p><b>{escape(prompt)}</b>{escape(text)}</p>"
        f"<footer>after step {escape(str(sample.get('step', '?')))}</footer></blockquote>"
    )
