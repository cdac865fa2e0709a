"""Adaptive decisions: criteria equal their definition, decisions fall at the right steps, also after a kill.

The runs are those of test_recovery.py: twelve steps of a network of two blocks.
"""

import json
import math
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.train.small import Net, batch
from tests.train.small import loss as small_loss
from tests.train.stage import Killed as StageKilled
from tests.train.stage import Stage, kill
from tests.train.test_recovery import Killed, Outcome, is_batch, never, play, same
from torch import nn

from relora.errors import Interrupted, NonFinite, UserError
from relora.lowrank import LowRankConfig, low_rank_layers
from relora.lowrank.restart import effective_rank
from relora.measure import Evaluation
from relora.report.history import read_history
from relora.train.adaptive import captured_share, decide, energies, normalised_update
from relora.train.checkpoint import Checkpoints
from relora.train.checkpoint_format import Checkpoint, SavedState
from relora.train.run import Adaptive, CycleEnd, WarmStartEnd
from relora.train.schedule import Schedule
from relora.train.state import Decisions, LossWindow, TrainState

# The criteria


def test_the_normalised_update_is_the_step_that_adam_took() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01, betas=(0.8, 0.95), weight_decay=0.0, fused=True)
    assert not normalised_update(optimizer, layer.weight).any()
    for _ in range(5):
        before = layer.weight.detach().clone()
        layer(torch.randn(3, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        step = (before - layer.weight) / 0.01
        torch.testing.assert_close(normalised_update(optimizer, layer.weight), step, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (7, 7), (1, 4)])
def test_energies_are_squared_singular_values(shape: tuple[int, int]) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(energies(matrix), torch.linalg.svdvals(matrix.double()).square().float())


def test_what_the_largest_directions_capture() -> None:
    low_rank = torch.randn(8, 2) @ torch.randn(2, 6)
    assert captured_share(energies(low_rank), 2) == pytest.approx(1) and captured_share(energies(low_rank), 1) < 1
    assert captured_share(energies(torch.eye(8)), 2) == pytest.approx(0.25)
    assert captured_share(energies(torch.zeros(8, 6)), 2) == 0


def test_a_window_compares_means_once_there_are_two() -> None:
    window = LossWindow()
    for loss in (4.0, 6.0):
        window = window.with_loss(loss)
    assert window.mean == 5 and window.fall is None and not window.is_flat(0.99)
    window = window.closed().with_loss(4.9)
    assert window.fall == pytest.approx(0.02) and window.is_flat(0.021) and not window.is_flat(0.019)
    assert window.closed().with_loss(6.0).is_flat(0.0)  # the loss rises


# The timetable


@given(
    total=st.integers(30, 60),
    bound=st.integers(1, 19),
    every=st.integers(3, 9),
    warmup=st.integers(0, 2),
    ramp=st.sampled_from(["all", "factors"]),
    data=st.data(),
)
def test_a_decision_leaves_what_was_before_it(
    total: int, bound: int, every: int, warmup: int, ramp: str, data: st.DataObject
) -> None:
    planned = Schedule(
        total_steps=total,
        warmup_steps=2,
        warm_start_steps=bound,
        restart_every_steps=every,
        restart_warmup_steps=warmup,
        restart_ramp=ramp,  # type: ignore[arg-type]
    )
    switch = data.draw(st.integers(1, bound))
    restarts = tuple(sorted(data.draw(st.sets(st.integers(switch + 1, total - 1), max_size=4))))
    before = planned.decided(None, ())
    for decided, step in [
        (planned.decided(switch, restarts[:n]), ([switch, *restarts])[n]) for n in range(len(restarts) + 1)
    ]:
        for earlier in range(step):
            assert decided.lr_factor(earlier) == before.lr_factor(earlier)
            assert decided.rest_lr_factor(earlier) == before.rest_lr_factor(earlier)
            assert decided.phase(earlier) == before.phase(earlier) and decided.cycle(earlier) == before.cycle(earlier)
            assert decided.restart_due(earlier) == before.restart_due(earlier)
        assert decided.cycle_start(step) == step
        assert decided.restart_due(step) if step > switch else decided.switch_due(step)
        before = decided
    assert before.restarts == restarts


def test_no_decision_leaves_the_plan() -> None:
    planned = Schedule(total_steps=50, warm_start_steps=10, restart_every_steps=10)
    assert Decisions().applied_to(planned) == planned
    assert planned.decided(5, None).restarts == (15, 25, 35, 45)
    assert planned.decided(None, ()).restarts == ()


@pytest.mark.parametrize(
    "decisions", [Decisions(switch_step=51), Decisions(restart_steps=(30, 20)), Decisions(restart_steps=(5,))]
)
def test_decisions_that_cannot_be_are_refused(decisions: Decisions) -> None:
    with pytest.raises(UserError, match="the saved decisions are of another run"):
        decisions.applied_to(Schedule(total_steps=50, warm_start_steps=10, restart_every_steps=10))


# The steps of decisions


ALWAYS, NEVER = 0.999, -9.0
"""Slopes with which every loss counts as flat, and with which none does."""


def warm_start(slope: float = ALWAYS, energy: float = 0.01) -> WarmStartEnd:
    return WarmStartEnd(window_steps=2, slope=slope, energy=energy)


def timetable(**changes: object) -> Schedule:
    """Warm start to step 7 at most, then a possible restart every second step."""
    settings = {"total_steps": 12, "warm_start_steps": 7, "restart_every_steps": 2, "restart_warmup_steps": 1}
    return Schedule(**(settings | changes))  # type: ignore[arg-type]


def decisions(outcome: Outcome, of: str) -> list[dict[str, object]]:
    return [line for line in outcome.metrics if line["kind"] == "decision" and line["of"] == of]


@pytest.mark.parametrize(
    ("rule", "warmup", "switch"),
    [
        (warm_start(), 0, 4),  # two windows have passed
        (warm_start(), 1, 6),  # the first window does not count: the learning rate still rose
        (warm_start(energy=1.0), 0, 7),  # the criterion of the energy is not met before the bound
        (warm_start(slope=NEVER), 0, 7),  # the loss is not flat before the bound
    ],
)
def test_the_warm_start_ends_when_both_criteria_are_met(
    tmp_path: Path, rule: WarmStartEnd, warmup: int, switch: int
) -> None:
    adaptive = Adaptive(warm_start=rule)
    outcome = play(tmp_path, never, schedule=timetable(warmup_steps=warmup), adaptive=adaptive)
    trained = [line for line in outcome.metrics if line["kind"] == "train"]
    assert [line["step"] for line in trained if line["phase"] == "warm_start"] == list(range(1, switch + 1))
    assert outcome.state.decisions == Decisions(switch_step=switch)
    seen = decisions(outcome, "warm_start")
    assert [line["step"] for line in seen] == [step for step in (2, 4, 6) if warmup < step - 1 and step <= switch]
    assert [line["decided"] for line in seen] == [line["step"] == switch for line in seen]
    assert all(line["phase"] == "warm_start" for line in seen)
    assert [(line["step"], line["cycle"]) for line in outcome.restarts] == [
        (step, k) for k, step in enumerate(range(switch + 2, 12, 2), 1)
    ]


@pytest.mark.parametrize("rule", [warm_start(energy=1.0), None])
def test_decision_records_agree_with_the_logged_losses(tmp_path: Path, rule: WarmStartEnd | None) -> None:
    """A window has the mean loss over all its steps, in the warm start and in a cycle of several windows."""
    adaptive = Adaptive(warm_start=rule, cycle=CycleEnd(slope=NEVER, rank_share=1.0))
    outcome = play(tmp_path, never, schedule=timetable(warm_start_steps=5), adaptive=adaptive)
    losses = {line["step"]: line["loss"] for line in outcome.metrics if line["kind"] == "train"}
    seen = {line["step"]: line for of in ("warm_start", "restart") for line in decisions(outcome, of)}
    assert list(seen) == ([2, 4] if rule else []) + [7, 9, 11] and outcome.restarts == []
    before = None
    for step, line in seen.items():
        mean = (losses[step] + losses[step - 1]) / 2
        if step == 7:
            before = None  # another phase
        assert line["window_loss"] == pytest.approx(mean)
        assert line["loss_fall"] == (None if before is None else pytest.approx((before - mean) / before))
        before = mean


def test_the_energy_is_that_of_the_checkpoint_of_its_step(tmp_path: Path) -> None:
    rule = warm_start(energy=1.0)
    saved = CheckpointsSeen(tmp_path / "checkpoints")
    outcome = play(tmp_path, never, schedule=timetable(), adaptive=Adaptive(warm_start=rule), checkpoints=saved)
    [_, line, _] = decisions(outcome, "warm_start")
    moments = saved.opened[4].optimizer()
    shares = []
    for name in ("blocks.0.weight", "blocks.1.weight"):
        m, v, t = (moments[f"{name}:{key}"].double() for key in ("exp_avg", "exp_avg_sq", "step"))
        update = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        squares = torch.linalg.svdvals(update).square()
        shares.append(squares[:2].sum() / squares.sum())
    assert line["step"] == 4 and line["energy"] == pytest.approx(float(sum(shares) / 2), rel=1e-5)


class CheckpointsSeen(Checkpoints):
    """Keeps all checkpoints of a run."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, keep_last=100, background=False)

    @property
    def opened(self) -> dict[int, Checkpoint]:
        return {step: self.open(step) for step in self.steps()}


@pytest.mark.parametrize(
    ("rule", "restarts"),
    [
        (CycleEnd(slope=NEVER, rank_share=0.01), [5, 7, 9]),  # the rank suffices at every check
        (
            CycleEnd(slope=ALWAYS, rank_share=1.0),
            [7, 11],
        ),  # flat at the first comparison, i.e. at the second check in a cycle
        (CycleEnd(slope=ALWAYS, rank_share=None), [7, 11]),
        (CycleEnd(slope=NEVER, rank_share=1.0), []),
    ],
)
def test_a_cycle_ends_when_either_criterion_is_met(tmp_path: Path, rule: CycleEnd, restarts: list[int]) -> None:
    until = 0.8 if restarts == [5, 7, 9] else 1.0
    schedule = timetable(warm_start_steps=3, restart_until=until)
    outcome = play(tmp_path, never, schedule=schedule, adaptive=Adaptive(cycle=rule))
    assert [line["step"] for line in outcome.restarts] == restarts == list(outcome.state.decisions.restart_steps or ())
    assert [line["cycle"] for line in outcome.restarts] == list(range(1, len(restarts) + 1))
    assert [line["step"] for line in decisions(outcome, "restart") if line["decided"]] == restarts
    for line in outcome.restarts:
        assert line["loss_after"] == pytest.approx(line["loss_before"], abs=1e-5)


def test_the_share_of_the_rank_is_that_of_what_is_merged(tmp_path: Path) -> None:
    rule = CycleEnd(slope=NEVER, rank_share=0.01)
    outcome = play(tmp_path, never, schedule=timetable(warm_start_steps=3), adaptive=Adaptive(cycle=rule))
    for line, restart in zip(decisions(outcome, "restart"), outcome.restarts, strict=True):
        ranks = [effective_rank(torch.tensor(layer["singular_values"])) for layer in restart["layers"]]  # type: ignore
        assert line["rank_share"] == pytest.approx(sum(ranks) / len(ranks) / 2, rel=1e-5)


def test_ranks_by_spectrum_are_trained_and_of_no_more_parameters(tmp_path: Path) -> None:
    model = Net()
    lowrank = LowRankConfig(r=4, lora_alpha=8)
    outcome = play(
        tmp_path, never, model=model, lowrank=lowrank, schedule=timetable(), adaptive=Adaptive(ranks="spectrum")
    )
    [line] = decisions(outcome, "ranks")
    layers = low_rank_layers(model)
    assert line["step"] == 7 and line["ranks"] == {name: layer.r for name, layer in layers.items()}
    assert outcome.state.decisions == Decisions(ranks=line["ranks"])  # type: ignore[arg-type]
    assert sum(layer.r for layer in layers.values()) <= 2 * 4
    assert {layer.initial_scaling for layer in layers.values()} == {2.0}


def test_the_report_has_the_phases_as_they_were_decided(tmp_path: Path) -> None:
    """The planned schedule would have other phases."""
    adaptive = Adaptive(warm_start=warm_start(), cycle=CycleEnd(slope=ALWAYS, rank_share=1.0))
    play(tmp_path, never, schedule=timetable(), adaptive=adaptive)
    segments = read_history(tmp_path).segments
    assert [(part.phase, part.cycle, part.first[0], part.last[0]) for part in segments] == [
        ("warm_start", 0, 0, 4),
        ("low_rank", 0, 4, 8),
        ("low_rank", 1, 8, 12),
    ]


def test_without_adaptive_rules_nothing_is_decided_or_recorded(tmp_path: Path) -> None:
    outcome = play(tmp_path, never)
    assert outcome.state.decisions == Decisions() and outcome.state.window == LossWindow()
    assert not [line for line in outcome.metrics if line["kind"] == "decision"]


# Killed


VARIANTS: dict[str, dict[str, object]] = {
    "switch": {"adaptive": Adaptive(warm_start=warm_start(slope=0.16))},
    "ranks": {
        "adaptive": Adaptive(warm_start=warm_start(), ranks="spectrum"),
        "lowrank": LowRankConfig(r=4, lora_alpha=4),
    },
    "lora": {
        "adaptive": Adaptive(ranks="spectrum"),
        "schedule": timetable(warm_start_steps=3, restart_every_steps=None),
        "lowrank": LowRankConfig(r=3, lora_alpha=3),
    },
    "cycles": {
        "adaptive": Adaptive(cycle=CycleEnd(slope=0.02, rank_share=0.9)),
        "schedule": timetable(warm_start_steps=3),
    },
    "all": {
        "adaptive": Adaptive(warm_start=warm_start(), cycle=CycleEnd(slope=0.05, rank_share=0.9), ranks="spectrum"),
        "lowrank": LowRankConfig(r=4, lora_alpha=4),
    },
}


@pytest.mark.parametrize(("variant", "every"), [*((variant, 4) for variant in VARIANTS), ("all", 1)])
def test_killed_anywhere_and_continued_decides_the_same(tmp_path: Path, variant: str, every: int) -> None:
    changes = {"schedule": timetable(), "checkpoint_every_steps": every} | VARIANTS[variant]
    whole = play(tmp_path / "whole", never, **changes)
    assert whole.state.decisions != Decisions()
    for kill_at in range(1, 12):
        with pytest.raises(Killed):
            play(tmp_path / f"{kill_at}", never, kill_at=kill_at, **changes)
        assert same(play(tmp_path / f"{kill_at}", never, **changes), whole), kill_at


@pytest.mark.parametrize(("bad", "policy"), [(3, "skip"), (4, "skip"), (4, "rewind"), (7, "rewind")])
def test_killed_around_an_incident(tmp_path: Path, bad: int, policy: str) -> None:
    """The incident is at the end of a window, at the first step after the switch, or in a cycle."""
    changes = {"schedule": timetable(), "non_finite": policy, "checkpoint_every_steps": 2} | VARIANTS["all"]
    whole = play(tmp_path / "whole", is_batch(bad), **changes)
    assert whole.state.incidents == 1 and whole.state.decisions.switch_step is not None
    for kill_at in range(2, len(whole.batches), 2):
        with pytest.raises(Killed):
            play(tmp_path / f"{kill_at}", is_batch(bad), kill_at=kill_at, **changes)
        assert same(play(tmp_path / f"{kill_at}", is_batch(bad), **changes), whole), kill_at


def stopping(call: int) -> Callable[[nn.Module, Callable[[], None]], Evaluation]:
    """Evaluation in whose `call`-th call SIGTERM arrives."""
    calls: list[None] = []

    def evaluate(model: nn.Module, each_batch: Callable[[], None]) -> Evaluation:
        calls.append(None)
        if len(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        each_batch()
        with torch.no_grad():
            summed, tokens = small_loss(model, *batch(1000))
        return Evaluation.of(summed.item(), int(tokens), None)

    return evaluate


def test_stopped_between_a_decision_and_its_execution(tmp_path: Path) -> None:
    """The checkpoint of that step holds the decision, or the closed window; neither happens twice."""
    changes = {"schedule": timetable(), "checkpoint_every_steps": 100, "evaluate_every_steps": 2} | VARIANTS["all"]
    whole = play(tmp_path / "whole", never, **changes)
    saved = []
    for call in range(2, 8):
        folder = tmp_path / f"{call}"
        with pytest.raises(Interrupted):
            play(folder, never, evaluate=stopping(call), **changes)
        checkpoint, _ = Checkpoints(folder / "checkpoints").latest()
        assert checkpoint is not None
        saved.append((checkpoint.step, checkpoint.state.decisions.switch_step))
        assert same(play(folder, never, **changes), whole), call
    assert {(2, None), (4, 4)} <= set(saved)


def test_a_checkpoint_of_a_version_without_decisions_is_read(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        play(tmp_path, never, kill_at=6)
    state = tmp_path / "checkpoints" / "step-00000004" / "state.json"
    tree = json.loads(state.read_text())
    assert tree.pop("decisions") and tree.pop("window")
    assert SavedState(**tree).progress == TrainState(4, 96)


@pytest.mark.parametrize(("step", "poisoned"), [(3, "exp_avg"), (8, "lora_B")])
def test_an_update_that_is_not_finite_raises_non_finite(tmp_path: Path, step: int, poisoned: str) -> None:
    """The policy then stops or rewinds the run, as it does where an update is to be merged."""
    stage = Stage(tmp_path, schedule=timetable(), **VARIANTS["all"]).until(step, kill)
    with pytest.raises(StageKilled):
        stage.play()
    progress, layers = stage.progress, low_rank_layers(stage.model)
    assert progress is not None
    weight = layers["blocks.1"].lora_B if layers else stage.model.blocks[1].weight
    (weight.data if layers else progress.optimizer.state[weight][poisoned])[0, 0] = math.nan
    window = LossWindow().with_loss(3.0).closed().with_loss(3.0)
    progress.state = replace(progress.state, step=4 if step == 3 else 10, window=window)
    with pytest.raises(NonFinite, match="an update is not finite"):
        decide(stage.run, progress)
