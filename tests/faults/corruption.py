"""Checkpoints and run folders that were damaged: nothing may go unnoticed.

A checkpoint is sound if all its files are what was written. Whatever was done to any of them, the newest sound
checkpoint must be found, and every newer one named with its file in one line; a run goes on from there to the same
bytes. Damage in place hits every hard link of a file, as a bad sector does.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from random import Random

from tests.faults.lies import lies
from tests.faults.tiny import DATA, Outcome, TinyRun, contents, relora, tally

from relora.errors import UserError
from relora.train.checkpoint import Checkpoints

PAGE = 4096
Damage = Callable[[Path, Random], None]
"""Does something to one file."""


def campaign(trials: int, seed: int) -> list[tuple[str, int, int]]:
    """`trials` for each file of a checkpoint: a third flipped bits, zeroed pages and cuts each; then all the rest."""
    with tempfile.TemporaryDirectory() as place:
        run = TinyRun(Path(place)).finished()
        rows = tally(damaged_files(run, trials, Random(seed)))
        rows += tally(misplaced_files(run, Random(seed)))
        rows += tally(lies(run))
        rows += tally(whole_runs(run, max(trials // 20, 1), Random(seed)))
        rows += tally(damaged_models(run, Random(seed)))
        return rows + tally(damaged_records(run, Random(seed)))


# Damage to one file


def _in_place(change: Callable[[bytearray, Random], bytes]) -> Damage:
    """Write other content into the same file."""

    def damage(file: Path, draw: Random) -> None:
        content = file.read_bytes()
        while (changed := bytes(change(bytearray(content), draw))) == content:
            pass
        file.write_bytes(changed)

    return damage


def _flip(content: bytearray, draw: Random) -> bytearray:
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return content


def _zero_page(content: bytearray, draw: Random) -> bytearray:
    start = draw.randrange(0, len(content), PAGE)
    content[start : start + PAGE] = bytes(len(content[start : start + PAGE]))
    return content


def _cut(content: bytearray, draw: Random) -> bytearray:
    return content[: draw.randrange(len(content))]


def _extend(content: bytearray, draw: Random) -> bytearray:
    return content + draw.randbytes(draw.randint(1, 2 * PAGE))


def _swap(file: Path, draw: Random) -> None:
    """Exchange the names of two files."""
    other = draw.choice([path for path in sorted(file.parent.iterdir()) if path != file])
    aside = file.with_name("aside")
    file.rename(aside)
    other.rename(file)
    aside.rename(other)


def _of_another_checkpoint(file: Path, draw: Random) -> None:
    here = file.read_bytes()
    others = [path for path in sorted(file.parents[1].glob(f"step-*/{file.name}")) if path.read_bytes() != here]
    other = draw.choice(others).read_bytes()
    file.unlink()
    file.write_bytes(other)


def _folder(file: Path, draw: Random) -> None:
    file.unlink()
    file.mkdir()


def _link_outside(file: Path, draw: Random) -> None:
    """To a faithful copy out of the run folder, which somebody else may change or delete at any time."""
    outside = Path(tempfile.mkdtemp(dir=file.parents[3])) / file.name
    shutil.copy(file, outside)
    file.unlink()
    file.symlink_to(outside)


def _delete(file: Path, draw: Random) -> None:
    file.unlink()


IN_PLACE: dict[str, Damage] = {
    "bit flipped": _in_place(_flip),
    "page zeroed": _in_place(_zero_page),
    "cut short": _in_place(_cut),
}
REPLACED: dict[str, Damage] = {
    "deleted": _delete,
    "emptied": lambda file, draw: file.write_bytes(b""),
    "bytes appended": _in_place(_extend),
    "swapped with another": _swap,
    "of another checkpoint": _of_another_checkpoint,
    "a folder": _folder,
    "a link out of the run folder": _link_outside,
}


class Snapshot:
    """A checkpoints folder as it was written: what is sound in it now, and the way back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spare = Path(tempfile.mkdtemp(dir=folder.parents[1]))
        self.links = {file.relative_to(folder): file.read_bytes() for file in folder.glob("step-*/*")}
        for number, name in enumerate(self.links):  # hard links, so that the way back keeps what is shared shared
            os.link(folder / name, self.spare / str(number))

    def sound(self) -> list[int]:
        """Steps of the checkpoints whose files are all as they were written, newest first."""
        whole: dict[str, bool] = {}
        for name, content in self.links.items():
            file = self.folder / name
            same = file.is_file() and not file.is_symlink() and file.read_bytes() == content
            whole[name.parts[0]] = whole.get(name.parts[0], True) and same
        return sorted((int(name.removeprefix("step-")) for name, good in whole.items() if good), reverse=True)

    def restore(self) -> None:
        for number, (name, content) in enumerate(self.links.items()):
            file, spare = self.folder / name, self.spare / str(number)
            if spare.read_bytes() != content:
                spare.write_bytes(content)
            if file.is_dir():
                file.rmdir()
            if file.is_symlink() or not file.exists() or not file.samefile(spare):
                file.unlink(missing_ok=True)
                os.link(spare, file)


