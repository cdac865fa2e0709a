import io
import re
from typing import Any

import pytest

from relora.report.console import Console, format_duration, format_figure
from relora.report.spikes import Boundary, Rise

EVALUATION = {
    "kind": "evaluation",
    "step": 400,
    "validation_loss": 3.21441,
    "perplexity": 24.888,
    "bits_per_byte": 1.2345,
    "validation_tokens": 200_000,
    "seconds": 2.0,
}
RESTART = {
    "step": 400,
    "cycle": 2,
    "loss_before": 3.21441,
    "loss_after": 3.21442,
    "seconds": 0.2,
    "layers": [{"update_norm": 0.31, "weight_norm": 10.0, "effective_rank": 41.2}] * 28,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def train_record(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "train",
        "step": step,
        "phase": "warm_start",
        "cycle": 0,
        "loss": 4.5,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "tokens_per_second": 12_345.6,
        "step_seconds": 0.5,
        **changes,
    }


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    return Terminal()


def test_plain_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as CI systems do
    stream = io.StringIO()
    console = Console(stream=stream)
    console.start(2000)
    console.train(train_record(10))
    console.train(train_record(400, phase="low_rank", cycle=1, lr=5e-4, lowrank_lr=1e-3))
    console.evaluation(EVALUATION | {"sample": True, "whole_tokens": 1_000_000})
    console.evaluation(EVALUATION | {"sample": False, "whole_tokens": 200_000})
    console.restart(RESTART)
    assert list(console.measuring([1, 2], 2, "1,000,000 tokens")) == [1, 2]
    console.message("done [bold]here[/bold]")
    console.close()
    assert stream.getvalue().splitlines() == [
        "step   10  warm start     loss 4.5000  lr 1.0e-03  12,346 tok/s  grad 0.500  0:16:35 left",
        "step  400  low rank, 1    loss 4.5000  lr 1.0e-03  12,346 tok/s  grad 0.500  0:13:20 left",
        "step  400  held-out loss 3.2144, perplexity 24.89, 1.2345 bits per byte "
        "(sample of 200,000 of 1,000,000 tokens, 2.0 s)",
        "step  400  held-out loss 3.2144, perplexity 24.89, 1.2345 bits per byte (all 200,000 tokens, 2.0 s)",
        "step  400  restart 2: merged 28 layers, |ΔW|/|W| 0.031, effective rank 41.2, "
        "held-out loss 3.2144 -> 3.2144, 0.2 s",
        "measuring the held-out loss of the result on all 1,000,000 tokens",
        "done [bold]here[/bold]",
    ]


def test_one_live_line_on_a_terminal(terminal: Terminal) -> None:
    console = Console(stream=terminal)
    console.start(2000)
    console.train(train_record(1990, phase="low_rank", cycle=12, loss=13.5))
    console.progress(1991)
    console.message("a message above it")
    console.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "a message above it\n" in shown
    last = shown.rstrip().splitlines()[-1]
    assert len(last) <= 80
    for part in ("low rank, 12", "1991/2000", "loss 13.5000", "lr 1.0e-03", "12,346 tok/s", "0:00:05 left"):
        assert part in last


def test_the_final_measurement_has_a_bar_on_a_terminal(terminal: Terminal) -> None:
    console = Console(stream=terminal)
    console.start(20)
    console.train(train_record(20))
    assert list(console.measuring(range(3), 3, "1,000 tokens")) == [0, 1, 2]
    console.message("held-out perplexity 5.00")
    console.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "20/20" in shown and "held-out loss of all 1,000 tokens" in shown and "held-out perplexity 5.00\n" in shown


def test_quiet_prints_warnings_only(terminal: Terminal) -> None:
    for stream in (io.StringIO(), terminal):
        console = Console(quiet=True, stream=stream)
        console.start(2000)
        console.train(train_record(10))
        console.progress(11)
        console.evaluation(EVALUATION)
        console.restart(RESTART)
        assert list(console.measuring([1], 1, "8 tokens")) == [1]
        console.message("not this")
        console.warning("but this")
        console.close()
        assert stream.getvalue() == "warning: but this\n"


def test_time_left_is_steady_under_one_slow_step_and_counts_pauses() -> None:
    console = Console(quiet=True)
    console.start(1000)
    assert console.time_left(0) == ""
    for step in range(1, 101):
        console.train(train_record(step, step_seconds=600.0 if step == 90 else 1.0))
    assert console.time_left(100) == "0:15:00 left"
    console.evaluation({**EVALUATION, "seconds": 50.0})  # half a second more per step so far
    assert console.time_left(100) == "0:22:30 left"
    assert console.time_left(1000) == "0:00:00 left"


def test_a_resumed_run_counts_pauses_over_its_own_steps() -> None:
    console = Console(quiet=True)
    console.start(1000)
    console.train(train_record(501, step_seconds=1.0))
    console.evaluation({**EVALUATION, "seconds": 10.0})
    assert console.time_left(510) == f"{format_duration(490 * 2)} left"


def test_a_figure_that_is_unknown_is_a_dash() -> None:
    stream = io.StringIO()
    console = Console(stream=stream)
    console.start(10)
    console.train(train_record(1, loss=None, grad_norm=float("nan")))
    console.evaluation({**EVALUATION, "bits_per_byte": float("nan")})
    console.evaluation({**EVALUATION, "bits_per_byte": None})
    console.restart({**RESTART, "layers": []})
    assert "loss -  lr" in stream.getvalue()
    assert "grad -" in stream.getvalue()
    assert stream.getvalue().count("bits per byte") == stream.getvalue().count(", - bits per byte") == 1
    assert "merged 0 layers, |ΔW|/|W| -, effective rank -," in stream.getvalue()


def test_a_small_character_set_does_not_stop_the_run() -> None:
    raw = io.BytesIO()
    console = Console(stream=io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    console.start(2000)
    console.restart(RESTART)
    assert rb"|\u0394W|/|W| 0.031" in raw.getvalue()


def test_a_pipe_that_is_gone_does_not_stop_the_run() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    console = Console(stream=Gone())
    console.start(2000)
    console.train(train_record(10))
    console.warning("nobody reads this")
    console.close()


@pytest.mark.parametrize(
    ("rise", "text"),
    [
        (
            Rise(Boundary(1000, 2), 3.52, 3.93, 1030, 0.05, 60),
            "warning: step 1100  after the restart at step 1000 the training loss rose by 0.410 (3.520 -> 3.930), "
            "back after 60 steps",
        ),
        (
            Rise(Boundary(500, 0), 3.52, 3.93, 530, 0.05, None),
            "warning: step 1100  after the switch to low rank at step 500 the training loss rose by 0.410 "
            "(3.520 -> 3.930), not back yet",
        ),
        (
            Rise(Boundary(1000, 2), 3.52, 3.6, 1030, 0.05, 60),
            "step 1100  after the restart at step 1000 the training loss rose by 0.080 (3.520 -> 3.600), "
            "within its noise",
        ),
        (
            Rise(Boundary(1000, 2), 3.52, 3.5, 1010, 0.05, 10),
            "step 1100  after the restart at step 1000 the training loss did not rise (3.520 -> 3.500)",
        ),
    ],
)
def test_the_rise_after_a_restart_is_one_line(rise: Rise, text: str) -> None:
    loud, quiet = io.StringIO(), io.StringIO()
    for stream in (loud, quiet):
        console = Console(stream=stream, quiet=stream is quiet)
        console.start(2000)
        console.rise(1100, rise)
    assert loud.getvalue() == text + "\n"
    assert quiet.getvalue() == (text + "\n" if text.startswith("warning") else "")


def test_an_incident_is_a_warning_with_the_place_in_the_data() -> None:
    stream = io.StringIO()
    console = Console(quiet=True, stream=stream)
    console.start(2000)
    where = {"phase": "low_rank", "cycle": 2, "batch": "sequence 3 of batch 12"}
    console.incident({"kind": "skipped", "step": 13, **where, "loss": float("nan"), "grad_norm": None})
    console.incident({"kind": "rewind", "step": 10, **where, "failed_step": 13})
    console.incident({"kind": "rewind", "step": 10, **where, "failed_step": 14, "batch": ""})
    assert stream.getvalue().splitlines() == [
        "warning: step   13  left out, nothing was updated: loss -, gradient norm - in sequence 3 of batch 12",
        "warning: step   10  gone back to here, past what was not finite at step 13 in sequence 3 of batch 12",
        "warning: step   10  gone back to here, past what was not finite at step 14",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00:00"), (59.6, "0:01:00"), (3723, "1:02:03"), (266_706, "3d 2:05:06")]
)
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_format_figure() -> None:
    assert [format_figure(value, 2) for value in (None, float("nan"), 1234.567)] == ["-", "-", "1,234.57"]


def test_of_frequent_restarts_those_that_were_measured_are_shown() -> None:
    stream = io.StringIO()
    console = Console(stream=stream)
    console.start(2000)
    console.restart(RESTART)
    console.restart(RESTART | {"cycle": 3, "loss_before": None, "loss_after": None})
    assert "restart 2: merged 28 layers" in stream.getvalue() and "restart 3" not in stream.getvalue()
