"""What the training loop talks to: one record in; the file, the console and the trackers out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from relora.report.console import Console
from relora.report.metrics import JsonLines, Record, mean_effective_rank, mean_relative_update
from relora.report.trackers import Tracker


class Reporter:
    """Writes metrics.jsonl and restarts.jsonl into an existing run folder; shows and forwards the records.

    The two files are the record of the run: failing to write them stops it (`RunStopped`). A tracker is a
    convenience: one that fails is reported once and dropped, because no dashboard is worth a week's training.
    """

    def __init__(self, run_folder: Path, total_steps: int, trackers: Sequence[Tracker], console: Console) -> None:
        self._metrics = JsonLines(run_folder / "metrics.jsonl")
        self._restarts = JsonLines(run_folder / "restarts.jsonl")
        self._console = console
        self._console.start(total_steps)
        self._trackers = list(trackers)

    def train(self, record: Record) -> None:
        """A logged step."""
        self._metrics.append(record)
        self._console.train(record)
        self._track(record)

    def evaluation(self, record: Record) -> None:
        """A held-out measurement."""
        self._metrics.append(record)
        self._console.evaluation(record)
        self._track(record)

    def restart(self, record: Record) -> None:
        """A ReLoRA restart; trackers get its means over the layers."""
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

    def progress(self, step: int) -> None:
        """`step` updates are done; for every step, logged or not."""
        self._console.progress(step)

    def message(self, text: str) -> None:
        """One line for the person at the terminal."""
        self._console.message(text)

    def warning(self, text: str) -> None:
        """A message that a quiet console prints, too."""
        self._console.warning(text)

    def positions(self) -> dict[str, int]:
        """Byte lengths of the two files, for the checkpoint."""
        return {file.path.name: file.size for file in (self._metrics, self._restarts)}

    def rewind(self, positions: Mapping[str, int]) -> None:
        """Cut the files back to where they were at a checkpoint: what came after it will be lived again."""
        for file in (self._metrics, self._restarts):
            file.truncate(positions[file.path.name])

    def close(self) -> None:
        """Close everything; the files last, so that a tracker that hangs loses no figure."""
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

    def _track(self, record: Record) -> None:
        for tracker in self._trackers.copy():
            try:
                tracker.log(record)
            except Exception as error:
                self._drop(tracker, error)

    def _drop(self, tracker: Tracker, error: Exception) -> None:
        self._trackers.remove(tracker)
        self._console.warning(f"{type(tracker).__name__} failed and gets no more figures: {error}")
