"""Calibration: a machine is measured once, the rates are kept in a file, and an invalid file is measured again."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from relora.lowrank import calibrate
from relora.lowrank.calibrate import calibrated, from_json, measure, rates_file, to_json
from relora.lowrank.costs import NOMINAL_RATES

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _forget_rates_of_this_process() -> None:
    calibrate._calibrated.cache_clear()


def test_measured_rates_are_plausible() -> None:
    rates = measure(CPU)
    sides, figures = zip(*rates.fp32, strict=True)
    assert list(sides) == sorted(sides) and list(figures) == sorted(figures)
    assert 1e8 < figures[-1] < 1e15 and 1e7 < rates.bandwidth < 1e13 and rates.bf16 > 0 and rates.int8 >= 0


def test_the_first_measurement_stays(tmp_path: Path) -> None:
    first = calibrated(CPU, tmp_path)
    [file] = tmp_path.iterdir()
    kept = replace(first, bandwidth=12345.0)
    file.write_text(to_json(kept))
    assert calibrated(CPU, tmp_path) is first  # once per process
    calibrate._calibrated.cache_clear()
    assert calibrated(CPU, tmp_path) == kept


def test_anew_discards_the_rates_that_are_kept(tmp_path: Path) -> None:
    calibrated(CPU, tmp_path)
    file = rates_file(CPU, tmp_path)
    file.write_text(to_json(replace(NOMINAL_RATES, bandwidth=12345.0)))
    again = calibrated(CPU, tmp_path, anew=True)
    assert again.bandwidth != 12345.0 and from_json(file.read_text()) == again == calibrated(CPU, tmp_path)


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"fp32": [], "bf16": 1, "int8": 1, "bandwidth": 1}', "\x80"])
def test_an_invalid_file_is_measured_again(tmp_path: Path, damage: str) -> None:
    calibrated(CPU, tmp_path)
    [file] = tmp_path.iterdir()
    file.write_bytes(damage.encode("latin-1"))
    calibrate._calibrated.cache_clear()
    again = calibrated(CPU, tmp_path)
    assert from_json(file.read_text()) == again
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert calibrated(CPU, tmp_path / "file").bandwidth > 0


def test_round_trip_and_refusals() -> None:
    assert from_json(to_json(NOMINAL_RATES)) == NOMINAL_RATES
    for bad in (
        replace(NOMINAL_RATES, bandwidth=0.0),
        replace(NOMINAL_RATES, bf16=float("inf")),
        replace(NOMINAL_RATES, int8=-1.0),
    ):
        assert from_json(to_json(bad)) is None
    assert from_json("None") is None


def test_the_meta_device_is_not_measured() -> None:
    assert calibrated(torch.device("meta")) is NOMINAL_RATES
