"""The group of processes that train one model together; alone, every method does nothing and costs nothing.

Two ways lead from process to process. Sums of tensors go through torch's process group, whose operations fail if a
process does not answer within `timeout_seconds`. Meetings and JSON values go through the store, and wait for as long
as the others are alive: rank 0 may take its time to write a model. Nothing is pickled.

A mistake of the user is said once, by rank 0. A process that is lost is named, by the lowest rank that is left:

    ranks raise the same error     rank 0 says it
    one rank raises an error       it says it, with its number; the others find that in the store, and end silently
    one rank ends without a word   its heart stands still
"""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from relora.distributed.heart import Heart, Watch, beats, described, silent_ranks
from relora.distributed.launch import JOIN_SECONDS, Place, is_spoken_for, open_store, place_of
from relora.errors import PeerFailed, ReloraError, RunStopped, UserError

DEFAULT_TIMEOUT_SECONDS = 120.0
_POLL_SECONDS = 0.02
_SAME_LINE_SECONDS = 5.0
"""Longest wait of a failing rank for rank 0 to say the same line. In training rank 0 learns of it by this one's end."""
_STAGE_SECONDS = 60.0
"""The same in a stage, at whose end rank 0 learns of it."""
_LEAVE_SECONDS = 10.0
"""Longest wait of rank 0 at the end for the others to leave: it holds the store."""
_HEART_CHECK_SECONDS = 1.0
"""Pause between two looks at the beats of the others."""


class Group:
    """One process: there is nobody to talk to. `Processes` is the group of several."""

    rank = 0
    world = 1
    local_rank = 0
    local_world = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes, prints and speaks for all."""
        return self.rank == 0

    def connect(self, device: torch.device, timeout_seconds: float) -> None:
        """Open torch's process group for sums of tensors on this device."""

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over all ranks, and return it."""
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Return the JSON values of all ranks, by rank."""
        return [value]

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's JSON value; that of other ranks is not looked at."""
        return value

    def meet(self, what: str) -> None:
        """Wait for all ranks, as long as they are alive; `what` says in an error where they were to meet."""

    def completed(self) -> None:
        """Note that this rank has come through one more operation with the others, for the name of one that is late."""

    def post(self, key: str, value: Any) -> None:
        """Put a JSON value where `fetch` finds it on every rank; also from another thread."""

    def fetch(self, key: str) -> Any:
        """Return what some rank has put there, without waiting for it; None if nothing is there."""
        return None

    def lost(self) -> str | None:
        """Describe a rank that has ended or answers no more; None while all are alive. Also from another thread."""
        return None

    @contextmanager
    def stage(self, what: str) -> Iterator[None]:
        """Let all ranks pass the block or none: they meet at its end, and an error of one ends all."""
        yield

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """Turn the failure of an operation of torch's process group into an error that names the rank at fault."""
        yield

    def settled(self, error: ReloraError) -> ReloraError:
        """Return the error to end with: the given one if this rank is to say it, else one that is silent."""
        return error

    def close(self) -> None:
        """Leave the group."""


