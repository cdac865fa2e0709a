"""What befalls a run: one function a campaign, each adding its rows to the lab's table."""

import contextlib
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from lab import Lab, Run, tally
from peer import NAN_STEP, SAVE_EVERY, STEPS, UNDISTURBED, Case, number

STOPPED_AT = 20
"""The newest checkpoint of the run folder that corruption starts from; the one of step 15 lies beside it."""
AT_RANDOM, IN_SAVE, AT_FILE = "at a random time of training", "while it saves", "as the first file of state appears"
UNGUARDED = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def undisturbed(lab: Lab) -> None:
    """Three runs: the weights they end with, their time, and the time a save takes."""
    seconds, spans, folders = [], [], [lab.fresh() for _ in range(3)]
    for folder in folders:
        run = Run(lab.peer, folder, UNDISTURBED)
        run.begun()
        begin = time.monotonic()
        spans += watch_saves(lab, run)
        if run.finish() != 0:
            sys.exit(f"the undisturbed run failed: {run.log.read_text()[-3000:]}")
        seconds.append(time.monotonic() - begin)
    lab.train_seconds, lab.save_seconds = statistics.median(seconds), statistics.median(spans)
    lab.goal = lab.peer.weights(folders[0])
    same = [lab.distance(folder) == 0 for folder in folders]
    lab.report("none (is it reproducible?)", ["bit-equal" if equal else "ANOTHER RESULT" for equal in same])


def watch_saves(lab: Lab, run: Run) -> list[float]:
    """For every checkpoint of the run, the seconds from its folder's appearance to the last change of its state."""
    first: dict[str, float] = {}
    last: dict[str, tuple[float, object]] = {}
    while not run.over:
        for checkpoint in lab.peer.checkpoints(run.folder)[-1:]:  # the older ones are only ever removed
            seen = sizes(checkpoint, lab.peer.state)
            first.setdefault(checkpoint.name, time.monotonic())
            if last.get(checkpoint.name, (0.0, None))[1] != seen:
                last[checkpoint.name] = (time.monotonic(), seen)
        time.sleep(0.0003)
    return [last[name][0] - first[name] for name in first]


def sizes(folder: Path, names: tuple[str, ...]) -> dict[str, int]:
    """Of those files that are there ("" is the folder itself)."""
    found = {}
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            found[name] = (folder / name).stat().st_size
    return found


def kills(lab: Lab, trials: int, aim: str, where: str = "") -> None:
    """SIGKILL at a random time of the training, of a save, or as the first state file appears; then resume."""
    fault = f"SIGKILL {aim}{where}"
    outcomes: list[str] = []
    while len(outcomes) < trials:
        folder = lab.fresh()
        run = Run(lab.peer, folder, UNDISTURBED)
        run.begun()
        if aim == AT_RANDOM:
            time.sleep(lab.draw.uniform(0, lab.train_seconds))
        else:
            step = lab.draw.randrange(SAVE_EVERY, STEPS, SAVE_EVERY)
            run.until(partial(appeared, lab, folder, step, lab.peer.state if aim == AT_FILE else ("",)))
            time.sleep(lab.draw.uniform(0, lab.save_seconds) if aim == IN_SAVE else 0)
        run.send(signal.SIGKILL)
        if run.finish() == 0:
            continue  # it was done before the blow: no trial
        outcomes.append(lab.resume(folder, fault))
    lab.report(fault, outcomes)


def appeared(lab: Lab, folder: Path, step: int, names: tuple[str, ...]) -> bool:
    """Whether one of these files of the checkpoint of a step is there."""
    return any(bool(sizes(path, names)) for path in lab.peer.checkpoints(folder) if number(path) == step)


def stopped(lab: Lab) -> Path:
    """A run folder, killed between two saves, whose newest checkpoint is the one of step STOPPED_AT."""
    while True:
        folder = lab.fresh()
        run = Run(lab.peer, folder, Case(pause=0.1))
        run.until(partial(appeared, lab, folder, STOPPED_AT, ("",)))
        time.sleep(0.25 + lab.save_seconds)
        run.send(signal.SIGKILL)
        run.finish()
        if number(lab.peer.checkpoints(folder)[-1]) == STOPPED_AT:
            return folder.rename(lab.work / "stopped")


def untouched(lab: Lab, template: Path) -> None:
    """The folder that the campaigns below start from is whole."""
    fault = f"SIGKILL between two saves (step {STOPPED_AT})"
    lab.report(fault, [lab.resume(lab.fresh(template), fault)])


def flip(sound: bytes, draw: random.Random) -> bytes:
    harmed = bytearray(sound)
    harmed[draw.randrange(len(sound))] ^= 1 << draw.randrange(8)
    return bytes(harmed)


