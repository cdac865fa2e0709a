import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from relora.report.console import Console
from relora.report.metrics import read_json_lines
from relora.report.reporter import Reporter

TRAIN = {
    "kind": "train",
    "tokens": 1024,
    "phase": "low_rank",
    "cycle": 0,
    "loss": 4.5,
    "lr": 1e-3,
    "grad_norm": 0.5,
    "tokens_per_second": 1e4,
    "step_seconds": 0.1,
    "peak_memory_bytes": 1,
}
RESTART = {
    "step": 5,
    "tokens": 5120,
    "cycle": 1,
    "loss_before": 4.0,
    "loss_after": 4.0,
    "optimizer": "zero",
    "moments_cleared": 10,
    "seconds": 0.1,
    "layers": [{"update_norm": 1.0, "weight_norm": 10.0, "effective_rank": 3.0}],
}


class Recorder:
    """A tracker that keeps what it is given, and breaks where it is told to."""

    def __init__(self, breaks_at: int | None = None) -> None:
        self.records: list[Mapping[str, Any]] = []
        self.is_closed = False
        self.breaks_at = breaks_at

    def log(self, record: Mapping[str, Any]) -> None:
        if record["step"] == self.breaks_at:
            raise ConnectionError("no route to host")
        self.records.append(record)

    def close(self) -> None:
        self.is_closed = True


def test_records_go_to_files_and_trackers(tmp_path: Path) -> None:
    tracker = Recorder()
    evaluation = {
        "kind": "evaluation",
        "step": 1,
        "validation_loss": 4.0,
        "perplexity": 54.6,
        "bits_per_byte": 1.5,
        "validation_tokens": 100,
        "seconds": 0.1,
    }
    with Reporter(tmp_path, 10, [tracker], Console(quiet=True)) as reporter:
        reporter.train({**TRAIN, "step": 1})
        reporter.evaluation(evaluation)
        reporter.restart(RESTART)
    assert read_json_lines(tmp_path / "metrics.jsonl") == [{**TRAIN, "step": 1}, evaluation]
    assert read_json_lines(tmp_path / "restarts.jsonl") == [RESTART]
    assert [record["kind"] for record in tracker.records] == ["train", "evaluation", "restart"]
    restart = tracker.records[-1]
    assert (restart["relative_update"], restart["effective_rank"]) == (0.1, 3.0)
    assert "layers" not in restart
    assert tracker.is_closed


def test_rewind_leaves_no_step_twice(tmp_path: Path) -> None:
    with Reporter(tmp_path, 10, [], Console(quiet=True)) as reporter:
        for step in range(1, 5):
            reporter.train({**TRAIN, "step": step})
        checkpoint = reporter.positions()
        reporter.train({**TRAIN, "step": 5})
        reporter.restart(RESTART)
    with Reporter(tmp_path, 10, [], Console(quiet=True)) as reporter:
        reporter.rewind(checkpoint)
        assert reporter.positions() == checkpoint
        reporter.train({**TRAIN, "step": 5})
        reporter.restart(RESTART)
    assert [record["step"] for record in read_json_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert len(read_json_lines(tmp_path / "restarts.jsonl")) == 1


def test_a_tracker_that_fails_is_reported_once_and_dropped(tmp_path: Path) -> None:
    stream, broken, sound = io.StringIO(), Recorder(breaks_at=2), Recorder()
    with Reporter(tmp_path, 10, [broken, sound], Console(quiet=True, stream=stream)) as reporter:
        for step in range(1, 6):
            reporter.train({**TRAIN, "step": step})
    assert stream.getvalue() == "warning: Recorder failed and gets no more figures: no route to host\n"
    assert (len(broken.records), len(sound.records)) == (1, 5)
    assert len(read_json_lines(tmp_path / "metrics.jsonl")) == 5


def test_a_tracker_that_cannot_close_does_not_hide_the_end(tmp_path: Path) -> None:
    class Stuck(Recorder):
        def close(self) -> None:
            raise TimeoutError("upload timed out")

    stream = io.StringIO()
    with Reporter(tmp_path, 10, [Stuck()], Console(quiet=True, stream=stream)) as reporter:
        reporter.train({**TRAIN, "step": 1})
    assert "upload timed out" in stream.getvalue()
