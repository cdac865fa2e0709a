import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

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
EVALUATION = {
    "kind": "evaluation",
    "step": 1,
    "tokens": 1024,
    "phase": "low_rank",
    "cycle": 0,
    "validation_loss": 4.0,
    "perplexity": 54.6,
    "bits_per_byte": 1.5,
    "validation_tokens": 100,
    "seconds": 0.1,
}
FINAL = EVALUATION | {"kind": "final", "sample": False, "whole_tokens": 100}
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
    """Tracker that keeps its records, and raises in the methods that a test names."""

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
    with Reporter(tmp_path, 10, [tracker], Console(quiet=True)) as reporter:
        reporter.train({**TRAIN, "step": 1})
        reporter.evaluation(EVALUATION)
        reporter.restart(RESTART)
        reporter.final(FINAL)
    assert read_json_lines(tmp_path / "metrics.jsonl") == [{**TRAIN, "step": 1}, EVALUATION, FINAL]
    assert read_json_lines(tmp_path / "restarts.jsonl") == [RESTART]
    assert [record["kind"] for record in tracker.records] == ["train", "evaluation", "restart", "final"]
    restart = tracker.records[-2]
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


def test_incidents_go_to_the_file_the_console_and_as_counts_to_trackers(tmp_path: Path) -> None:
    stream, tracker = io.StringIO(), Recorder()
    place = {"tokens": 1024, "phase": "low_rank", "cycle": 0, "batch": "batch 3"}
    skipped = {"kind": "skipped", "step": 4, **place, "loss": float("nan"), "grad_norm": None}
    rewind = {"kind": "rewind", "step": 2, **place, "failed_step": 5}
    with Reporter(tmp_path, 10, [tracker], Console(quiet=True, stream=stream)) as reporter:
        reporter.incident(skipped)
        positions = reporter.positions()
        reporter.incident(rewind)
    assert read_json_lines(tmp_path / "metrics.jsonl") == [skipped | {"loss": None}, rewind]
    assert tracker.records == [
        {"kind": "incidents", "step": 4, "skipped": 1, "rewind": 0},
        {"kind": "incidents", "step": 2, "skipped": 1, "rewind": 1},
    ]
    assert stream.getvalue().count("warning: ") == 2
    with Reporter(tmp_path, 10, [tracker], Console(quiet=True, stream=io.StringIO())) as reporter:
        reporter.rewind(positions)
        reporter.incident(skipped)
    assert tracker.records[-1] == {"kind": "incidents", "step": 4, "skipped": 2, "rewind": 0}


def spiking(step: int) -> dict[str, Any]:
    """Record of a run whose loss rises after the restart at step 20 for eight steps."""
    loss = 5.0 if 20 < step <= 28 else 4.0 + 0.01 * (-1) ** step
    return {**TRAIN, "step": step, "cycle": int(step > 20), "loss": loss}


def tell(folder: Path, first: int, last: int, positions: Mapping[str, int] | None = None) -> tuple[str, dict[str, int]]:
    """Run steps `first` to `last`, new or continued; return the console's output and the lengths of the files."""
    stream = io.StringIO()
    with Reporter(folder, 60, [], Console(quiet=True, stream=stream)) as reporter:
        reporter.rewind(positions or {"metrics.jsonl": 0, "restarts.jsonl": 0})
        for step in range(first, last + 1):
            if step == 21:
                reporter.restart(RESTART | {"step": 20})
            reporter.train(spiking(step))
        return stream.getvalue(), reporter.positions()


@pytest.mark.parametrize("killed_after", [1, 19, 20, 21, 25, 39, 40, 41, 50])
def test_a_spike_is_shown_once_wherever_the_run_was_killed(tmp_path: Path, killed_after: int) -> None:
    (tmp_path / "config.yaml").write_text(json.dumps({"restart": {"warmup_steps": 10}, "log": {"every_steps": 1}}))
    said, checkpoint = tell(tmp_path, 1, killed_after)
    lost, _ = tell(
        tmp_path, killed_after + 1, min(killed_after + 3, 50), checkpoint
    )  # steps after the checkpoint, before the kill
    again, _ = tell(tmp_path, killed_after + 1, 50, checkpoint)
    assert said + again == (
        "warning: step 40  after the restart at step 20 the training loss rose by 1.000 (4.000 -> 5.000), "
        "back after 13 steps\n"
    )
    assert lost in ("", said + again)
    assert [record["step"] for record in read_json_lines(tmp_path / "metrics.jsonl")] == list(range(1, 51))


def test_an_evaluation_before_the_checkpoint_does_not_swallow_the_spike(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(json.dumps({"restart": {"warmup_steps": 10}, "log": {"every_steps": 2}}))
    said, _ = tell(tmp_path, 1, 39)
    with Reporter(tmp_path, 60, [], Console(quiet=True)) as reporter:
        reporter.evaluation(EVALUATION | {"step": 40})
        reporter.final(EVALUATION | {"kind": "final", "step": 40})
        checkpoint = reporter.positions()
    again, _ = tell(tmp_path, 42, 42, checkpoint)
    assert said == ""
    assert again.startswith("warning: step 42  after the restart at step 20 the training loss rose by 1.000")


def test_files_shorter_than_at_the_checkpoint_are_one_warning(tmp_path: Path) -> None:
    _, checkpoint = tell(tmp_path, 1, 30)
    for name in ("metrics.jsonl", "restarts.jsonl"):
        (tmp_path / name).unlink()
    said, _ = tell(tmp_path, 31, 40, checkpoint)
    assert said == (
        f"warning: {tmp_path}: metrics.jsonl and restarts.jsonl shorter than when the checkpoint was written: "
        "figures of earlier steps are gone; the training is not touched by that\n"
    )
    assert [record["step"] for record in read_json_lines(tmp_path / "metrics.jsonl")] == list(range(31, 41))


def test_a_damaged_line_does_not_keep_a_run_from_going_on(tmp_path: Path) -> None:
    _, checkpoint = tell(tmp_path, 1, 30)
    content = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(content.replace(b"{", b"[", 1))
    said, _ = tell(tmp_path, 31, 40, checkpoint)
    assert said == (
        f"warning: {tmp_path / 'metrics.jsonl'}:1: not a JSON object; mend or delete this line; "
        "until then no report can be written\n"
    )
