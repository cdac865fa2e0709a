import json
import math
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relora.report.history import read_history
from relora.report.spikes import Boundary, LossWatch, Rise, measure, rises, window_steps

MakeRun = Callable[..., Path]
RESTART = Boundary(1000, 1)


def line(step: int, loss: float | None, cycle: int = 0, phase: str = "low_rank") -> dict[str, Any]:
    return {"kind": "train", "step": step, "tokens": 10 * step, "phase": phase, "cycle": cycle, "loss": loss}


def falling(first: int, last: int, seed: int = 0) -> list[tuple[int, float]]:
    """Losses with noise 0.02 that fall by 0.1 in 100 steps, logged every ten steps."""
    random = Random(seed)
    return [(step, 4 - step / 1000 + random.gauss(0, 0.02)) for step in range(first, last + 1, 10)]


def test_a_spike_is_measured_by_its_definition() -> None:
    before = [(step, 3.5 + 0.02 * (-1) ** (step // 10)) for step in range(910, 1001, 10)]
    after = list(zip(range(1010, 1111, 10), [3.5, 3.7, 3.9, 3.8, 3.5, 3.4, 3.4, 3.4, 3.4, 3.4, 9.9], strict=True))
    rise = measure(RESTART, 100, before, after)
    assert rise is not None
    assert rise.before == pytest.approx(3.5)
    assert (rise.peak, rise.peak_step) == (3.9, 1030)  # 9.9 is after the window
    assert rise.rise == pytest.approx(0.4)
    assert rise.noise == pytest.approx(0.04 / math.sqrt(2))
    assert rise.is_spike
    assert rise.recovered_after == 80  # the mean of 3.8 3.5 3.4 3.4 3.4 is 3.5


def test_a_loss_that_stays_high_has_not_recovered() -> None:
    rise = measure(RESTART, 100, falling(910, 1000), [(step, 3.9) for step in range(1010, 1200, 10)])
    assert rise is not None
    assert rise.is_spike
    assert rise.recovered_after is None


def test_the_slope_of_a_falling_loss_is_no_noise() -> None:
    rise = measure(RESTART, 100, [(step, 14 - step / 100) for step in range(910, 1001, 10)], [(1010, 4.0)])
    assert rise is not None
    assert rise.noise < 0.08 < 0.28  # 0.28 is the standard deviation of these ten losses


def test_noise_rarely_counts_as_a_spike() -> None:
    random = Random(0)
    spikes = 0
    for _ in range(2000):
        losses = [(step, random.gauss(4, 0.1)) for step in range(10, 401, 10)]
        rise = measure(Boundary(200, 1), 200, losses[:20], losses[20:])
        assert rise is not None
        spikes += rise.is_spike
    assert spikes < 0.03 * 2000


@pytest.mark.parametrize(("before", "after"), [(4, 10), (0, 10), (10, 0)])
def test_too_few_losses_give_no_rise(before: int, after: int) -> None:
    assert measure(RESTART, 100, falling(1010 - 10 * before, 1000), falling(1010, 1000 + 10 * after)) is None


def test_a_window_is_twice_the_warm_up_and_ten_logged_losses_at_least() -> None:
    assert window_steps({"restart": {"warmup_steps": 80}, "log": {"every_steps": 10}}) == 160
    assert window_steps({"restart": {"warmup_steps": 5}, "log": {"every_steps": 10}}) == 100
    assert window_steps({}) == window_steps({"restart": None, "log": {"every_steps": "x"}}) == 10


def test_every_boundary_of_a_run_is_measured_between_its_neighbours() -> None:
    records = [line(step, loss, phase="warm_start") for step, loss in falling(10, 500)]
    records += [line(501, 3.5), *(line(step, loss) for step, loss in falling(510, 750))]
    records += [line(step, loss + (0.5 if step < 800 else 0), cycle=1) for step, loss in falling(760, 1000)]
    records += [line(step, None, cycle=2) for step in range(1010, 1200, 10)]
    restarts = [{"step": 750, "cycle": 1}, {"step": 1000, "cycle": 2}]
    switch, restart = rises(records, restarts, 100)
    assert (switch.boundary, switch.is_spike) == (Boundary(500, 0), False)
    assert (restart.boundary, restart.is_spike, restart.peak_step) == (Boundary(750, 1), True, 760)
    assert restart.recovered_after is not None
    assert restart.boundary.step + restart.recovered_after in range(800, 850)


def test_skipped_steps_and_null_losses_count_for_nothing() -> None:
    records = [line(step, loss) for step, loss in falling(510, 760)]
    restarts = [{"step": 750, "cycle": 1}]
    more = [*records, line(755, None, cycle=1), line(756, 99.0, cycle=1) | {"kind": "skipped"}]
    assert rises(more, restarts, 100) == rises(records, restarts, 100) != []


def watched(records: list[dict[str, Any]], restarts: list[Boundary], window: int) -> list[tuple[int, Rise]]:
    """Rises that a run reports, each with the step at which it does."""
    watch, told = LossWatch(window), []
    due = restarts.copy()
    for record in records:
        while due and due[0].step < record["step"]:
            told.append((due[0].step, watch.boundary(due.pop(0))))
        told.append((record["step"], watch.record(record)))
    return [(step, rise) for step, rise in told if rise]


@settings(max_examples=60, deadline=None)
@given(
    warm_start=st.integers(20, 60),
    every=st.integers(12, 40),
    logged=st.integers(1, 4),
    window=st.integers(10, 60),
    seed=st.integers(0, 99),
)
def test_a_run_reports_the_rises_that_the_report_finds(
    warm_start: int, every: int, logged: int, window: int, seed: int
) -> None:
    random, total = Random(seed), 240
    restarts = [Boundary(step, cycle) for cycle, step in enumerate(range(warm_start + every, total, every), start=1)]
    boundaries = [warm_start, *(restart.step for restart in restarts)]
    records = []
    for step in range(1, total + 1):
        if step % logged == 0 or step - 1 in boundaries:
            cycle = sum(step > restart.step for restart in restarts)
            phase = "low_rank" if step > warm_start else "warm_start"
            records.append(line(step, random.gauss(4, 0.1), cycle, phase))
    told = watched(records, restarts, window)
    found = rises(records, [{"step": b.step, "cycle": b.cycle} for b in restarts], window)
    found = [rise for rise in found if rise.boundary.step + min(window, every) < total]
    assert [rise.boundary for _, rise in told][: len(found)] == [rise.boundary for rise in found]
    for (step, rise), complete in zip(told, found, strict=False):
        assert (rise.before, rise.peak, rise.noise) == (complete.before, complete.peak, complete.noise)
        assert rise.boundary.step < step <= rise.boundary.step + window + logged
        assert rise.recovered_after in (None, complete.recovered_after)  # the report reads losses beyond the window


def test_the_switch_is_recognised_by_the_first_low_rank_step() -> None:
    records = [line(step, 4.0, phase="warm_start") for step in range(1, 31)]
    records += [line(step, 5.0) for step in range(31, 61)]
    [(step, rise)] = watched(records, [], 10)
    assert (step, rise.boundary, rise.rise) == (40, Boundary(30, 0), 1.0)
    assert rise.boundary.name == "switch to low rank"


def test_the_report_reads_window_and_boundaries_from_the_run_folder(tmp_path: Path, make_run: MakeRun) -> None:
    folder = make_run(tmp_path)
    history = read_history(folder)
    assert [rise.boundary.cycle for rise in history.rises] == [0, 1, 2, 3, 4, 5]
    assert not any(rise.is_spike for rise in history.rises)
    records = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        if record["kind"] == "train" and 1000 < record["step"] <= 1040:
            record["loss"] += 1.0
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    [spike] = [rise for rise in read_history(folder).rises if rise.is_spike]
    assert spike.boundary == Boundary(1000, 2)
    assert spike.rise == pytest.approx(1.0, abs=0.15)
    assert spike.recovered_after in (60, 70, 80, 90)
