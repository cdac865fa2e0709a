"""Hearts of a group: each process writes a beat into the store, and a beat that stands still names its rank.

A collective operation that fails, or that nobody answers, does not say which process is at fault. The beats do: one
that was killed, stopped or cut off writes none any more. A beat also says how far its process has come, so that one
which is alive but never arrives can be named as well.
"""

import json
import os
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from torch.distributed import Store  # type: ignore[attr-defined]

BEAT_SECONDS = 1.0
STILL_SECONDS = 3.5
"""A beat that has not changed for so long stands still."""
STUCK_SECONDS = 5.0
"""Time from the failure of another rank until this process ends if its main thread has not learnt of it by then."""


@dataclass(frozen=True)
class Beat:
    """The last beat of a process."""

    count: int
    done: int
    """Number of meetings and sums that the process has completed."""
    host: str
    process: int

    @property
    def is_gone(self) -> bool:
        """Whether the process has ended; known only of those on this machine."""
        return self.state in ("gone", "Z", "X")

    @property
    def state(self) -> str:
        """State of the process as Linux names it, `gone` if there is none, and empty on other machines."""
        if self.host != socket.gethostname():
            return ""
        try:
            stat = Path(f"/proc/{self.process}/stat").read_text(encoding="ascii", errors="replace")
            return stat.rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return "gone" if Path("/proc/self").is_dir() else ""
        except (OSError, IndexError):
            return ""


class Heart(threading.Thread):
    """Thread that writes the beat of this process; `done` counts what the process has completed with the others.

    It also ends the process where its main thread waits in vain for a rank that has failed. A rank that fails closes
    its connections, but not those that a sharded model holds, and gloo and NCCL cannot be called back from a collective
    operation. The failed rank says why; this one has nothing to add, and its files are safe from an end at any moment.
    """

    def __init__(self, store: Store, rank: int) -> None:
        super().__init__(daemon=True, name="heart")
        self._store, self._rank, self._ended = store, rank, threading.Event()
        self.done = 0
        self.is_armed = True
        """Whether this process is ended where another rank has failed; false while the main thread learns of it."""
        self._count = 0
        self._failed_at: float | None = None
        self._host = socket.gethostname()
        self._beat()

    def run(self) -> None:
        """Beat until `stop`, or until the store is gone."""
        while not self._ended.wait(BEAT_SECONDS):
            try:
                self._beat()
                self._end_if_stuck()
            except RuntimeError:  # the store's process has ended; the main thread finds out by itself
                return

    def stop(self) -> None:
        """Stop beating."""
        self._ended.set()

    def _end_if_stuck(self) -> None:
        """End the process if another rank failed a while ago and the main thread has not learnt of it."""
        if not self.is_armed or not self._store.check(["failed/first"]):
            return
        now, first = time.monotonic(), int(self._store.get("failed/first"))
        self._failed_at = self._failed_at or now
        if first != self._rank and now - self._failed_at >= STUCK_SECONDS:
            status = json.loads(self._store.get(f"failed/{first}"))[1]
            self._store.add("left", 1)
            os._exit(status)

    def _beat(self) -> None:
        self._count += 1
        self._store.set(f"beat/{self._rank}", json.dumps([self._count, self.done, self._host, os.getpid()]))


class Watch:
    """Observer of the beats of the other ranks: for how long each has stood still since the first look."""

    def __init__(self, store: Store, world: int, own: int) -> None:
        self._store, self._world, self._own = store, world, own
        self._seen: dict[int, tuple[Beat, float]] = {}

    def silent(self, seconds: float) -> dict[int, Beat]:
        """Look once; return the ranks that have ended, or else those whose beat stands still for `seconds`, by rank.

        Without an answer of the store rank 0 is silent: it holds the store.
        """
        now, found = time.monotonic(), beats(self._store, self._world)
        if not found:
            return {0: self._seen[0][0] if 0 in self._seen else Beat(0, 0, "", 0)}
        found.pop(self._own, None)
        for rank, beat in found.items():
            if rank not in self._seen or self._seen[rank][0].count != beat.count:
                self._seen[rank] = beat, now
        gone = {rank: beat for rank, beat in found.items() if beat.is_gone}
        return gone or {rank: beat for rank, (beat, since) in self._seen.items() if now - since >= seconds}


def beats(store: Store, world: int) -> dict[int, Beat]:
    """Read the beats of all ranks that have begun to beat; empty where the store does not answer."""
    try:
        keys = {rank: f"beat/{rank}" for rank in range(world)}
        if not store.check([*keys.values()]):
            keys = {rank: key for rank, key in keys.items() if store.check([key])}
        return {
            rank: Beat(*json.loads(text)) for rank, text in zip(keys, store.multi_get([*keys.values()]), strict=True)
        }
    except RuntimeError:
        return {}


def silent_ranks(store: Store, world: int, own: int) -> dict[int, Beat]:
    """Return the ranks that have ended, or whose beat stands still; that takes `STILL_SECONDS` to find out."""
    watch, deadline = Watch(store, world, own), time.monotonic() + STILL_SECONDS
    while not (silent := watch.silent(STILL_SECONDS - BEAT_SECONDS)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return silent


def described(rank: int, beat: Beat) -> str:
    """Describe a silent rank for a message."""
    where = f" (process {beat.process} on {beat.host})" if beat.process else ""
    if beat.is_gone:
        return f"rank {rank}{where} has ended without a word, as by a kill or a lack of memory"
    if beat.state == "T":
        return f"rank {rank}{where} has been stopped (SIGSTOP) and answers no more"
    return f"rank {rank}{where} does not answer any more"
