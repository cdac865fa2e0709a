"""The loop does everything at the right step: what happens at a boundary, in which order, and what never happens."""

from pathlib import Path

import pytest
import torch
from tests.train.small import loss
from tests.train.stage import Killed, Stage, kill, rank_state
from torch import Tensor, nn

from relora.lowrank import LowRankConfig, exact_tensors, low_rank_layers
from relora.train.optim import named_state
from relora.train.schedule import Schedule

# At a boundary


def test_order_of_events(tmp_path: Path) -> None:
    """The held-out loss is measured before every boundary and after every restart, all before the step's batch."""
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
    """An evaluation that coincides with a boundary is not done twice."""
    stage = Stage(tmp_path, evaluate_every_steps=2).play()
    assert [line["step"] for line in stage.lines(kind="evaluation")] == [0, 2, 3, 4, 6, 8, 9, 10]


def test_of_frequent_restarts_every_nth_is_measured(tmp_path: Path) -> None:
    stage = Stage(tmp_path, measured_restarts=2).play()
    assert [line["step"] for line in stage.lines(kind="evaluation")] == [0, 3, 6, 10]
    measured, other = stage.lines("restarts.jsonl")
    assert measured["loss_after"] == pytest.approx(measured["loss_before"], abs=1e-6)
    assert (other["step"], other["loss_before"], other["loss_after"]) == (9, None, None)
    assert all(layer["effective_rank"] > 0 for layer in other["layers"])
    assert ["singular_values" in line["layers"][0] for line in (measured, other)] == [True, False]


@pytest.mark.parametrize("boundary", [3, 6, 9])
def test_continued_at_a_boundary_crosses_it_once(tmp_path: Path, boundary: int) -> None:
    """A checkpoint at a boundary is written before its evaluation and the boundary, and both are done again."""
    with pytest.raises(Killed):
        Stage(tmp_path, checkpoint_every_steps=boundary).until(boundary, kill).play()
    stage = Stage(tmp_path).play()
    crossing = [("evaluate", "moved"), ("evaluate", "fresh")] if boundary > 3 else [("evaluate", "full")]
    assert stage.events[: len(crossing) + 1] == [*crossing, ("batch", boundary, "fresh")]
    assert [line["step"] for line in stage.lines("restarts.jsonl")] == [6, 9]
    assert [line["step"] for line in stage.lines(kind="train")] == list(range(1, 11))
    assert [line["step"] for line in stage.lines(kind="evaluation")] == [0, 3, 6, 9, 10]


def test_the_switch_carries_the_moments_of_what_goes_on_training(tmp_path: Path) -> None:
    """Embedding, head and biases keep their moments; those of the frozen weights are dropped."""
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


def test_the_learning_rate_warms_up_after_every_boundary(tmp_path: Path) -> None:
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
    """Stored in bf16, merged in fp32: the saved weights after restarts have more digits than bf16."""
    stage = Stage(tmp_path, lowrank=LowRankConfig(r=2, lora_alpha=2, base="bf16")).play()
    for name, layer in low_rank_layers(stage.model).items():
        exact = exact_tensors(stage.model)[f"{name}.weight"]
        assert layer.weight.dtype == torch.bfloat16 and exact.dtype == torch.float32
        assert torch.equal(exact.bfloat16(), layer.weight) and not torch.equal(exact.bfloat16().float(), exact)


@pytest.mark.parametrize("reached, said", [(range(0), {"extra"}), (range(2, 3), frozenset())])
def test_what_has_no_gradient_in_the_steps_that_are_looked_at_is_said(
    tmp_path: Path, reached: range, said: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The run goes on: a later batch may reach what the first ones did not."""
    steps: list[int] = []

    def partial_loss(model: torch.nn.Module, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        summed, number = loss(model, input_ids, labels)
        steps.append(len(steps))
        return summed + model.extra.sum() * (1.0 if steps[-1] in reached else 0.0), number

    schedule = Schedule(total_steps=10, warm_start_steps=10)
    stage = Stage(tmp_path, loss=partial_loss, schedule=schedule, micro_sequences=99)
    stage.model.extra = torch.nn.Parameter(torch.ones(2))
    progress = stage.play().progress
    assert progress is not None and progress.state.step == 10 and progress.said_without_gradient == said
    line = "step 2: extra has had no gradient so far; what gets none stays as it is, the rest trains"
    assert capsys.readouterr().out.count(line) == len(said)
