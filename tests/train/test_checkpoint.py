"""Checkpoints are whole or ignored, and hold nothing that runs."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from relora.errors import RunStopped, UserError
from relora.train.checkpoint import Checkpoints

WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}
MOMENTS = {"a:exp_avg": torch.zeros(2, 3), "a:step": torch.tensor(4.0)}


def save(checkpoints: Checkpoints, step: int) -> Path:
    return checkpoints.save({"step": step, "tokens": step * 10}, WEIGHTS, MOMENTS, {"torch": "x"})


def test_round_trip(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 7)
    checkpoint, broken = checkpoints.latest()
    assert checkpoint is not None and not broken
    assert (checkpoint.step, checkpoint.state["tokens"], checkpoint.settings) == (7, 70, {"torch": "x"})
    for kind, tensors in (("weights", WEIGHTS), ("optimizer", MOMENTS)):
        loaded = checkpoint.tensors(kind)
        assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[k], tensors[k]) for k in tensors)
        assert loaded.keys() == tensors.keys() and all(loaded[k].dtype == tensors[k].dtype for k in tensors)


def test_only_safetensors_and_json(tmp_path: Path) -> None:
    folder = save(Checkpoints(tmp_path), 1)
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}


def test_keeps_the_last(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step in (1, 2, 10, 11):
        save(checkpoints, step)
    assert checkpoints.steps() == [10, 11]


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "empty"])
def test_damage_is_named_and_the_older_one_used(tmp_path: Path, name: str, damage: str) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    file = save(checkpoints, 2) / name
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "flipped" and name == "manifest.json":
        file.write_bytes(content.replace(b'"crc32": ', b'"crc32": 1', 1))
    elif damage == "flipped":
        content[len(content) // 2] ^= 4
        file.write_bytes(bytes(content))
    else:
        file.write_bytes(bytes(content[: len(content) // 2] if damage == "truncated" else b""))
    checkpoint, broken = checkpoints.latest()
    assert checkpoint is not None and checkpoint.step == 1
    assert len(broken) == 1 and "step-00000002" in broken[0]
    with pytest.raises(UserError, match="damaged"):
        checkpoints.open(2)


def test_what_a_kill_leaves_is_ignored_and_swept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    whole = save(checkpoints, 1)
    leftover = tmp_path / ".step-00000002.partial"
    shutil.copytree(whole, leftover)
    (tmp_path / "step-00000003").mkdir()  # no manifest
    newest, broken = checkpoints.latest()
    assert newest is not None and newest.step == 1 and len(broken) == 1
    save(checkpoints, 4)
    assert not leftover.exists()


def test_a_damaged_newer_checkpoint_takes_no_sound_ones_place(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    (save(checkpoints, 3) / "weights.safetensors").write_bytes(b"")
    save(checkpoints, 2)
    newest, _ = checkpoints.latest()
    assert newest is not None and newest.step == 2


def test_another_format_is_refused(tmp_path: Path) -> None:
    manifest = save(Checkpoints(tmp_path), 1) / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
    with pytest.raises(UserError, match="format 99"):
        Checkpoints(tmp_path).open(1)


def test_a_write_that_fails_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    (tmp_path / ".step-00000002.partial").write_text("a file where the folder must go")
    with pytest.raises(RunStopped, match="make room"):
        save(checkpoints, 2)
    newest, _ = checkpoints.latest()
    assert newest is not None and newest.step == 1
