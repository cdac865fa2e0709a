"""Signals that end a run: it leaves a checkpoint, and the same command continues it to the same bytes."""

import signal
from pathlib import Path

from tests.cli.terminal import LONG_PHASES, done, start, wait_for

from relora.report.metrics import read_json_lines

TIMINGS = {"tokens_per_second", "step_seconds", "seconds", "peak_memory_bytes"}


def test_stopped_by_signals_and_continued_gives_the_same_bytes(config: Path, tmp_path: Path) -> None:
    """SIGTERM and SIGINT leave a new checkpoint, one line and status 143 or 130; SIGKILL leaves the last checkpoint."""
    overrides = ["schedule.total_steps=100", *LONG_PHASES]
    run = tmp_path / "run"
    for number, step in ((signal.SIGTERM, 3), (signal.SIGINT, 25), (signal.SIGKILL, 55)):
        process = start(config, *overrides)
        wait_for(run, step, process)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        saved = max(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))
        logged = [line["step"] for line in read_json_lines(run / "metrics.jsonl")]
        assert saved < 100, "it came to its end before the signal"
        if number == signal.SIGKILL:
            assert process.returncode == -number and saved >= 50
            continue
        assert process.returncode == 128 + number and err.count("\n") == 1 and "Traceback" not in err
        assert f"{number.name}: stopped after step {saved}" in err and "same command continues" in err
        assert logged[-1] == saved >= step
    assert "continuing after step" in done("pretrain", config, *overrides)
    done("pretrain", config, *overrides, f"output_dir={tmp_path / 'whole'}", "--quiet")
    for name in ("weights", "optimizer"):
        path = Path("checkpoints", "step-00000100", f"{name}.safetensors")
        assert (run / path).read_bytes() == (tmp_path / "whole" / path).read_bytes()
    assert (run / "model" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model" / "model.safetensors"
    ).read_bytes()
    for name in ("metrics.jsonl", "restarts.jsonl"):
        figures = [
            [{key: line[key] for key in line.keys() - TIMINGS} for line in read_json_lines(folder / name)]
            for folder in (run, tmp_path / "whole")
        ]
        assert figures[0] == figures[1]
