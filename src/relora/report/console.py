"""Console output of a run: progress and messages.

On a terminal there is one live line, and messages are printed above it. Elsewhere (a pipe, a log file, a CI job) there
are plain lines without control codes, one per logged step.

    time left = steps left · (median of the recent step times + time of evaluations and restarts so far, per step)

so that one slow step does not change it much.
"""

import math
import statistics
import sys
from collections import deque
from collections.abc import Iterable
from typing import TextIO, TypeVar

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TaskID, TextColumn, track
from rich.table import Column
from rich.text import Text

from relora.report.metrics import Record, mean_effective_rank, mean_relative_update, number
from relora.report.spikes import Rise

RECENT_RECORDS = 32
"""Number of logged steps that the median step time is taken over."""

SCORES = ("accuracy", "f1", "matthews", "pearson", "spearman")
"""Measures of a classifier, in the order in which they are shown."""

_Item = TypeVar("_Item")

PHASE_NAMES = {"warm_start": "warm start", "low_rank": "low rank", "full": "full rank"}


class Console:
    """Printer of one run's progress and messages to a stream, by default standard output; if `quiet`, of warnings only.

    A stream that fails (the terminal or pipe is gone) is ignored from then on, and the run continues.
    """

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        stream = sys.stdout if stream is None else stream
        # force_terminal overrides FORCE_COLOR, which many CI systems set: no control codes in a log file
        self._rich = RichConsole(file=stream, force_terminal=stream.isatty(), highlight=False)
        self._stream = stream
        self._is_live = self._rich.is_terminal and not self._rich.is_dumb_terminal and not quiet
        self._live: Progress | None = None
        self._task = TaskID(0)
        self._total_steps = 0
        self._quiet = quiet
        self._first_step: int | None = None
        self._step_seconds: deque[float] = deque(maxlen=RECENT_RECORDS)
        self._pause_seconds = 0.0

    def start(self, total_steps: int) -> None:
        """Set the number of steps of the whole run, including those done before this start."""
        self._total_steps = total_steps

    def train(self, record: Record) -> None:
        """Show a logged step: refresh the live line, or print a plain one."""
        step = record["step"]
        self._step_seconds.append(record["step_seconds"])
        if self._first_step is None:
            self._first_step = step - 1
        if self._is_live:
            self._show(step, describe_phase(record), f"{describe_training(record)}  {self.time_left(step)}")
        elif not self._quiet:
            figures = f"{describe_training(record)}  grad {format_figure(record.get('grad_norm'), 3)}"
            self._print(self._at(step, f"{describe_phase(record):<13}  {figures}  {self.time_left(step)}"))

    def progress(self, step: int) -> None:
        """Move the bar of the live line to `step` optimizer steps; cheap enough to be called at every step."""
        if self._live is not None:
            self._live.update(self._task, completed=step)

    def evaluation(self, record: Record) -> None:
        """Show a held-out measurement."""
        self._pause_seconds += record["seconds"]
        self.message(self._at(record["step"], describe_evaluation(record)))

    def restart(self, record: Record) -> None:
        """Show a restart; of frequent ones those that were measured."""
        self._pause_seconds += record["seconds"]
        if record["loss_before"] is not None:
            self.message(self._at(record["step"], describe_restart(record)))

    def incident(self, record: Record) -> None:
        """Show a skipped step or a rewind as a warning."""
        self.warning(self._at(record["step"], describe_incident(record)))

    def rise(self, step: int, rise: Rise) -> None:
        """Show the rise of the training loss after a boundary, known since `step`; a spike as a warning."""
        text = self._at(step, describe_rise(rise))
        if rise.is_spike:
            self.warning(text)
        else:
            self.message(text)

    def message(self, text: str) -> None:
        """Print one line, above the live line if there is one; nothing if the console is quiet."""
        if not self._quiet:
            self._print(text)

    def warning(self, text: str) -> None:
        """Print one line, marked as a warning, also if the console is quiet."""
        self._print(f"warning: {text}")

    def measuring(self, batches: Iterable[_Item], total: int, size: str) -> Iterable[_Item]:
        """Yield the batches of the measurement after the last step: under a bar on a terminal, else after one line.

        The live line ends here, with its last state.

        Args:
            total: number of batches.
            size: what is measured, for example `1,234 tokens`.
        """
        self.close()
        if self._is_live:
            return track(batches, f"held-out loss of all {size}", total, console=self._rich, transient=True)
        self.message(f"measuring the held-out loss of the result on all {size}")
        return batches

    def time_left(self, step: int) -> str:
        """Format the time left after `step` steps, e.g. `1:02:03 left`; empty before the first logged step."""
        if not self._step_seconds or self._first_step is None or step <= self._first_step:
            return ""
        pause_per_step = self._pause_seconds / (step - self._first_step)
        seconds = (self._total_steps - step) * (statistics.median(self._step_seconds) + pause_per_step)
        return f"{format_duration(max(0.0, seconds))} left"

    def close(self) -> None:
        """Stop updating the live line; its last state stays on the terminal."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _show(self, step: int, where: str, figures: str) -> None:
        """Start the live line if it is not there yet, and update it."""
        if self._live is None:
            self._live = Progress(
                TextColumn("{task.description}", table_column=Column(no_wrap=True)),
                BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
                TextColumn("{task.completed}/{task.total}", table_column=Column(no_wrap=True)),
                TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=True)),
                console=self._rich,
                refresh_per_second=4,
                expand=True,
            )
            self._task = self._live.add_task(where, total=self._total_steps, figures=figures)
            self._live.start()
        self._live.update(self._task, completed=step, description=where, figures=figures)

    def _at(self, step: int, text: str) -> str:
        """Prefix a text with the step, padded to the width of the last step's number."""
        return f"step {step:>{len(str(self._total_steps))}}  {text.rstrip()}"

    def _print(self, text: str) -> None:
        """Print one line; characters that the stream cannot encode are escaped."""
        try:
            # `Text`, so that rich reads no markup in a message; `soft_wrap`, so that it breaks no line
            if self._is_live:
                self._rich.print(Text(text), soft_wrap=True)
            else:
                print(text, file=self._stream, flush=True)
        except UnicodeEncodeError:  # the stream's encoding lacks a character, e.g. ASCII
            self._print(text.encode("ascii", "backslashreplace").decode())
        except OSError:  # the terminal or the pipe is gone; the run goes on without output
            self._quiet, self._is_live = True, False