def zero(sound: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(0, len(sound), 4096)
    page = sound[start : start + 4096]
    return sound[:start] + bytes(len(page)) + sound[start + len(page) :]


def cut(sound: bytes, draw: random.Random) -> bytes:
    return sound[: draw.randrange(len(sound))]


HARMS: dict[str, Callable[[bytes, random.Random], bytes]] = {"bit flip": flip, "zeroed page": zero, "truncation": cut}


def corruption(lab: Lab, template: Path, trials: int) -> None:
    """Harm the files of state of the newest checkpoint in turn, `trials` times in all; delete every file once."""
    names = sorted(path.name for path in lab.peer.checkpoints(template)[-1].iterdir())
    state, each = lab.peer.state, trials // len(HARMS)
    plan = [(kind, state[i % len(state)]) for kind in HARMS for i in range(each)]
    plan += [("deletion", name) for name in names]
    outcomes: list[tuple[str, str, str]] = []
    for kind, name in plan:
        folder = lab.fresh(template)
        path = lab.peer.checkpoints(folder)[-1] / name
        if kind == "deletion":
            path.unlink()
        else:
            sound = harmed = path.read_bytes()
            while harmed == sound:  # a page may have been zero before
                harmed = HARMS[kind](sound, lab.draw)
            path.write_bytes(harmed)
        outcomes.append((kind, name, lab.resume(folder, kind)))
        shutil.rmtree(folder)
    for kind in (*HARMS, "deletion"):
        lab.report(f"{kind} in the newest checkpoint", [what for of, _, what in outcomes if of == kind])
    for name in names:
        these = [what for _, of, what in outcomes if of == name]
        lab.rows.append((f"… of these in `{name}`", len(these), tally(these)))


def terminations(lab: Lab, trials: int, case: Case, fault: str) -> None:
    """SIGTERM at a random time: status, whether anything was saved after it, and what the resumed run gives."""
    seconds = lab.train_seconds + STEPS * case.pause
    outcomes: list[str] = []
    while len(outcomes) < trials:
        folder = lab.fresh()
        run = Run(lab.peer, folder, case)
        run.begun()
        time.sleep(lab.draw.uniform(0, 0.5 * seconds if case.signal_saves else seconds))
        sent = time.time()
        run.send(signal.SIGTERM)
        status = run.finish()
        if (folder / "final").exists():
            continue  # it was done before the signal: no trial
        saved = any(path.stat().st_mtime > sent for path in lab.peer.checkpoints(folder))
        words = "saved" if saved else "nothing saved"
        outcomes.append(f"status {status}, {words}, then {lab.resume(folder, fault)}")
    lab.report(fault, outcomes)


def not_a_number(lab: Lab) -> None:
    """One NaN loss: what the weights at the end are worth."""
    run = lab.go(lab.fresh(), Case(nan=True))
    outcome = f"status {run.status}: {run.why}"
    if run.status == 0:
        ended = lab.peer.weights(run.folder).values()
        bad = sum(not tensor.isfinite().all() for tensor in ended)
        outcome = f"status 0, {bad} of {len(ended)} trained tensors not finite at the end"
    lab.report(f"one NaN loss (step {NAN_STEP})", [outcome])


def hostile_pickles(lab: Lab, template: Path, unguarded: bool) -> None:
    """Every pickled file in turn replaced by one that runs code; `unguarded` takes torch's guard off."""
    outcomes = []
    for name in lab.peer.pickles:
        folder = lab.fresh(template)
        checkpoint, mark = lab.peer.checkpoints(folder)[-1], folder.with_suffix(".mark")
        torch.save(Payload(mark), checkpoint / name)
        if name == "adapter_model.bin":
            (checkpoint / "adapter_model.safetensors").unlink()
        if unguarded:
            os.environ[UNGUARDED] = "1"
        run = lab.go(folder)
        os.environ.pop(UNGUARDED, None)
        fate = "EXECUTED" if mark.exists() else "refused" if run.status else "not read"
        outcomes.append(f"`{name}` {fate}")
    lab.report(f"hostile pickle{f', {UNGUARDED}=1' if unguarded else ''}", outcomes)


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def full_disk(lab: Lab, template: Path, trials: int, temporary_too: bool) -> None:
    """Resume with less room than one checkpoint takes; make room and resume again; then remove what is torn.

    `temporary_too` puts the temporary folder on that disk, which is where a peer may write before it moves.
    """
    fault = f"disk full while it saves, TMPDIR on {'that' if temporary_too else 'another'} disk"
    need = sum(path.stat().st_size for path in lab.peer.checkpoints(template)[-1].iterdir())
    during, after, by_hand = [], [], []
    for i in range(trials):
        with small_disk(lab.fresh()) as folder, temporary_files_in(folder if temporary_too else lab.work):
            shutil.copytree(template, folder, dirs_exist_ok=True)
            ballast, disk = folder / "ballast", os.statvfs(folder)
            room = disk.f_bavail * disk.f_frsize
            ballast.write_bytes(bytes(room - int(need * (i + 0.5) / trials)))
            during.append(f"status {lab.go(folder).status}")
            ballast.unlink()
            after.append(lab.resume(folder, fault))
            if after[-1] != "bit-equal":
                for path in lab.peer.checkpoints(folder):
                    if number(path) > STOPPED_AT:
                        shutil.rmtree(path)
                by_hand.append(lab.resume(folder, f"{fault}, torn checkpoint removed"))
    lab.report(f"{fault}: the run", during)
    lab.report("… room made, resumed", after)
    if by_hand:
        lab.report("… and resumed again after a person removed the torn checkpoint", by_hand)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A tmpfs of 64 MB; the log of a run lies beside it. Raises CalledProcessError where mounting is not allowed."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def temporary_files_in(folder: Path) -> Iterator[None]:
    """TMPDIR of the runs; what killed ones left there is removed."""
    before = tempfile.gettempdir()
    with tempfile.TemporaryDirectory(dir=folder) as place:
        os.environ["TMPDIR"] = tempfile.tempdir = place
        try:
            yield
        finally:
            os.environ["TMPDIR"] = tempfile.tempdir = before
