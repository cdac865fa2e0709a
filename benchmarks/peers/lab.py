"""Runs as processes that can be killed, and what is known of one peer: its undisturbed run and the table so far."""

import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peer import BEGIN, UNDISTURBED, Case, Peer

TIMEOUT = 180.0
"""Seconds after which a run counts as hung."""


class Run:
    """One process that trains in `folder`; its words go to a log beside it."""

    def __init__(self, peer: Peer, folder: Path, case: Case) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True, parents=True)
        self.log = folder.with_name(folder.name + ".log")
        self.log.write_text("")
        self.status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            self._child(peer, case)

    def _child(self, peer: Peer, case: Case) -> None:
        """Never returns: the status is that of a Python script which did the same."""
        status = 1
        try:
            words = os.open(self.log, os.O_WRONLY | os.O_APPEND)
            os.dup2(words, 1)
            os.dup2(words, 2)
            sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            peer.train(self.folder, case)
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    @property
    def over(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is not None

    def until(self, happens: Callable[[], bool]) -> None:
        """Wait for something, or the end, or the time."""
        end = time.monotonic() + TIMEOUT
        while not happens() and not self.over and time.monotonic() < end:
            time.sleep(0.0003)

    def begun(self) -> None:
        """Wait for the training loop."""
        self.until(lambda: BEGIN in self.log.read_text(errors="replace"))

    def send(self, which: signal.Signals) -> None:
        if not self.over:
            os.kill(self.pid, which)

    def finish(self) -> int | None:
        """Exit status (negative: the signal), or None where it hung and was killed."""
        self.until(lambda: False)
        if self.over:
            return self.status
        self.send(signal.SIGKILL)
        os.waitpid(self.pid, 0)
        return None

    @property
    def why(self) -> str:
        """The last line of the log, without the paths in it."""
        if self.status is not None and self.status < 0:
            return f"killed by signal {-self.status}"
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return (lines[-1] if lines else "").split("/")[0][:90]


@dataclass
class Lab:
    """A peer, its undisturbed run, and what the trials have shown."""

    peer: Peer
    work: Path
    draw: random.Random
    goal: dict[str, torch.Tensor] = field(default_factory=dict)
    """Weights at the end of the undisturbed run."""
    train_seconds: float = 0.0
    save_seconds: float = 0.0
    rows: list[tuple[str, int, str]] = field(default_factory=list)
    """Fault, trials, outcomes."""
    reasons: Counter[str] = field(default_factory=Counter)
    trials: int = 0

    def fresh(self, source: Path | None = None) -> Path:
        """A new run folder, empty or a copy."""
        self.trials += 1
        folder = self.work / f"run-{self.trials}"
        if source is not None:
            shutil.copytree(source, folder)
        return folder

    def go(self, folder: Path, case: Case = UNDISTURBED) -> Run:
        """Train to the end and wait for it."""
        run = Run(self.peer, folder, case)
        run.finish()
        return run

    def resume(self, folder: Path, fault: str) -> str:
        """Train to the end, which ought to give the undisturbed weights: what became of it."""
        run = self.go(folder)
        if run.status is None:
            return "hung"
        if run.status != 0:
            self.reasons[f"{fault}: {run.why}"] += 1
            return "not resumed"
        gap = self.distance(folder)
        return "bit-equal" if gap == 0 else "no error, within 1e-6" if gap <= 1e-6 else "no error, ANOTHER RESULT"

    def distance(self, folder: Path) -> float:
        """Largest difference from the undisturbed weights; NaN counts as infinite, 0.0 means equal bits."""
        ours = self.peer.weights(folder)
        if ours.keys() != self.goal.keys():
            return float("inf")
        if all(torch.equal(ours[name].view(torch.uint8), self.goal[name].view(torch.uint8)) for name in ours):
            return 0.0
        gap = max((ours[name].double() - self.goal[name].double()).abs().max().item() for name in ours)
        return gap if gap == gap else float("inf")

    def report(self, fault: str, outcomes: list[str]) -> None:
        """One row of the table; the folders of its trials are removed."""
        self.rows.append((fault, len(outcomes), tally(outcomes)))
        print(f"{time.strftime('%H:%M:%S')} {fault}: {tally(outcomes)}", file=sys.stderr, flush=True)
        for folder in self.work.glob("run-*"):
            shutil.rmtree(folder) if folder.is_dir() else folder.unlink()


def tally(outcomes: list[str]) -> str:
    """How often what, the most frequent first; without figures where nothing happened twice."""
    counts = Counter(outcomes).most_common()
    return "; ".join(f"{count} {what}" if len(counts) < len(outcomes) else what for what, count in counts)
