import importlib.util
import netrc
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from relora.errors import UserError
from relora.report.trackers import check_trackers, open_trackers, scalars

CONFIG = {"seed": 0, "lowrank": {"r": 8}}


def loss_record(step: int) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": 10.0 - step, "phase": "full", "grad_norm": None}


def logged(run_folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def write(run_folder: Path, steps: range, first_step: int = 0) -> None:
    [tracker] = open_trackers(["tensorboard"], run_folder, CONFIG, first_step)
    for step in steps:
        tracker.log(loss_record(step))
    tracker.close()


def test_scalars_are_named_for_dashboards_and_are_numbers() -> None:
    assert dict(scalars(loss_record(3))) == {"train/loss": 7.0}


def test_tensorboard_gets_the_figures(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    assert logged(tmp_path, "train/loss") == [(1, 9.0), (2, 8.0), (3, 7.0)]


@pytest.mark.parametrize("checkpoint", [0, 3])
def test_tensorboard_shows_no_step_twice_after_a_resume(tmp_path: Path, checkpoint: int) -> None:
    write(tmp_path, range(1, 6))
    write(tmp_path, range(checkpoint + 1, 8), first_step=checkpoint)
    assert [step for step, _ in logged(tmp_path, "train/loss")] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("extra", ["wandb", "trackio"])
def test_an_absent_extra_is_named_with_its_remedy(extra: str) -> None:
    if importlib.util.find_spec(extra):
        pytest.skip(f"{extra} is installed")
    with pytest.raises(UserError, match=rf"pip install 'relora\[{extra}\]'"):
        check_trackers([extra])


def test_a_tracker_that_cannot_start_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    with pytest.raises(UserError, match=r"^log.trackers: tensorboard cannot start: .*; mend that or leave it out$"):
        open_trackers(["tensorboard"], tmp_path, CONFIG)


def test_wandb_stays_offline_without_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises((OSError, netrc.NetrcParseError)):
        netrc.netrc()
    [tracker] = open_trackers(["wandb"], tmp_path, CONFIG)
    tracker.log(loss_record(1))
    tracker.close()
    assert list((tmp_path / "wandb").glob("offline-run-*"))
    assert capfd.readouterr() == ("", "")
