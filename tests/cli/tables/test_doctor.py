"""The table of `relora doctor`."""

from dataclasses import replace

import pytest
from tests.cli.tables.screen import Screen

from relora.cli.tables.doctor import print_diagnosis
from relora.planning.doctor import EXTRAS, Diagnosis, DtypeSpeed, Gpu, diagnose


@pytest.fixture(scope="module")
def diagnosis() -> Diagnosis:
    return diagnose()


def test_a_real_machine_is_described(diagnosis: Diagnosis) -> None:
    screen = Screen()
    print_diagnosis(diagnosis, screen)
    assert f"torch {diagnosis.versions['torch']}" in screen.text
    names = [line.split()[0] for line in screen.text.splitlines()]
    assert names[:3] == ["versions", "platform", "device"] and {"CPU", "memory", "disk", "fp32", "rates"} <= set(names)


def test_gpus_missing_dtypes_missing_extras_and_warnings(diagnosis: Diagnosis) -> None:
    """Square brackets are text, not markup."""
    screen = Screen()
    changed = replace(
        diagnosis,
        gpus=[Gpu("H200", "9.0", 10**9, 141 * 10**9)],
        dtypes={"fp16": DtypeSpeed(None, None)},
        extras=dict.fromkeys(EXTRAS),
        rates_file="/home/[me]/rates.json",
        warnings=["only 1.0 GB of disk are free [really]"],
    )
    print_diagnosis(changed, screen)
    lines = [" ".join(line.split()) for line in screen.text.splitlines()]
    assert "cuda:0 H200 (9.0), 1.0 of 141.0 GB free" in lines and "fp16 not supported" in lines
    assert "wandb not installed; needed for log.trackers: [wandb]" in lines
    assert any("kept in /home/[me]/rates.json" in line for line in lines)
    assert lines[-1] == "warning: only 1.0 GB of disk are free [really]"
