"""Checkpoints whose checksums are right and that are wrong all the same: every one is refused in one line.

Made by hand, or by a program that is not ours. What a manifest and a state.json may say is checked before
it is used; tensors must be the run's in name, shape, type and finiteness.
"""

import json
import math
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tests.faults.tiny import Outcome, TinyRun, contents
from torch import Tensor


def signed(folder: Path) -> None:
    """Make the manifest speak of the files as they are."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        digest = {"bytes": len(content), "crc32": zlib.crc32(content), "sha256": sha256(content).hexdigest()}
        manifest["files"][name] = digest
    write_manifest(folder, manifest)


def write_manifest(folder: Path, manifest: object) -> None:
    """With a checksum of itself that is right, wherever it can have one."""
    if isinstance(manifest, dict):
        manifest["sha256"] = sha256(json.dumps(manifest | {"sha256": None}, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def _manifest(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """A lie in the manifest itself: changed in place, or replaced by what `change` returns."""

    def lie(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        replaced = change(manifest)
        write_manifest(folder, manifest if replaced is None else replaced)

    return lie


def _state(**changed: object) -> Callable[[Path], None]:
    def lie(folder: Path) -> None:
        state = json.loads((folder / "state.json").read_bytes()) | changed
        (folder / "state.json").write_text(json.dumps(state))
        signed(folder)

    return lie


def _tensors(file: str, change: Callable[[dict[str, Tensor], str], None], word: str) -> Callable[[Path], None]:
    """Change the first tensor whose name holds `word`."""

    def lie(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors, next(name for name in sorted(tensors) if word in name))
        (folder / file).unlink()  # a hard link: the other checkpoints keep theirs
        save_file(tensors, folder / file)
        signed(folder)

    return lie


def _renamed(name: str) -> Callable[[Path], None]:
    """weights.safetensors under a name that leads elsewhere, to a faithful copy."""

    def lie(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        target = folder.parents[1] / "copy" if name == "absolute" else folder / name
        if not target.exists():
            shutil.copy(folder / "weights.safetensors", target)
        listed = str(target) if name == "absolute" else name
        manifest["files"][listed] = manifest["files"].pop("weights.safetensors")
        write_manifest(folder, manifest)

    return lie


def _change(entry: str, value: object) -> Callable[[dict], None]:
    def change(manifest: dict) -> None:
        manifest[entry] = value

    return change


def _without(name: str) -> Callable[[dict], None]:
    def change(manifest: dict) -> None:
        del manifest["files"][name]

    return change


def _digest(key: str, value: object) -> Callable[[dict], None]:
    def change(manifest: dict) -> None:
        manifest["files"]["weights.safetensors"][key] = value

    return change


def _reshaped(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = torch.cat([tensors[name], tensors[name]])


def _retyped(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name].to(torch.int64)


def _not_finite(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name].view(-1)[-1] = math.nan


def _dropped(tensors: dict[str, Tensor], name: str) -> None:
    del tensors[name]


def _doubled(tensors: dict[str, Tensor], name: str) -> None:
    tensors[f"{name}.more"] = tensors[name].clone()


WRONG_TENSORS = {
    "of another shape": _reshaped,
    "of whole numbers": _retyped,
    "not finite": _not_finite,
    "missing": _dropped,
    "too many": _doubled,
}
TENSORS = [("weights.safetensors", "lora_A"), ("frozen.safetensors", "q_proj"), ("optimizer.safetensors", "exp_avg_sq")]

LIES: dict[str, Callable[[Path], None]] = {
    "a name that leads out of the folder": _renamed("../copy"),
    "a name that leads out and back": _renamed("../step-00000012/weights.safetensors"),
    "an absolute name": _renamed("absolute"),
    **{
        f"no entry for {name}": _manifest(_without(name))
        for name in ("weights.safetensors", "frozen.safetensors", "optimizer.safetensors", "state.json")
    },
    "a file that is not there": _manifest(lambda m: m["files"].update(more=m["files"]["state.json"])),
    "a list": _manifest(lambda m: [m]),
    "null": _manifest(lambda m: "null"),
    "deeply nested": lambda folder: (folder / "manifest.json").write_text("[" * 100_000) and None,
    **{
        f"{entry}: {value!r}"[:60]: _manifest(_change(entry, value))
        for entry in ("format", "files", "settings")
        for value in (None, "2", 2.5, True, [], {"a": {"b": 1}}, -1, 99, 10**400)
    },
    **{
        f"{key} of a file: {value!r}"[:60]: _manifest(_digest(key, value))
        for key in ("bytes", "crc32", "sha256")
        for value in (None, "x", -1, 1.5, [], 10**400, True)
    },
    **{
        f"{key} in state.json: {value!r}"[:60]: _state(**{key: value})
        for key in ("step", "tokens", "positions", "incidents", "skipped_batches")
        for value in (None, "12", -1, 1.5, [], 10**400, True, {"metrics.jsonl": -5}, {"metrics.jsonl": 10**400}, {})
    },
    "state.json of another step": _state(step=14),
    **{
        f"a tensor {kind} in {file}": _tensors(file, change, word)
        for file, word in TENSORS
        for kind, change in WRONG_TENSORS.items()
    },
}


def lies(run: TinyRun, every: int = 1) -> Iterator[Outcome]:
    """A run whose only checkpoint tells a lie, two steps before its end: refused in one line, nothing changed.

    Every `every`-th lie.
    """
    for kind in list(LIES)[::every]:
        with tempfile.TemporaryDirectory(dir=run.folder.parent) as place:
            other = run.copied(Path(place), "lie")
            first, told, last = sorted(other.checkpoints.glob("step-*"))
            for folder in (first, last):
                shutil.rmtree(folder)
            LIES[kind](told)
            before = contents(other.checkpoints)
            complaint = other.pretrain().complaint(2)
            if complaint is None and contents(other.checkpoints) != before:
                complaint = "the checkpoints were changed"
            yield "a checkpoint that lies", complaint and f"{kind}: {complaint}"
