"""Runs that are stopped by a signal or by an error: what is saved, and that the next run continues from it."""

import dataclasses
import json
import math
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.train.stage import Stage
from torch import nn

from relora.errors import Interrupted, RunStopped
from relora.lowrank import exact_tensors
from relora.measure import Evaluation
from relora.train.checkpoint import Checkpoints


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [0, 2, 5, 8])
def test_a_stop_signal_saves_after_the_step_and_the_next_run_continues(
    tmp_path: Path, number: signal.Signals, step: int
) -> None:
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    whole = Stage(tmp_path / "whole").play()
    with pytest.raises(Interrupted, match=f"{number.name}: stopped after step {step + 1}") as caught:
        Stage(tmp_path / "stopped").until(step, lambda: signal.raise_signal(number)).play()
    assert caught.value.exit_status == 128 + number
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert Checkpoints(tmp_path / "stopped" / "checkpoints").steps() == [step + 1]
    stage = Stage(tmp_path / "stopped").play()
    batches = [event[1] for event in stage.events if event[0] == "batch"]
    assert batches == list(range(step + 1, 10))
    weights = [exact_tensors(each.model) for each in (whole, stage)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_signal_in_the_last_step_leaves_the_end_to_the_next_run(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="stopped after step 10"):
        Stage(tmp_path).until(9, lambda: signal.raise_signal(signal.SIGTERM)).play()
    stage = Stage(tmp_path).play()
    assert stage.events == [("evaluate", "moved")] or stage.events == [("evaluate", "fresh")]
    assert stage.run.checkpoints.steps() == [10] and stage.lines()[-1]["kind"] == "evaluation"


def test_a_signal_cuts_an_evaluation_short_and_it_is_done_by_the_next_run(tmp_path: Path) -> None:
    whole, stage = Stage(tmp_path / "whole").play(), Stage(tmp_path / "cut")

    def evaluate(model: nn.Module, each_batch: Callable[[], None]) -> Evaluation:
        if len(stage.events) == 8:  # before the restart of step 6
            signal.raise_signal(signal.SIGTERM)
        return stage.evaluate(model, each_batch)

    stage.run = dataclasses.replace(stage.run, evaluate=evaluate)
    with pytest.raises(Interrupted, match="stopped after step 6"):
        stage.play()
    assert stage.run.checkpoints.steps() == [6] and len(stage.events) == 8
    continued = Stage(tmp_path / "cut").play()
    assert [line["step"] for line in continued.lines(kind="evaluation")] == [0, 3, 6, 9, 10]
    weights = [exact_tensors(each.model) for each in (whole, continued)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_signal_while_the_last_checkpoint_is_written_waits_for_it(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    wait = stage.run.checkpoints.wait

    def signalled() -> None:
        if stage.events[-1][0] == "evaluate" and len(stage.events) > 15:
            signal.raise_signal(signal.SIGTERM)
            stage.run.checkpoints.wait = wait
        wait()

    stage.run.checkpoints.wait = signalled
    with pytest.raises(Interrupted, match="stopped after step 10"):
        stage.play()
    assert Checkpoints(tmp_path / "checkpoints").latest()[0] is not None


def test_a_signal_in_the_last_batch_of_a_measurement_stops_before_the_next_step(tmp_path: Path) -> None:
    stage = Stage(tmp_path)

    def evaluate(model: nn.Module, each_batch: Callable[[], None]) -> Evaluation:
        result = stage.evaluate(model, each_batch)
        if len(stage.events) == 9:  # before the restart of step 6
            signal.raise_signal(signal.SIGTERM)
        return result

    stage.run = dataclasses.replace(stage.run, evaluate=evaluate)
    with pytest.raises(Interrupted, match="stopped after step 6"):
        stage.play()
    assert stage.lines("restarts.jsonl") == []
    continued = Stage(tmp_path).play()
    assert [line["step"] for line in continued.lines(kind="evaluation")] == [0, 3, 6, 9, 10]


@pytest.mark.parametrize("event", range(1, 17))
def test_stopped_at_any_event_no_line_stands_twice(tmp_path: Path, event: int) -> None:
    """The signal arrives during every batch and every held-out measurement in turn."""
    whole = Stage(tmp_path / "whole", evaluate_every_steps=2).play()
    stage = Stage(tmp_path / "cut", evaluate_every_steps=2)

    class Events(list[tuple[object, ...]]):
        def append(self, item: tuple[object, ...]) -> None:
            super().append(item)
            if len(self) == event:
                signal.raise_signal(signal.SIGTERM)

    stage.events = Events()
    with pytest.raises(Interrupted):
        stage.play()
    continued = Stage(tmp_path / "cut", evaluate_every_steps=2).play()
    lines = [[(line["kind"], line["step"]) for line in each.lines()] for each in (whole, continued)]
    assert lines[0] == lines[1]


def test_a_checkpoint_on_demand(tmp_path: Path) -> None:
    stage = Stage(tmp_path).until(4, lambda: signal.raise_signal(signal.SIGUSR1)).play()
    assert stage.run.checkpoints.steps() == [5, 10] and stage.lines()[-1]["step"] == 10


def test_a_loss_that_is_not_finite_stops_the_run_with_its_checkpoints_kept(tmp_path: Path) -> None:
    stage = Stage(tmp_path, checkpoint_every_steps=4)

    def spoil() -> None:
        with torch.no_grad():
            stage.model.head.bias[0] = math.nan

    with pytest.raises(RunStopped, match="step 5: loss nan"):
        stage.until(5, spoil).play()
    assert stage.run.checkpoints.steps() == [4]
    assert Stage(tmp_path).play().lines()[-1]["step"] == 10


def test_the_checkpoint_holds_step_tokens_settings_and_lengths_of_the_files(tmp_path: Path) -> None:
    stage = Stage(tmp_path, settings={"threads": 1}).play()
    checkpoint = stage.run.checkpoints.open(10)
    assert (checkpoint.state.step, checkpoint.state.tokens) == (10, 240)
    assert checkpoint.manifest.settings == {"threads": 1}
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    until_then = sum(len(line) for line in lines[:-1])  # the evaluation of the same step comes after the checkpoint
    restarts = (tmp_path / "restarts.jsonl").stat().st_size
    assert checkpoint.state.positions == {"metrics.jsonl": until_then, "restarts.jsonl": restarts}
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["step"] == 0
