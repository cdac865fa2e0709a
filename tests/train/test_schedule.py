"""The timetable: equal to the published formula where that is defined, and sound everywhere else."""

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from relora.train.schedule import Schedule


def published_factor(t: int, *, total: int, first_warmup: int, every: int, warmup: int, floor: float) -> float:
    """The jagged cosine as the ReLoRA authors released it (their `adjust_step` at 0); arguments they accept only."""

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
        restart_warmup_steps=draw(st.integers(0, (every or 20) - 1)),
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
        boundary = schedule.restart_due(t) or (schedule.switch_due(t) and t > 0)
        if boundary and schedule.restart_warmup_steps:
            assert schedule.lr_factor(t) == 0  # the dip and the event cannot disagree
            assert schedule.cycle_start(t) == t
    for t in restarts:
        assert (t - schedule.warm_start_steps) % (schedule.restart_every_steps or 1) == 0
        assert schedule.total_steps - t >= max(schedule.restart_warmup_steps, 1)


def test_phases() -> None:
    schedule = Schedule(total_steps=10, warm_start_steps=4, restart_every_steps=3)
    assert [schedule.phase(t) for t in (0, 3, 4, 9)] == ["warm_start", "warm_start", "low_rank", "low_rank"]
    assert [t for t in range(10) if schedule.switch_due(t)] == [4]
    assert Schedule(total_steps=10, warm_start_steps=10).phase(3) == "full"
    assert not any(Schedule(total_steps=10, warm_start_steps=10).switch_due(t) for t in range(11))


def test_the_climb_ends_on_the_cosine() -> None:
    schedule = Schedule(
        total_steps=100, warmup_steps=10, warm_start_steps=20, restart_every_steps=30, restart_warmup_steps=5
    )
    smooth = Schedule(total_steps=100, warmup_steps=10, warm_start_steps=100)
    for boundary in (20, 50, 80):
        assert schedule.lr_factor(boundary + 5) == smooth.lr_factor(boundary + 5)
        climb = [schedule.lr_factor(boundary + j) for j in range(6)]
        assert climb == pytest.approx([j / 5 * climb[5] for j in range(6)])


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
        {"min_lr_ratio": 0},
    ],
)
def test_what_does_not_fit_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Schedule(total_steps=10, **wrong)
