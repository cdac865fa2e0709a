"""The loop does each thing at its time: what happens at a boundary, in which order, and what never happens."""

import dataclasses
import json
import math
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.train.small import Net, Sequences, batch, loss
from torch import Tensor, nn

from relora.errors import Interrupted, RunStopped
from relora.lowrank import LowRankConfig, exact_tensors, low_rank_layers
from relora.measure import Evaluation, evaluating
from relora.report.console import Console
from relora.report.metrics import read_json_lines
from relora.report.reporter import Reporter
from relora.train.checkpoint import Checkpoints
from relora.train.loop import train
from relora.train.optim import OptimizerConfig, named_state
from relora.train.run import Progress, Run, begin
from relora.train.schedule import Schedule

TEN_STEPS = {"total_steps": 10, "warm_start_steps": 3, "restart_every_steps": 3, "restart_warmup_steps": 1}
"""Full rank before step 3, restarts before steps 6 and 9; the first step of a cycle has learning rate 0."""


def rank_state(model: nn.Module) -> str:
    """`full`: no factors; `fresh`: factors that add nothing; `moved`: factors that do."""
    layers = low_rank_layers(model).values()
    if not layers:
        return "full"
    return "moved" if any(layer.delta().any() for layer in layers) else "fresh"


class Stage:
    """A run in a folder, and what it was seen to do: ("batch", step, state) and ("evaluate", state)."""

    def __init__(self, folder: Path, **changes: object) -> None:
        self.events: list[tuple[object, ...]] = []
        folder.mkdir(exist_ok=True)
        self.folder, self.model = folder, Net()
        self.reporter = Reporter(folder, 10, [], Console(quiet=True))
        settings: dict[str, object] = {
            "model": self.model,
            "schedule": Schedule(**TEN_STEPS),
            "batch_at": self.batch_at,
            "place_of": lambda number, sequences: f"batch {number}, {sequences}",
            "loss": loss,
            "evaluate": self.evaluate,
            "optimizer": OptimizerConfig(lr=0.02, lowrank_lr=0.04),
            "lowrank": LowRankConfig(r=2, lora_alpha=2),
            "restart_reset": "zero",
            "restart_keep_ratio": 0.1,
            "reporter": self.reporter,
            "checkpoints": Checkpoints(folder / "checkpoints"),
            "settings": {},
            "autocast": None,
            "seed": 0,
            "micro_sequences": 2,
            "clip_grad_norm": 1.0,
            "non_finite": "stop",
            "non_finite_limit": 3,
            "log_every_steps": 1,
            "evaluate_every_steps": 100,
            "checkpoint_every_steps": 100,
        }
        self.run = Run(**(settings | changes))
        self.progress: Progress | None = None

    def batch_at(self, step: int) -> Sequences:
        self.events.append(("batch", step, rank_state(self.model)))
        return batch(step)

    def evaluate(self, model: nn.Module, each_batch: Callable[[], None]) -> Evaluation:
        each_batch()
        self.events.append(("evaluate", rank_state(model)))
        with evaluating(model):
            summed, tokens = loss(model, *batch(-1))
        return Evaluation.of(summed.item(), int(tokens), None)

    def play(self) -> "Stage":
        try:
            self.progress = begin(self.run, self.run.checkpoints.latest()[0])
            train(self.run, self.progress)
        finally:
            self.run.checkpoints.__exit__(None, None, None)
            self.reporter.close()
        return self

    def until(self, step: int, act: Callable[[], object]) -> "Stage":
        """Something happens while the batch of `step` is asked for."""

        def batch_at(t: int) -> Sequences:
            if t == step:
                act()
            return self.batch_at(t)

        self.run = dataclasses.replace(self.run, batch_at=batch_at)
        return self

    def lines(self, file: str = "metrics.jsonl", kind: str | None = None) -> list[dict[str, object]]:
        return [line for line in read_json_lines(self.folder / file) if kind in (None, line.get("kind"))]


class Killed(Exception):
    """Nothing of ours catches it."""


def kill() -> None:
    raise Killed


# At a boundary


def test_order_of_events(tmp_path: Path) -> None:
    """Measured before every boundary, and after every restart; the restart comes before its step's batch."""
    assert Stage(tmp_path).play().events == [
        ("evaluate", "full"),
        ("batch", 0, "full"),
        ("batch", 1, "full"),
        ("batch", 2, "full"),
        ("evaluate", "full"),
        ("batch", 3, "fresh"),
        ("batch", 4, "fresh"),
        ("batch", 5, "moved"),
        ("evaluate", "moved"),
        ("evaluate", "fresh"),
        ("batch", 6, "fresh"),
        ("batch", 7, "fresh"),
        ("batch", 8, "moved"),
        ("evaluate", "moved"),
        ("evaluate", "fresh"),
        ("batch", 9, "fresh"),
        ("evaluate", "fresh"),
    ]