def unnoticed(checkpoints: Checkpoints, sound: list[int], named: str) -> str | None:
    """What is wrong with how a damaged folder is opened; `named` is the file that was damaged in the newest."""
    found, broken = checkpoints.latest()
    newer = [step for step in reversed(checkpoints.steps()) if not sound or step > sound[0]]
    if (found.step if found else None) != (sound[0] if sound else None):
        return f"took {found and found.step}, the newest sound one is {sound[:1]}"
    if len(broken) != len(newer) or any("\n" in line for line in broken):
        return f"not one line for each of {newer}: {broken}"
    for step, line in zip(newer, broken, strict=True):
        if f"step-{step:08d}" not in line:
            return f"step {step} is not in {line!r}"
        try:
            checkpoints.open(step)
        except UserError:
            continue
        return f"step {step} was opened"
    return None if newer and named in broken[0] else f"{named} is not in {broken[:1]}"


def _tried(run: TinyRun, snapshot: Snapshot, name: str, damage: Damage, draw: Random, *, any_file: bool) -> str | None:
    newest = max(run.checkpoints.glob("step-*"))
    damage(newest / name, draw)
    try:
        # of two files that changed places, or of a manifest that speaks of other files, any may be the one named
        return unnoticed(Checkpoints(run.checkpoints), snapshot.sound(), newest.name if any_file else name)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        snapshot.restore()


def files(run: TinyRun) -> list[str]:
    """The names of the files of its newest checkpoint."""
    return sorted(path.name for path in max(run.checkpoints.glob("step-*")).iterdir())


