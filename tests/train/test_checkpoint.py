"""Checkpoints are complete or ignored, contain nothing executable, and share frozen weights without depending on it."""

import hashlib
import json
import os
import shutil
import threading
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from relora.errors import RunStopped, UserError
from relora.train import checkpoint_parts as module
from relora.train.checkpoint import Checkpoints
from relora.train.checkpoint_format import FROZEN, SavedState, digest_of

WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}
FROZEN_WEIGHTS = {"w": torch.arange(4.0)}
MOMENTS = {"a:exp_avg": torch.zeros(2, 3), "a:step": torch.tensor(4.0)}


def save(checkpoints: Checkpoints, step: int, frozen_since: int | None = None, scheduled: bool = True) -> Path:
    """Save one checkpoint; it has frozen weights if `frozen_since` is given."""
    state = SavedState(step=step, tokens=step * 10, positions={}, frozen_since=frozen_since, scheduled=scheduled)
    frozen = FROZEN_WEIGHTS if frozen_since is not None else {}
    checkpoints.save(state, WEIGHTS, frozen, MOMENTS, {"torch": "x"})
    checkpoints.wait()
    return checkpoints.folder / f"step-{step:08d}"


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("frozen_since", [None, 5])
def test_round_trip(tmp_path: Path, background: bool, frozen_since: int | None) -> None:
    checkpoints = Checkpoints(tmp_path, background=background)
    folder = save(checkpoints, 7, frozen_since)
    checkpoint, broken = checkpoints.latest()
    assert checkpoint is not None and not broken
    assert (checkpoint.step, checkpoint.state.tokens, checkpoint.manifest.settings) == (7, 70, {"torch": "x"})
    weights = WEIGHTS | (FROZEN_WEIGHTS if frozen_since is not None else {})
    for loaded, tensors in ((checkpoint.weights(), weights), (checkpoint.optimizer(), MOMENTS)):
        assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[k], tensors[k]) for k in tensors)
        assert all(loaded[k].dtype == tensors[k].dtype for k in tensors)
    assert (folder / FROZEN).exists() == (frozen_since is not None)


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
    with pytest.raises(UserError, match=r"damaged|missing"):
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


def test_a_damaged_newer_checkpoint_does_not_count_among_those_kept(tmp_path: Path) -> None:
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


def inode(folder: Path) -> int:
    return (folder / FROZEN).stat().st_ino


def test_frozen_weights_are_written_once_a_cycle_and_two_copies_are_kept(tmp_path: Path) -> None:
    """The second checkpoint of the first cycle writes them again, so that one damaged file cannot damage all."""
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    copies = [inode(save(checkpoints, step, frozen_since=0)) for step in (1, 2, 3, 4)]
    assert copies[1] == copies[2] == copies[3] != copies[0] and checkpoints.steps() == [1, 3, 4]
    copies = [inode(save(checkpoints, step, frozen_since=4)) for step in (5, 6, 7, 8)]
    assert len(set(copies)) == 1 and checkpoints.steps() == [4, 7, 8]
    for step in checkpoints.steps():
        assert torch.equal(Checkpoints(tmp_path).open(step).weights()["w"], FROZEN_WEIGHTS["w"])


def test_a_damaged_shared_file_leaves_a_sound_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step in (1, 2, 3, 4):
        folder = save(checkpoints, step, frozen_since=0)
    with (folder / FROZEN).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    newest, broken = Checkpoints(tmp_path).latest()
    assert newest is not None and newest.step == 1
    assert [FROZEN in line for line in broken] == [True, True]


def test_a_continued_run_links_to_what_it_began_from(tmp_path: Path) -> None:
    for step in (1, 2):
        first = inode(save(Checkpoints(tmp_path), step, frozen_since=0))
    continued = Checkpoints(tmp_path)
    assert continued.latest()[0] is not None
    assert inode(save(continued, 3, frozen_since=0)) == first
    assert inode(save(continued, 4, frozen_since=3)) != first


def test_without_hard_links_the_frozen_weights_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    checkpoints = Checkpoints(tmp_path, keep_last=4)
    assert len({inode(save(checkpoints, step, frozen_since=0)) for step in (1, 2, 3)}) == 3
    assert Checkpoints(tmp_path).latest()[0] is not None


def test_checkpoints_on_demand_do_not_push_out_the_scheduled_one(tmp_path: Path) -> None:
    for step in (10, 11, 12, 13):
        save(Checkpoints(tmp_path, keep_last=1), step, scheduled=step == 10)
    assert Checkpoints(tmp_path).steps() == [10, 13]
    save(Checkpoints(tmp_path, keep_last=1), 20)
    assert Checkpoints(tmp_path).steps() == [20]


def test_go_back_opens_the_scheduled_one_and_deletes_newer_ones(tmp_path: Path) -> None:
    for step in (5, 10, 12, 15):
        save(Checkpoints(tmp_path, keep_last=9), step, scheduled=step in (5, 10))
    checkpoint, broken = Checkpoints(tmp_path).go_back(14)
    assert checkpoint is not None and checkpoint.step == 10 and not broken
    assert Checkpoints(tmp_path).steps() == [5, 10]
    (tmp_path / "step-00000010" / "optimizer.safetensors").write_bytes(b"")
    checkpoint, broken = Checkpoints(tmp_path).go_back(14)
    assert checkpoint is not None and checkpoint.step == 5 and "step-00000010" in broken[0]


