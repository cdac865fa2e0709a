"""The reporter of a run: passes every record of the training loop to the metric files, the console and the trackers."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from relora.errors import UserError
from relora.report.console import Console
from relora.report.history import INCIDENT_KINDS, has_position, read_config
from relora.report.metrics import (
    JsonLines,
    Record,
    iter_json_lines,
    mean_effective_rank,
    mean_relative_update,
    read_json_lines,
)
from relora.report.spikes import Boundary, LossWatch, Rise, window_steps
from relora.report.trackers import Tracker

_Item = TypeVar("_Item")


class Reporter:
    """Writer of metrics.jsonl and restarts.jsonl in an existing run folder, which also shows and forwards the records.

    The two files are the record of the run: a write that fails stops it (`RunStopped`). A tracker is a convenience: one
    that fails is reported once and then left out, so that it cannot end a long run. The rise of the loss after a
    boundary is shown once the window after it has passed (`relora.report.spikes`).
    """

    def __init__(self, run_folder: Path, total_steps: int, trackers: Sequence[Tracker], console: Console) -> None:
        self._window = window_steps(read_config(run_folder)[1])
        with ExitStack() as opened:  # closes the first file if the second cannot be opened
            self._metrics = JsonLines(run_folder / "metrics.jsonl")
            opened.callback(self._metrics.close)
            self._restarts = JsonLines(run_folder / "restarts.jsonl")
            opened.pop_all()
        self._console = console
        self._console.start(total_steps)
        self._trackers = list(trackers)
        self._watch = LossWatch(self._window)
        self._incidents: Counter[str] = Counter()

    def train(self, record: Record) -> None:
        """Report a logged step."""
        self._metrics.append(record)
        self._console.train(record)
        self._track(record)
        self._show_rise(record["step"], self._watch.record(record))

    def incident(self, record: Record) -> None:
        """Report a skipped step (`kind` skipped) or a return to a checkpoint (rewind); trackers get the counts."""
        self._metrics.append(record)
        self._console.incident(record)
        self._incidents[record["kind"]] += 1
        counts = {kind: self._incidents[kind] for kind in INCIDENT_KINDS}
        self._track({"kind": "incidents", "step": record["step"], **counts})
        self._show_rise(record["step"], self._watch.record(record))

    def evaluation(self, record: Record) -> None:
        """Report a held-out measurement."""
        self._metrics.append(record)
        self._console.evaluation(record)
        self._track(record)

    def final(self, record: Record) -> None:
        """Report the held-out measurement of the run's result; the recipe prints it together with the result."""
        self._metrics.append(record)
        self._track(record)

    def measuring(self, batches: Iterable[_Item], total: int, size: str) -> Iterable[_Item]:
        """Yield the batches of the final measurement, which may take long, and show its progress.

        Args:
            total: number of batches.
            size: what is measured, for example `1,234 tokens`.
        """
        return self._console.measuring(batches, total, size)

    def decision(self, record: Record) -> None:
        """Report a decision of the run about its own timetable and the criteria it measured (see `train.adaptive`)."""
        self._metrics.append(record)
        self._track(record)

    def restart(self, record: Record) -> None:
        """Report a restart; trackers get the means over the layers instead of the layers' own figures."""
        self._restarts.append(record)
        self._console.restart(record)
        figures = {name: value for name, value in record.items() if name != "layers"}
        self._track(
            {
                "kind": "restart",
                **figures,
                "relative_update": mean_relative_update(record),
                "effective_rank": mean_effective_rank(record),
            }
        )
        self._show_rise(record["step"], self._watch.boundary(Boundary(record["step"], record["cycle"])))

    def progress(self, step: int) -> None:
        """Show that `step` optimizer steps are done; called at every step, logged or not."""
        self._console.progress(step)

    def message(self, text: str) -> None:
        """Print one line for the user."""
        self._console.message(text)

    def warning(self, text: str) -> None:
        """Print one line for the user, also on a quiet console."""
        self._console.warning(text)

    def positions(self) -> dict[str, int]:
        """Sync the two files and return their lengths in bytes, by name, for the checkpoint that relies on them."""
        for file in self._files:
            file.sync()
        return {file.path.name: file.size for file in self._files}

    def rewind(self, positions: Mapping[str, int]) -> None:
        """Truncate the files to their lengths at a checkpoint: the run repeats what came after it."""
        too_short = [file.path.name for file in self._files if not file.truncate(positions[file.path.name])]
        if too_short:
            self.warning(
                f"{self._metrics.path.parent}: {' and '.join(too_short)} shorter than when the checkpoint was written: "
                "figures of earlier steps are gone; the training is not touched by that"
            )
        try:
            self._read_back()
        except UserError as error:
            self.warning(f"{error}; until then no report can be written")

    def rewinds_to(self, step: int) -> list[Record]:
        """Return the records of all rewinds to the checkpoint of `step`."""
        records = iter_json_lines(self._metrics.path)
        return [record for record in records if record.get("kind") == "rewind" and record.get("step") == step]

    def close(self) -> None:
        """Close trackers, console and files; the files last, so that a tracker that hangs loses no record."""
        for tracker in self._trackers.copy():
            try:
                tracker.close()
            except Exception as error:
                self._drop(tracker, error)
        self._console.close()
        self._metrics.close()
        self._restarts.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def _files(self) -> tuple[JsonLines, JsonLines]:
        """The two metric files."""
        return self._metrics, self._restarts

    def _read_back(self) -> None:
        """Set the counts of incidents and the loss watch to their state at the end of the two files."""
        self._watch, self._incidents = LossWatch(self._window), Counter()
        restarts = [Boundary(r["step"], r["cycle"]) for r in read_json_lines(self._restarts.path) if has_position(r)]
        restarts.reverse()
        for record in iter_json_lines(self._metrics.path):
            if not has_position(record):
                continue
            while restarts and record["step"] > restarts[-1].step:
                self._watch.boundary(restarts.pop())
            if record.get("kind") in INCIDENT_KINDS:
                self._incidents[record["kind"]] += 1
            if record.get("kind") not in ("evaluation", "decision", "final"):
                self._watch.record(record)
        for restart in reversed(restarts):
            self._watch.boundary(restart)

    def _show_rise(self, step: int, rise: Rise | None) -> None:
        """Show the rise of the loss after a boundary, if it is known by now."""
        if rise is not None:
            self._console.rise(step, rise)

    def _track(self, record: Record) -> None:
        """Send a record to every tracker; one that fails gets no more records."""
        for tracker in self._trackers.copy():
            try:
                tracker.log(record)
            except Exception as error:
                self._drop(tracker, error)

    def _drop(self, tracker: Tracker, error: Exception) -> None:
        """Leave a tracker that failed out from now on, and warn once."""
        self._trackers.remove(tracker)
        self._console.warning(f"{type(tracker).__name__} failed and gets no more figures: {error}")