def describe_phase(record: Record) -> str:
    """Format the phase: `warm start`, `full rank`, or e.g. `low rank, 3` in the cycle after the third restart."""
    name = PHASE_NAMES[record["phase"]]
    return f"{name}, {record['cycle']}" if record["phase"] == "low_rank" else name


def describe_training(record: Record) -> str:
    """Format loss, learning rate (of the factors in the low-rank phase) and tokens per second, for 80 columns."""
    speed = f"{record['tokens_per_second']:,.0f} tok/s"
    return f"loss {format_figure(record['loss'])}  lr {record.get('lowrank_lr', record['lr']):.1e}  {speed}"


def describe_evaluation(record: Record) -> str:
    """Format held-out loss, perplexity, bits per byte if known, and on how many tokens; of a classifier, its scores."""
    loss, size = format_figure(record["validation_loss"]), f"{describe_size(record)}, {record['seconds']:.1f} s"
    scores = [f"{name} {format_figure(record[name])}" for name in SCORES if name in record]
    if scores:
        return f"held-out loss {loss}, {', '.join(scores)} ({size})"
    bits = record.get("bits_per_byte")  # responses have none
    per_byte = "" if bits is None else f", {format_figure(bits)} bits per byte"
    return f"held-out loss {loss}, perplexity {format_figure(record['perplexity'], 2)}{per_byte} ({size})"


def describe_size(record: Record) -> str:
    """Format on what a held-out measurement was: all tokens (of a classifier: examples) or a sample of how many.

    Records of earlier versions do not say it; they were of the first tokens.
    """
    unit = "examples" if any(name in record for name in SCORES) else "tokens"
    measured, whole = (number(record, key) for key in ("validation_tokens", "whole_tokens"))
    if measured is None:
        return f"an unknown number of {unit}"
    if whole is None:
        return f"{measured:,} {unit}"
    return f"sample of {measured:,} of {whole:,} {unit}" if record.get("sample") else f"all {measured:,} {unit}"


def describe_restart(record: Record) -> str:
    """Format size and effective rank of the merged update, and the held-out loss on both sides of the restart."""
    return (
        f"restart {record['cycle']}: merged {len(record['layers'])} layers, "
        f"|ΔW|/|W| {format_figure(mean_relative_update(record), 3)}, "
        f"effective rank {format_figure(mean_effective_rank(record), 1)}, "
        f"held-out loss {format_figure(record['loss_before'])} -> {format_figure(record['loss_after'])}, "
        f"{record['seconds']:.1f} s"
    )


def describe_incident(record: Record) -> str:
    """Format how a non-finite loss or gradient was handled, and where in the data it occurred."""
    where = f" in {record['batch']}" if record["batch"] else ""
    if record["kind"] == "rewind":
        return f"gone back to here, past what was not finite at step {record['failed_step']}{where}"
    loss, norm = (format_figure(number(record, key)) for key in ("loss", "grad_norm"))
    return f"left out, nothing was updated: loss {loss}, gradient norm {norm}{where}"


def describe_rise(rise: Rise) -> str:
    """Format the rise of the training loss after a boundary: within the noise, or recovered after how many steps."""
    where = f"after the {rise.boundary.name} at step {rise.boundary.step} the training loss"
    if rise.rise <= 0:
        return f"{where} did not rise ({format_figure(rise.before, 3)} -> {format_figure(rise.peak, 3)})"
    how = f"rose by {rise.rise:.3f} ({format_figure(rise.before, 3)} -> {format_figure(rise.peak, 3)})"
    if not rise.is_spike:
        return f"{where} {how}, within its noise"
    back = "not back yet" if rise.recovered_after is None else f"back after {rise.recovered_after} steps"
    return f"{where} {how}, {back}"


def format_figure(value: float | None, digits: int = 4) -> str:
    """Format a number with so many decimals; a dash for None and NaN."""
    return "-" if value is None or math.isnan(value) else f"{value:,.{digits}f}"


def format_duration(seconds: float) -> str:
    """Format a duration as `H:MM:SS`, with days before it if there are any: `3d 4:05:06`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    time = f"{hour}:{minute:02}:{second:02}"
    return f"{days}d {time}" if days else time
