"""The tables of `relora plan`."""

from dataclasses import replace

import pytest
from tests.cli.tables.screen import Screen

from relora.cli.tables.plan import print_plan
from relora.planning.alternatives import Alternative
from relora.planning.phase_cost import PhaseCost
from relora.planning.plan import Plan
from relora.planning.probe import Measured
from relora.planning.step import StepFigures

MIB = 2**20
FIGURES = StepFigures(
    trained=1000,
    frozen=0,
    factors=0,
    memory={"weights": 2048 * MIB, "moments": 10 * MIB, "loss": 50_000},
    heap=0,
    mapped=0,
    resident=300 * MIB,
    restart=400 * MIB,
    snapshot=100 * MIB,
    seconds=0.5,
)
WARM_START = PhaseCost("warm_start", 0, 100, FIGURES, allocator=5 * MIB, process=400 * MIB, snapshot=100 * MIB)
LOW_RANK = replace(
    WARM_START, name="low_rank", first_step=100, steps=7300, figures=replace(FIGURES, frozen=9000, factors=64)
)
PLAN = Plan(
    "relora", "cpu", 400 * MIB, [WARM_START, LOW_RANK], restarts=3, adaptive_switch=False, alternatives=[], notes=[]
)


def rows_of(plan: Plan) -> dict[str, list[str]]:
    """The cells of the printed tables by the label in the first column."""
    screen = Screen()
    print_plan(plan, screen)
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in screen.text.splitlines()]
    return {row[0]: row[1:] for row in cells}


def test_memory_and_time_of_every_phase() -> None:
    rows = rows_of(PLAN)
    assert rows["steps"] == ["0 ... 100", "100 ... 7,400"]
    assert rows["weights"] == ["2.00 GiB", "2.00 GiB"] and rows["moments"] == ["10 MiB", "10 MiB"]
    assert "loss" not in rows  # less than 0.1 MB in every phase
    assert rows["restart (tensors)"] == ["-", "400 MiB"]
    assert rows["the phase"] == ["50.0 s", "1 h 00 min"]
    assert "probed: peak" not in rows


def test_the_peak_of_the_run_is_that_of_its_worst_phase() -> None:
    screen = Screen()
    print_plan(replace(PLAN, phases=[WARM_START, replace(LOW_RANK, snapshot=200 * MIB)]), screen)
    assert screen.text.startswith("a relora run on cpu\n")
    assert "in the low rank phase; 1 h 01 min of steps" in screen.text


def test_a_phase_that_was_not_probed_has_dashes() -> None:
    rows = rows_of(replace(PLAN, phases=[WARM_START, replace(LOW_RANK, measured=Measured(512 * MIB, 0.25))]))
    assert rows["probed: peak"] == ["-", "512 MiB"] and rows["probed: a step"] == ["-", "0.25 s"]


def test_a_warm_start_that_the_run_ends_has_its_longest_length() -> None:
    assert rows_of(replace(PLAN, adaptive_switch=True))["steps"] == ["0 ... 100 at most", "100 ... 7,400"]


def test_alternatives() -> None:
    others = [Alternative("full", None, "none", 3000 * MIB, 0.5), Alternative("lora", "int8", "full", MIB, 1.25)]
    rows = rows_of(replace(PLAN, alternatives=others))
    assert rows["full"] == ["-", "none", "2.93 GiB", "0.50 s"] and rows["lora"] == ["int8", "full", "1 MiB", "1.25 s"]


@pytest.mark.parametrize(("steps", "time"), [(118, "59.0 s"), (120, "1 min 00 s"), (7199, "1 h 00 min")])
def test_times_have_at_most_two_units(steps: int, time: str) -> None:
    assert rows_of(replace(PLAN, phases=[replace(WARM_START, steps=steps)]))["the phase"] == [time]