def test_every_boundary_has_its_evaluation_and_every_restart_one_record(tmp_path: Path) -> None:
    stage = Stage(tmp_path).play()
    evaluations = {line["step"]: line for line in stage.lines(kind="evaluation")}
    assert list(evaluations) == [0, 3, 6, 9, 10]
    assert [evaluations[step]["phase"] for step in evaluations] == ["warm_start"] * 2 + ["low_rank"] * 3
    restarts = stage.lines("restarts.jsonl")
    assert [(line["step"], line["cycle"]) for line in restarts] == [(6, 1), (9, 2)]
    for line in restarts:
        assert line["loss_before"] == evaluations[line["step"]]["validation_loss"]
        assert line["loss_after"] == pytest.approx(line["loss_before"], abs=1e-6)
        assert line["tokens"] == line["step"] * 24 and len(line["layers"]) == 2


def test_evaluations_in_between(tmp_path: Path) -> None:
    """One that falls on a boundary is not done twice."""
    stage = Stage(tmp_path, evaluate_every_steps=2).play()
    assert [line["step"] for line in stage.lines(kind="evaluation")] == [0, 2, 3, 4, 6, 8, 9, 10]


@pytest.mark.parametrize("boundary", [3, 6, 9])
def test_continued_at_a_boundary_crosses_it_once(tmp_path: Path, boundary: int) -> None:
    """A checkpoint at a boundary is of the time before it, and before its evaluation, which is done again."""
    with pytest.raises(Killed):
        Stage(tmp_path, checkpoint_every_steps=boundary).until(boundary, kill).play()
    stage = Stage(tmp_path).play()
    crossing = [("evaluate", "moved"), ("evaluate", "fresh")] if boundary > 3 else [("evaluate", "full")]
    assert stage.events[: len(crossing) + 1] == [*crossing, ("batch", boundary, "fresh")]
    assert [line["step"] for line in stage.lines("restarts.jsonl")] == [6, 9]
    assert [line["step"] for line in stage.lines(kind="train")] == list(range(1, 11))
    assert [line["step"] for line in stage.lines(kind="evaluation")] == [0, 3, 6, 9, 10]


def test_the_switch_carries_the_moments_of_what_goes_on_training(tmp_path: Path) -> None:
    """Embedding, head and biases go on as if nothing had happened; the frozen weights' moments are let go."""
    full = Stage(tmp_path / "full", schedule=Schedule(total_steps=10, warm_start_steps=10)).until(3, kill)
    switched = Stage(tmp_path / "switched").until(3, kill)
    for stage in (full, switched):
        with pytest.raises(Killed):
            stage.play()
    assert full.progress is not None and switched.progress is not None
    moments = named_state(full.model, full.progress.optimizer)
    carried = named_state(switched.model, switched.progress.optimizer)
    kept = {"embed.weight", "head.weight", "head.bias", "blocks.0.bias", "blocks.1.bias"}
    assert {name.partition(":")[0] for name in carried} == kept
    for name, tensor in carried.items():
        assert torch.equal(tensor, moments[name]) and tensor.any(), name
    trained = {id(p) for group in switched.progress.optimizer.param_groups for p in group["params"]}
    for layer in low_rank_layers(switched.model).values():
        assert id(layer.weight) not in trained and not layer.weight.requires_grad
        assert {id(factor) for factor in layer.factors.values()} <= trained


def test_a_restart_clears_the_factors_moments_and_no_others(tmp_path: Path) -> None:
    stage = Stage(tmp_path).until(6, kill)
    with pytest.raises(Killed):
        stage.play()
    assert stage.progress is not None
    state = named_state(stage.model, stage.progress.optimizer)
    assert not [name for name in state if "lora_" in name] and state["head.weight:step"] == 6
    [record] = stage.lines("restarts.jsonl")
    assert record["moments_cleared"] == 2 * 2 * (2 * 8 + 8 * 2)  # m and v, two layers, A and B


def test_the_learning_rate_dips_with_the_boundaries(tmp_path: Path) -> None:
    stage = Stage(tmp_path).play()
    rates = [line["lr"] for line in stage.lines(kind="train")]
    assert [step for step, rate in enumerate(rates) if rate == 0] == [3, 6, 9]
    assert rates == [0.02 * stage.run.schedule.lr_factor(step) for step in range(10)]
    low_rank = [line.get("lowrank_lr") for line in stage.lines(kind="train")]
    assert low_rank == [None] * 3 + [2 * rate for rate in rates[3:]]