def damaged_files(run: TinyRun, trials: int, draw: Random) -> Iterator[Outcome]:
    """Every file of the newest checkpoint damaged in place at random, `trials` times each."""
    snapshot = Snapshot(run.checkpoints)
    for name in files(run):
        for kind, damage in IN_PLACE.items():
            for _ in range(max(trials // len(IN_PLACE), 1)):
                # a manifest that is still one, but not what was written, may blame the file it speaks of
                any_file = name == "manifest.json"
                yield f"{name}: {kind}", _tried(run, snapshot, name, damage, draw, any_file=any_file)


def misplaced_files(run: TinyRun, draw: Random) -> Iterator[Outcome]:
    """Every file of the newest checkpoint gone, emptied, extended, or another thing in its place."""
    snapshot = Snapshot(run.checkpoints)
    for name in files(run):
        for kind, damage in REPLACED.items():
            any_file = "another" in kind
            yield f"a file {kind}", _tried(run, snapshot, name, damage, draw, any_file=any_file)


# Whole runs


def whole_runs(run: TinyRun, trials: int, draw: Random) -> Iterator[Outcome]:
    """Continued with the newest checkpoint damaged, refused with --strict; refused when all are."""
    whole = run.result()
    kinds = {kind: damage for kind, damage in (IN_PLACE | REPLACED).items() if damage is not _link_outside}
    for _ in range(trials):
        name, kind = draw.choice(files(run)), draw.choice(list(kinds))
        with tempfile.TemporaryDirectory(dir=run.folder.parent) as place:
            other = run.copied(Path(place), "damaged")
            kinds[kind](max(other.checkpoints.glob("step-*")) / name, draw)
            before = contents(other.folder)
            what = f"{name}, {kind}"
            strict = other.pretrain("--strict").complaint(2, "step-00000014")
            if strict is None and contents(other.checkpoints) != _below(before, "checkpoints"):
                strict = "the checkpoints were changed"
            yield "--strict refuses a damaged newest checkpoint", strict and f"{what}: {strict}"
            ended = other.pretrain()
            complaint = ended.complaint(0)
            if complaint is None and "step-00000014" not in ended.out + ended.err:
                complaint = "nothing was said"
            if complaint is None and other.result() != whole:
                complaint = "other bytes than the uninterrupted run"
            yield "continued from an older checkpoint to the same bytes", complaint and f"{what}: {complaint}"
    for _ in range(max(trials // 10, 1)):
        with tempfile.TemporaryDirectory(dir=run.folder.parent) as place:
            other = run.copied(Path(place), "damaged")
            for folder in other.checkpoints.glob("step-*"):
                _delete(folder / draw.choice(files(run)), draw)
            before = contents(other.checkpoints)
            complaint = other.pretrain().complaint(2, "step-00000014")
            if complaint is None and contents(other.checkpoints) != before:
                complaint = "the checkpoints were changed"
            yield "refused when no checkpoint is sound", complaint
    for name in files(run):
        with tempfile.TemporaryDirectory(dir=run.folder.parent) as place:
            other = run.copied(Path(place), "linked")
            _link_outside(max(other.checkpoints.glob("step-*")) / name, draw)
            yield "refused with a link out of the run folder", other.pretrain().complaint(2, name, "leads out")


def _below(tree: dict[str, bytes], folder: str) -> dict[str, bytes]:
    prefix = f"{folder}/"
    return {name.removeprefix(prefix): content for name, content in tree.items() if name.startswith(prefix)}


GONE: dict[str, Damage] = {
    "cut short": IN_PLACE["cut short"],
    "emptied": REPLACED["emptied"],
    "deleted": _delete,
    "a folder": _folder,
}
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def damaged_models(run: TinyRun, draw: Random, every: int = 1) -> Iterator[Outcome]:
    """`export` of damaged checkpoints, `evaluate` with a damaged model/: one line. Every `every`-th of them."""
    for name, (kind, damage) in list(product(files(run), (IN_PLACE | GONE).items()))[::every]:
        with tempfile.TemporaryDirectory(dir=run.folder.parent) as place:
            other = run.copied(Path(place), "damaged")
            damage(max(other.checkpoints.glob("step-*")) / name, draw)
            complaint = relora("export", other.folder, "--checkpoint", 14).complaint(2, "step-00000014")
            if complaint is None and (other.folder / "model-14").exists():
                complaint = "a model was written"
            yield "export of a damaged checkpoint", complaint and f"{name}, {kind}: {complaint}"
    for name, (kind, damage) in list(product(MODEL_FILES, GONE.items()))[::every]:
        if (name, kind) == ("tokenizer_config.json", "deleted"):
            continue  # a tokenizer can do without
        with tempfile.TemporaryDirectory(dir=run.folder.parent) as place:
            model = Path(shutil.copytree(run.folder / "model", Path(place) / "model"))
            damage(model / name, draw)
            complaint = relora("evaluate", model, "--data", DATA / "validation", "--tokens", 100).complaint(2)
            yield "evaluate with a damaged model/", complaint and f"{name}, {kind}: {complaint}"


# The other files of a run folder


def _binary(content: bytearray, draw: Random) -> bytes:
    return draw.randbytes(len(content))


RECORD_DAMAGE: dict[str, Damage] = {
    "torn": _in_place(_cut),
    "emptied": REPLACED["emptied"],
    "missing": _delete,
    "binary": _in_place(_binary),
}
RECORDS = ("metrics.jsonl", "restarts.jsonl", "config.yaml", "environment.json", "tokenizer/tokenizer.json")


def damaged_records(run: TinyRun, draw: Random, every: int = 1) -> Iterator[Outcome]:
    """The run goes on to the same bytes, with a word where figures are lost, or is refused in one line; so is every
    verb that reads a run folder. Every `every`-th case.
    """
    whole = run.result()
    cases = product(RECORDS, RECORD_DAMAGE.items(), ("pretrain", "report", "export"))
    for name, (kind, damage), verb in list(cases)[::every]:
        with tempfile.TemporaryDirectory(dir=run.folder.parent) as place:
            other = run.copied(Path(place), "damaged")
            shutil.rmtree(max(other.checkpoints.glob("step-*")))  # two steps are still to do
            damage(other.folder / name, draw)
            complaint = _record_complaint(other, verb, whole, name)
            yield f"{verb} with a damaged {name}", complaint and f"{kind}: {complaint}"


def _record_complaint(run: TinyRun, verb: str, whole: dict[str, object], damaged: str) -> str | None:
    before = contents(run.checkpoints)
    ended = run.pretrain() if verb == "pretrain" else relora(verb, run.folder)
    if verb != "pretrain":
        return ended.complaint(ended.status and 2, *([str(run.folder)] if ended.status else []))
    if ended.status and contents(run.checkpoints) == before:
        return ended.complaint(2, str(run.folder))
    if ended.status not in (0, 2):
        return ended.complaint(0)
    result = run.result()
    wrong = [name for name, value in whole.items() if result.get(name) != value]
    if wrong == [damaged] and damaged in ended.out:
        return None  # its lines are lost, and that was said
    return f"not as in the uninterrupted run, or nothing said: {wrong} {ended}" if wrong else None
