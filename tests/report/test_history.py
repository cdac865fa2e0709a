import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from relora.errors import UserError
from relora.report.history import HeldOut, read_history
from relora.report.html import render

MakeRun = Callable[..., Path]


def test_segments_follow_warm_start_and_restarts(tmp_path: Path, make_run: MakeRun) -> None:
    history = read_history(make_run(tmp_path))
    assert [(segment.phase, segment.cycle) for segment in history.segments] == [
        ("warm_start", 0),
        *(("low_rank", cycle) for cycle in range(6)),
    ]
    assert [segment.last[0] for segment in history.segments] == [500, 750, 1000, 1250, 1500, 1750, 2000]
    assert history.segments[0].first == (0, 0)
    for earlier, later in zip(history.segments, history.segments[1:], strict=False):
        assert later.first == earlier.last
        assert later.before == earlier.after
    assert history.segments[0].before == history.held_out[0]
    assert history.segments[-1].after == history.held_out[-1]
    assert history.segments[2].lowest == min(history.segments[2].measured, key=lambda point: point.loss)


def test_a_restart_between_two_logged_steps_ends_its_cycle_where_it_happened(tmp_path: Path, make_run: MakeRun) -> None:
    folder = make_run(tmp_path)
    restarts = [json.loads(line) for line in (folder / "restarts.jsonl").read_text().splitlines()]
    restarts[0] |= {"step": 753, "tokens": 753 * 8192}
    (folder / "restarts.jsonl").write_text("".join(json.dumps(restart) + "\n" for restart in restarts))
    history = read_history(folder)
    assert (history.segments[1].last, history.segments[2].first) == ((753, 753 * 8192),) * 2
    assert history.segments[1].after is not None
    assert history.segments[1].after.step == 753


def test_frequent_restarts_are_told_by_those_that_were_measured(tmp_path: Path, make_run: MakeRun) -> None:
    folder = make_run(tmp_path)
    restarts = [json.loads(line) for line in (folder / "restarts.jsonl").read_text().splitlines()]
    for restart in restarts[1:3]:
        restart |= {"loss_before": None, "loss_after": None}
    (folder / "restarts.jsonl").write_text("".join(json.dumps(restart) + "\n" for restart in restarts))
    history = read_history(folder)
    assert len(history.restarts) == len(restarts)
    assert [restart["cycle"] for restart in history.measured_restarts] == [1, 4, 5]
    cycles = [(one.cycle, one.last_cycle) for one in history.segments if one.phase == "low_rank"]
    assert cycles == [(0, 0), (1, 3), (4, 4), (5, 5)]
    page = render(history)
    assert "cycles 1 to 3" in page and "3 of 5 restarts were measured" in page


def test_time_counts_steps_evaluations_and_restarts(tmp_path: Path) -> None:
    where = {"phase": "low_rank", "cycle": 1, "tokens": 1}
    metrics = [
        {"kind": "train", "step": 10, "step_seconds": 2.0, **where},
        {"kind": "evaluation", "step": 10, "seconds": 5.0, "validation_loss": 3.0, **where},
        {"kind": "train", "step": 14, "step_seconds": 1.0, **where},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in metrics))
    (tmp_path / "restarts.jsonl").write_text(json.dumps({"step": 10, "seconds": 0.5, **where}) + "\n")
    assert read_history(tmp_path).seconds == pytest.approx(20 + 4 + 5 + 0.5)
    assert read_history(tmp_path).step_seconds == pytest.approx(20 + 4)


def test_files_other_than_metrics_may_be_missing(tmp_path: Path, make_run: MakeRun) -> None:
    folder = make_run(tmp_path, steps=300)
    for name in ("restarts.jsonl", "config.yaml", "environment.json", "samples.json"):
        (folder / name).unlink()
    history = read_history(folder)
    assert (history.restarts, history.samples, history.config, history.environment) == ([], [], {}, {})
    assert history.setting("schedule", "total_steps") is None
    assert history.last == (300, 300 * 8192)


def test_figures_that_are_null_are_left_out(tmp_path: Path) -> None:
    record = {"kind": "evaluation", "step": 1, "tokens": 1, "phase": "full", "cycle": 0, "validation_loss": None}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    history = read_history(tmp_path)
    assert (history.held_out, history.segments, history.seconds) == ([], [], 0.0)


def test_incidents_are_kept_apart_and_may_be_all_there_is(tmp_path: Path, make_run: MakeRun) -> None:
    folder = make_run(tmp_path, steps=100)
    whole = read_history(folder)
    place = {"step": 104, "tokens": 104 * 8192, "phase": "warm_start", "cycle": 0}
    skipped = {"kind": "skipped", **place, "loss": None, "grad_norm": None, "batch": "batch 103"}
    with (folder / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps(skipped) + "\n")
    history = read_history(folder)
    assert history.incidents == [skipped]
    assert (history.train, history.segments, history.seconds) == (whole.train, whole.segments, whole.seconds)
    assert history.last == (104, 104 * 8192)
    (folder / "metrics.jsonl").write_text(json.dumps(skipped) + "\n")
    assert read_history(folder).last == (104, 104 * 8192)


def test_perplexity_of_a_hopeless_loss_does_not_overflow() -> None:
    assert HeldOut(1, 1, 1e9).perplexity > 1e300


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", None, "no such file; give the folder of a run"),
        ("metrics.jsonl", "", "holds no records yet"),
        ("metrics.jsonl", "broken\n{}\n", "metrics.jsonl:1: not a JSON object"),
        ("samples.json", "[{", "samples.json: not valid JSON"),
        ("samples.json", 100_000 * "[", "samples.json: nested too deeply"),
    ],
)
def test_a_run_that_cannot_be_read_is_one_line(
    tmp_path: Path, make_run: MakeRun, name: str, content: str | None, message: str
) -> None:
    folder = make_run(tmp_path, steps=100)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_history(folder)
    assert "\n" not in str(caught.value)


def test_a_configuration_that_is_no_yaml_is_kept_as_text(tmp_path: Path, make_run: MakeRun) -> None:
    folder = make_run(tmp_path, steps=100)
    (folder / "config.yaml").write_text("a: [1")
    history = read_history(folder)
    assert (history.config_text, history.config) == ("a: [1", {})


@pytest.mark.parametrize("name", ["metrics.jsonl", "restarts.jsonl", "config.yaml", "environment.json", "samples.json"])
def test_links_out_of_the_run_folder_and_pipes_are_refused(tmp_path: Path, make_run: MakeRun, name: str) -> None:
    folder = make_run(tmp_path / "run", steps=100)
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(UserError, match="a link that leads out of its folder"):
        read_history(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match="not a regular file"):
        read_history(folder)
