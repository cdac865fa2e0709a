"""The schedule equals the published formula where that is defined, and its answers agree everywhere else."""

import math
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from relora.train.schedule import Schedule


def published_factor(t: int, *, total: int, first_warmup: int, every: int, warmup: int, floor: float) -> float:
    """Learning rate of the ReLoRA authors' code (with `adjust_step` 0), for arguments that it accepts."""

    def cosine(step: int) -> float:
        progress = (step - first_warmup) / max(1, total - first_warmup)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    if t < first_warmup:
        return t / max(1, first_warmup)
    number, within = divmod(t, every)
    if within < warmup and t >= every:
        return within / max(1, warmup) * cosine(number * every + warmup)
    return cosine(t)


@given(
    every=st.integers(1, 60),
    cycles=st.integers(1, 6),
    first=st.integers(0, 60),
    warmup=st.integers(0, 60),
    floor=st.floats(0.01, 1),
)
def test_equals_the_published_formula_at_every_step(
    every: int, cycles: int, first: int, warmup: int, floor: float
) -> None:
    total = every * cycles
    assume(first <= every and first < total and warmup < every)
    schedule = Schedule(
        total_steps=total,
        warmup_steps=first,
        restart_every_steps=every,
        restart_warmup_steps=warmup,
        min_lr_ratio=floor,
    )
    for t in range(total):
        expected = published_factor(t, total=total, first_warmup=first, every=every, warmup=warmup, floor=floor)
        assert schedule.lr_factor(t) == pytest.approx(expected, abs=1e-12)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    total = draw(st.integers(1, 200))
    every = draw(st.none() | st.integers(1, 100))
    return Schedule(
        total_steps=total,
        warmup_steps=draw(st.integers(0, total - 1)),
        warm_start_steps=draw(st.integers(0, total)),
        restart_every_steps=every,
        restart_growth=draw(st.sampled_from([1.0, 1.3, 2.0])),
        restart_turns=draw(st.integers(1, min(every or 4, 4))),
        restart_until=draw(st.sampled_from([0.3, 0.8, 1.0])),
        restart_warmup_steps=draw(st.integers(0, (every or 20) - 1)),
        restart_ramp=draw(st.sampled_from(["all", "factors"])),
        switch_warmup_steps=draw(st.none() | st.integers(0, 60)),
        min_lr_ratio=draw(st.floats(0.01, 1)),
    )


@given(schedules())
def test_any_total_works_and_all_answers_agree(schedule: Schedule) -> None:
    restarts = [t for t in range(schedule.total_steps) if schedule.restart_due(t)]
    assert restarts == list(schedule.restarts)
    done = 0
    for t in range(schedule.total_steps):
        done += schedule.restart_due(t)
        assert schedule.cycle(t) == done
        assert 0 <= schedule.lr_factor(t) <= 1
        assert schedule.cycle_start(t) <= t
        assert (schedule.phase(t) == "low_rank") == (t >= schedule.warm_start_steps < schedule.total_steps)
        switch, at_switch = schedule.switch_due(t) and t > 0, schedule.switch_warmup_steps
        warmup = at_switch if switch and at_switch is not None else schedule.restart_warmup_steps
        if (schedule.restart_due(t) or switch) and warmup:
            assert schedule.lr_factor(t) == 0  # the warm-up begins at the event
            assert schedule.cycle_start(t) == t
    for number, t in enumerate(restarts):
        assert schedule.total_steps - t >= max(schedule.restart_warmup_steps, 1)
        assert t <= schedule.restart_until * schedule.total_steps
        cycle, turn = divmod(number + 1, schedule.restart_turns)
        if (
            turn == 0 and schedule.restart_every_steps
        ):  # end of a cycle: the sum of a geometric series, each term rounded
            lengths = (schedule.restart_every_steps * schedule.restart_growth**k for k in range(cycle))
            assert abs(t - schedule.warm_start_steps - sum(lengths)) <= cycle / 2