class Processes(Group):
    """Several processes under a launcher."""

    def __init__(self, place: Place) -> None:
        """Join the processes of the launch.

        Raises:
            RunStopped: the others did not appear in time.
        """
        self.rank, self.world = place.rank, place.world
        self.local_rank, self.local_world = place.local_rank, place.local_world
        self.timeout_seconds = DEFAULT_TIMEOUT_SECONDS
        self._meetings = 0
        self._told: ReloraError | None = None
        self._gone: set[int] = set()
        self._is_connected = False
        self._store: Store = PrefixStore(str(next(_joins)), open_store(place))
        # connections of their own, so that none waits behind an operation of another thread
        self._posts: Store = self._store.clone()  # type: ignore[attr-defined]
        self._watch = Watch(self._posts, self.world, self.rank)
        self._heart = Heart(self._store.clone(), self.rank)  # type: ignore[attr-defined]
        self._heart.start()
        if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:  # since a rank of the last group was lost
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._find_all()

    def _find_all(self) -> None:
        """Wait until all ranks have joined; raise `RunStopped`, which names those that have not, after a while."""
        here = [f"here/{rank}" for rank in range(self.world)]
        self._store.set(here[self.rank], "")
        deadline = time.monotonic() + JOIN_SECONDS
        while not self._store.check(here):
            if time.monotonic() > deadline:
                missing = [rank for rank, key in enumerate(here) if not self._store.check([key])]
                line = f"rank {', '.join(map(str, missing))} did not join within {JOIN_SECONDS} seconds"
                is_speaker = self.rank == min({*range(self.world)} - {*missing})
                raise RunStopped(line) if is_speaker else PeerFailed(line, RunStopped.exit_status)
            time.sleep(_POLL_SECONDS)

    def connect(self, device: torch.device, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        if self._is_connected:
            return
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if device.type not in ("cpu", "cuda"):
            raise UserError(f"device: {device.type} cannot be shared by several processes; set `device: cpu` or cuda")
        with self.guarded("the first connection"):
            dist.init_process_group(
                backend,
                store=PrefixStore("torch", self._store),
                rank=self.rank,
                world_size=self.world,
                timeout=timedelta(seconds=timeout_seconds),
                device_id=device if device.type == "cuda" else None,
            )
        self._is_connected = True

    def sum_(self, tensor: Tensor) -> Tensor:
        with self.guarded("a sum"):
            dist.all_reduce(tensor)
        self.completed()
        return tensor

    def completed(self) -> None:
        self._heart.done += 1

    def gather(self, value: Any) -> list[Any]:
        self._meetings += 1
        keys = [f"value/{self._meetings}/{rank}" for rank in range(self.world)]
        self._store.set(keys[self.rank], json.dumps(value))
        self._await(keys, "an exchange of values")
        return [json.loads(text) for text in self._store.multi_get(keys)]

    def broadcast(self, value: Any) -> Any:
        self._meetings += 1
        key = f"value/{self._meetings}/first"
        if self.is_first:
            self._store.set(key, json.dumps(value))
        self._await([key], "a value of rank 0")
        return json.loads(self._store.get(key))

    def meet(self, what: str) -> None:
        self._meetings += 1
        key = f"met/{self._meetings}"
        if self._store.add(key, 1) == self.world:
            self._store.set(f"{key}/all", "")
        self._await([f"{key}/all"], what)

    def post(self, key: str, value: Any) -> None:
        self._posts.set(f"post/{key}", json.dumps(value))

    def fetch(self, key: str) -> Any:
        key = f"post/{key}"
        return json.loads(self._posts.get(key)) if self._posts.check([key]) else None

    @contextmanager
    def stage(self, what: str) -> Iterator[None]:
        self._heart.is_armed = False  # its end is a meeting, at which every rank learns of a failure
        try:
            yield
        except ReloraError as error:
            raise self._settled(error, _STAGE_SECONDS) from None
        self.meet(what)
        self._heart.is_armed = True

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise self._lost(what, error) from None

    def settled(self, error: ReloraError) -> ReloraError:
        return self._settled(error, _SAME_LINE_SECONDS)

    def close(self) -> None:
        self._heart.is_armed = False
        self._disconnect()
        with suppress(RuntimeError):
            self._store.add("left", 1)
            deadline = time.monotonic() + _LEAVE_SECONDS
            here = self.world - len(self._gone)
            while self.is_first and self._store.add("left", 0) < here and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)  # the store ends with this process, and others may still read from it
        self._heart.stop()

    def _disconnect(self) -> None:
        """Close torch's process group, so that others who wait for this rank in a sum learn that it ends."""
        if self._is_connected:
            self._is_connected = False
            with suppress(RuntimeError):
                dist.destroy_process_group()

    def _settled(self, error: ReloraError, seconds: float) -> ReloraError:
        """Tell the other ranks why this one ends; return the error to end with.

        Args:
            seconds: longest wait for rank 0 to end, too. If it ends with the same line, it says it for both.
        """
        if error is self._told:
            return error
        self._heart.is_armed = False
        line, status = str(error), error.exit_status
        with suppress(RuntimeError):
            if isinstance(error, PeerFailed):
                self._store.set(f"silent/{self.rank}", "")
            else:
                self._store.set(f"failed/{self.rank}", json.dumps([line, status]))
                if self._store.add("failures", 1) == 1:
                    self._store.set("failed/first", str(self.rank))
                self._disconnect()
                if not self.is_first:
                    said = self._said_by_first(seconds)
                    error = PeerFailed(line, status) if said == line else _error_of(f"rank {self.rank}: {line}", status)
        self._told = error
        return error

    def _said_by_first(self, seconds: float) -> str | None:
        """Wait for rank 0 to end, and return its line; None if it has none of its own, or does not end."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._store.check(["silent/0"]):
            if self._store.check(["failed/0"]):
                line: str = json.loads(self._store.get("failed/0"))[0]
                return line
            time.sleep(_POLL_SECONDS)
        return None

    def _await(self, keys: list[str], what: str) -> None:
        """Wait until all keys are in the store; raise if a rank has failed, or is alive no more."""
        watch = Watch(self._store, self.world, self.rank)
        pause = max(_HEART_CHECK_SECONDS, self.world / 16)  # so that many ranks do not overrun the store
        try:
            looked = time.monotonic()
            while not self._store.check(keys):
                # a rank that failed after this meeting was complete does not take its outcome from the others
                if (failure := self._failure()) is not None and not self._store.check(keys):
                    self._heart.is_armed = False
                    raise failure
                if time.monotonic() - looked > pause:
                    looked = time.monotonic()
                    if watch.silent(self.timeout_seconds):
                        raise self._lost(what, None)
                time.sleep(_POLL_SECONDS)
        except RuntimeError as error:
            raise self._lost(what, error) from None
        self.completed()

    def _failure(self) -> ReloraError | None:
        """Return the error of the rank that failed first, and has said why, as this rank ends with it."""
        if not self._store.check(["failed/first"]):
            return None
        rank = int(self._store.get("failed/first"))
        line, status = json.loads(self._store.get(f"failed/{rank}"))
        return PeerFailed(f"rank {rank}: {line}", status)

    def _lost(self, what: str, error: Exception | None) -> ReloraError:
        """Find out why an operation with the others failed: the line of a rank that failed, or the name of a lost one.

        The lowest rank that is left says it.
        """
        if threading.current_thread() is threading.main_thread():
            self._heart.is_armed = False
            # the launcher ends all at once where one was lost, and the line is to be said before that
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with suppress(RuntimeError):
            if (failure := self._failure()) is not None:
                return failure
        silent = silent_ranks(self._store, self.world, self.rank)
        self._gone |= silent.keys()
        with suppress(RuntimeError):
            if (failure := self._failure()) is not None:
                return failure
        if silent:
            line = "; ".join(described(rank, beat) for rank, beat in sorted(silent.items()))
        else:
            done = {rank: beat.done for rank, beat in beats(self._store, self.world).items()}
            late = [rank for rank, count in done.items() if count == min(done.values())]
            if 0 < len(late) < self.world:
                line = (
                    f"rank {', '.join(map(str, late))} did not come to {what} within {self.timeout_seconds:g} seconds"
                )
            else:
                reason = str(error).splitlines()[0] if error else "no answer"
                line = f"rank {self.rank} lost the others in {what}: {reason}"
        speaker = min(set(range(self.world)) - silent.keys(), default=self.rank)
        line += "; the run continues from its last checkpoint by the same command"
        return RunStopped(line) if self.rank == speaker else PeerFailed(line, RunStopped.exit_status)


def _error_of(line: str, status: int) -> ReloraError:
    """Build the error with which this rank says the line of another one, or its own with its name."""
    error = ReloraError(line)
    error.exit_status = status
    return error


ALONE = Group()
_group: Processes | None = None
_joins = count()
"""Number of the next group that this process joins: they share the store."""


def current_group() -> Group:
    """Return the group of this process, which it joins at the first call by the launcher's variables; else `ALONE`.

    Raises:
        UserError: a variable of the launcher is missing or wrong; only rank 0 says so.
        RunStopped: the other processes did not appear in time.
    """
    global _group
    if _group is None:
        try:
            place = place_of(os.environ)
        except UserError as error:
            if is_spoken_for(os.environ):
                raise PeerFailed(str(error), error.exit_status) from None
            raise
        if place is None:
            return ALONE
        _group = Processes(place)
    return _group


@contextmanager
def together() -> Iterator[Group]:
    """Yield the group of this process; at the end all ranks leave it, and an error is said by one of them.

    Inside another such block it is the same group, and the outer block ends it.
    """
    global _group
    is_inner = _group is not None
    group = current_group()
    if group is ALONE or is_inner:
        yield group
        return
    try:
        yield group
        group.meet("the end")
    except ReloraError as error:
        raise group.settled(error) from None
    finally:
        group.close()
        _group = None