def test_go_back_opens_any_where_none_is_scheduled(tmp_path: Path) -> None:
    save(Checkpoints(tmp_path), 7, scheduled=False)
    assert Checkpoints(tmp_path).go_back(6) == (None, [])
    checkpoint, _ = Checkpoints(tmp_path).go_back(8)
    assert checkpoint is not None and checkpoint.step == 7


def test_one_that_cannot_be_deleted_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_unlink = shutil.os.unlink

    def refuse_in_folders(path: str, *, dir_fd: int | None = None) -> None:
        if dir_fd is not None:  # how rmtree deletes the files of a folder
            raise PermissionError(1, "Operation not permitted")
        real_unlink(path)

    checkpoints = Checkpoints(tmp_path, keep_last=1)
    save(checkpoints, 1)
    monkeypatch.setattr(shutil.os, "unlink", refuse_in_folders)
    save(checkpoints, 2)
    assert checkpoints.steps() == [1, 2]
    monkeypatch.undo()
    save(checkpoints, 3)
    assert checkpoints.steps() == [3]


def test_what_is_loaded_does_not_hold_on_to_the_file(tmp_path: Path) -> None:
    """A memory-mapped file would occupy the disk after its deletion, for as long as the optimizer lives."""
    folder = save(Checkpoints(tmp_path), 1)
    moments = Checkpoints(tmp_path).open(1).optimizer()
    assert moments and str(folder) not in Path("/proc/self/maps").read_text()


def test_a_step_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    before = (save(checkpoints, 3) / "manifest.json").stat().st_mtime_ns
    assert (save(checkpoints, 3) / "manifest.json").stat().st_mtime_ns == before


def test_a_damaged_one_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    (save(Checkpoints(tmp_path), 3) / "weights.safetensors").write_bytes(b"")
    save(Checkpoints(tmp_path), 3)
    assert Checkpoints(tmp_path).open(3).step == 3
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_tensors_are_saved_as_they_were_when_save_was_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer is made to wait until the tensor has changed."""
    go, write = threading.Event(), module.save_file

    def late(*arguments: object) -> None:
        assert go.wait(10)
        write(*arguments)

    monkeypatch.setattr(module, "save_file", late)
    checkpoints, tensor = Checkpoints(tmp_path), torch.zeros(3)
    state = SavedState(step=1, tokens=0, positions={})
    checkpoints.save(state, {"a": tensor}, {"w": tensor[1:]}, {}, {})
    tensor.fill_(7.0)
    go.set()
    checkpoints.wait()
    saved = Checkpoints(tmp_path).open(1).weights()
    assert not saved["a"].any() and not saved["w"].any()


def test_a_failure_in_the_background_is_raised_by_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    monkeypatch.setattr(module, "save_file", full)
    checkpoints.save(SavedState(step=2, tokens=0, positions={}), WEIGHTS, {}, MOMENTS, {})
    with pytest.raises(RunStopped, match=r"No space left on device.*make room"):
        while True:
            checkpoints.check()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("manifest.json", {"files": {"../../secret": {"bytes": 1, "crc32": 1, "sha256": ""}}}, "damaged"),
        ("manifest.json", {"files": {}}, "does not list optimizer.safetensors"),
        ("manifest.json", {"settings": 3}, "damaged"),
        ("manifest.json", {"format": "2"}, "damaged"),
        ("state.json", {"step": 2}, "step 2, in the folder of step 1"),
        ("state.json", {"tokens": "many"}, "damaged"),
        ("state.json", {"incidents": -1}, "damaged"),
        ("state.json", {"skipped_batches": 10**400}, "damaged"),
    ],
)
def test_wrong_content_under_right_checksums_is_refused(
    tmp_path: Path, file: str, change: dict[str, object], message: str
) -> None:
    """The content is edited and all checksums are computed again."""
    folder = save(Checkpoints(tmp_path), 1)
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | change))
    manifest = json.loads((folder / "manifest.json").read_text())
    if file != "manifest.json":
        manifest["files"][file] = asdict(digest_of(folder / file))
    unsigned = json.dumps(manifest | {"sha256": None}, sort_keys=True)
    manifest["sha256"] = hashlib.sha256(unsigned.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=message):
        Checkpoints(tmp_path).open(1)


def test_an_edited_manifest_is_refused_by_its_own_checksum(tmp_path: Path) -> None:
    manifest = save(Checkpoints(tmp_path), 1) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"torch": "x"', '"torch": "y"'))
    with pytest.raises(UserError, match="its own checksum differs"):
        Checkpoints(tmp_path).open(1)


def test_links_are_not_followed(tmp_path: Path) -> None:
    folder = save(Checkpoints(tmp_path / "run"), 1)
    (folder / "weights.safetensors").rename(tmp_path / "elsewhere")
    (folder / "weights.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"weights\.safetensors: missing, or not a plain file"):
        Checkpoints(tmp_path / "run").open(1)