@given(schedules(), st.integers(0, 3))
def test_a_part_warms_up_after_its_own_restarts_and_the_rest_only_if_asked(schedule: Schedule, turn: int) -> None:
    turn, schedule = turn % schedule.restart_turns, replace(schedule, switch_warmup_steps=None)
    smooth = replace(schedule, restart_every_steps=None, warm_start_steps=schedule.total_steps, restart_turns=1)
    own, since = schedule.restarts[turn :: schedule.restart_turns], None
    for t in range(schedule.total_steps):
        since = t if t in own or (schedule.switch_due(t) and t > 0) else since
        warming_up = since is not None and t - since < schedule.restart_warmup_steps
        if not warming_up:
            assert schedule.lr_factor(t, turn) == smooth.lr_factor(t)
        elif t == since:
            assert schedule.lr_factor(t, turn) == 0
        of_the_rest = schedule if schedule.restart_ramp == "all" else smooth
        assert schedule.rest_lr_factor(t) == of_the_rest.lr_factor(t)


@given(schedules(), st.integers(0, 3))
def test_after_the_switch_only_the_factors_warm_up(schedule: Schedule, turn: int) -> None:
    """Linear from 0 to the cosine, or lower where a restart within the warm-up begins one of its own."""
    turn, switch = turn % schedule.restart_turns, schedule.warm_start_steps
    steps = schedule.switch_warmup_steps
    without = replace(schedule, switch_warmup_steps=0)
    low_rank = range(switch, schedule.total_steps) if steps is not None and switch else range(0)
    for t in range(schedule.total_steps):
        if t not in low_rank or t >= switch + (steps or 0):
            assert steps is None or schedule.lr_factor(t, turn) == without.lr_factor(t, turn)
        else:
            smooth = replace(without, restart_every_steps=None, restart_turns=1)
            linear = (t - switch) / (steps or 1) * smooth.lr_factor(switch + (steps or 0))
            assert schedule.lr_factor(t, turn) == min(linear, without.lr_factor(t, turn))
        if steps is not None:
            assert schedule.rest_lr_factor(t) == without.rest_lr_factor(t)


def test_growing_cycles_in_turns() -> None:
    grown = Schedule(total_steps=1000, warm_start_steps=100, restart_every_steps=100, restart_growth=1.5)
    assert grown.restarts == (200, 350, 575, 913)  # 100, 150, 225, 337.5
    in_turns = Schedule(total_steps=1000, restart_every_steps=100, restart_turns=4, restart_until=0.2)
    assert in_turns.restarts == (25, 50, 75, 100, 125, 150, 175, 200)


def test_phases() -> None:
    schedule = Schedule(total_steps=10, warm_start_steps=4, restart_every_steps=3)
    assert [schedule.phase(t) for t in (0, 3, 4, 9)] == ["warm_start", "warm_start", "low_rank", "low_rank"]
    assert [t for t in range(10) if schedule.switch_due(t)] == [4]
    assert Schedule(total_steps=10, warm_start_steps=10).phase(3) == "full"
    assert not any(Schedule(total_steps=10, warm_start_steps=10).switch_due(t) for t in range(11))


def test_the_warm_up_after_a_boundary_ends_on_the_cosine() -> None:
    schedule = Schedule(
        total_steps=100, warmup_steps=10, warm_start_steps=20, restart_every_steps=30, restart_warmup_steps=5
    )
    smooth = Schedule(total_steps=100, warmup_steps=10, warm_start_steps=100)
    for boundary in (20, 50, 80):
        assert schedule.lr_factor(boundary + 5) == smooth.lr_factor(boundary + 5)
        factors = [schedule.lr_factor(boundary + j) for j in range(6)]
        assert factors == pytest.approx([j / 5 * factors[5] for j in range(6)])


def test_a_last_short_cycle_and_a_restart_too_late() -> None:
    assert list(Schedule(total_steps=100, restart_every_steps=30).restarts) == [30, 60, 90]
    assert list(Schedule(total_steps=100, restart_every_steps=30, restart_warmup_steps=11).restarts) == [30, 60]
    assert list(Schedule(total_steps=90, restart_every_steps=30).restarts) == [30, 60]


@pytest.mark.parametrize(
    "wrong",
    [
        {"warmup_steps": 10},
        {"warmup_steps": -1},
        {"warm_start_steps": 11},
        {"restart_every_steps": 5, "restart_warmup_steps": 5},
        {"restart_every_steps": 0},
        {"restart_warmup_steps": -1},
        {"switch_warmup_steps": -1},
        {"restart_growth": 0.5},
        {"restart_every_steps": 5, "restart_turns": 6},
        {"restart_until": 0},
        {"min_lr_ratio": 0},
    ],
)
def test_what_does_not_fit_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Schedule(total_steps=10, **wrong)