# What a method never does


@pytest.mark.parametrize("warm_start", [0, 3])
def test_lora_never_restarts(tmp_path: Path, warm_start: int) -> None:
    stage = Stage(tmp_path, schedule=Schedule(total_steps=10, warm_start_steps=warm_start))
    seen: list[dict[str, Tensor]] = []
    stage.until(warm_start, lambda: seen.append({k: v.clone() for k, v in exact_tensors(stage.model).items()})).play()
    assert stage.lines("restarts.jsonl") == [] and {line["cycle"] for line in stage.lines()} == {0}
    assert [line["step"] for line in stage.lines(kind="evaluation")] == ([0, 3, 10] if warm_start else [0, 10])
    after = exact_tensors(stage.model)
    for name in low_rank_layers(stage.model):
        assert torch.equal(after[f"{name}.weight"], seen[0][f"{name}.weight"])
        assert after[f"{name}.lora_B"].any() and not seen[0][f"{name}.lora_B"].any()
    assert rank_state(stage.model) == "moved"


def test_full_rank_training_never_injects(tmp_path: Path) -> None:
    stage = Stage(tmp_path, schedule=Schedule(total_steps=10, warm_start_steps=10)).play()
    assert {event[-1] for event in stage.events} == {"full"} and stage.lines("restarts.jsonl") == []
    assert {line["phase"] for line in stage.lines()} == {"full"}
    assert all("lowrank_lr" not in line for line in stage.lines())
    assert all(parameter.requires_grad for parameter in stage.model.parameters())


def test_relora_without_warm_start(tmp_path: Path) -> None:
    stage = Stage(tmp_path, schedule=Schedule(total_steps=10, restart_every_steps=4)).play()
    assert stage.events[:2] == [("evaluate", "full"), ("batch", 0, "fresh")]
    assert [line["step"] for line in stage.lines("restarts.jsonl")] == [4, 8]
    assert {line["phase"] for line in stage.lines(kind="train")} == {"low_rank"}


# Precision


def test_mixed_precision_multiplies_in_bf16_and_keeps_everything_in_fp32(tmp_path: Path) -> None:
    dtypes: list[torch.dtype] = []

    def recording_loss(model: nn.Module, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        dtypes.append(model(input_ids).dtype)
        return loss(model, input_ids, labels)

    mixed = Stage(tmp_path / "mixed", autocast=torch.bfloat16, loss=recording_loss).play()
    plain = Stage(tmp_path / "plain").play()
    assert set(dtypes) == {torch.bfloat16}
    assert mixed.progress is not None
    tensors = exact_tensors(mixed.model) | named_state(mixed.model, mixed.progress.optimizer)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    losses = [[line["loss"] for line in stage.lines(kind="train")] for stage in (mixed, plain)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)
    assert [line["loss_after"] for line in mixed.lines("restarts.jsonl")] == pytest.approx(
        [line["loss_before"] for line in mixed.lines("restarts.jsonl")], abs=1e-6
    )


def test_a_bf16_base_restarts_on_its_exact_master(tmp_path: Path) -> None:
    """Stored in bf16, merged in fp32: what is saved after restarts is finer than bf16 can say."""
    stage = Stage(tmp_path, lowrank=LowRankConfig(r=2, lora_alpha=2, base="bf16")).play()
    for name, layer in low_rank_layers(stage.model).items():
        exact = exact_tensors(stage.model)[f"{name}.weight"]
        assert layer.weight.dtype == torch.bfloat16 and exact.dtype == torch.float32
        assert torch.equal(exact.bfloat16(), layer.weight) and not torch.equal(exact.bfloat16().float(), exact)


# When it is stopped, or stops itself


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
    """A signal in the middle of every batch and of every measurement."""
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


def test_the_checkpoint_says_where_it_stands(tmp_path: Path) -> None:
    stage = Stage(tmp_path, settings={"threads": 1}).play()
    checkpoint = stage.run.checkpoints.open(10)
    assert (checkpoint.state.step, checkpoint.state.tokens) == (10, 240)
    assert checkpoint.manifest.settings == {"threads": 1}
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    until_then = sum(len(line) for line in lines[:-1])  # the evaluation of its step comes after it
    restarts = (tmp_path / "restarts.jsonl").stat().st_size
    assert checkpoint.state.positions == {"metrics.jsonl": until_then, "restarts.jsonl": restarts}
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["step"] == 0
