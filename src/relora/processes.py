"""Calls in processes of their own: the one launcher of training runs, probes and everything else that needs a process.

    call 0  ->  process  ->  result 0
    call 1  ->  process  ->  result 1        at most `jobs` processes at a time

A process of its own gives a call its own peak memory, lets several calls share the cores, and keeps the other calls
alive when the system kills one of them.

- The processes together use as many threads as PyTorch uses in the caller.
- SIGINT and SIGTERM in the caller stop the processes by SIGTERM, at which a training run writes a checkpoint.
- A process whose parent has died gets SIGTERM, too, so no process is left behind.
- What a process prints on standard output goes to standard error: standard output belongs to the caller.

The price is the start of a Python process that imports PyTorch, a second or two for each call. Processes are spawned,
not forked, so a script that starts some needs the usual `if __name__ == "__main__":`.
"""

import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, Generic, TypeVar

import torch

from relora.errors import Interrupted, ReloraError, RunStopped

Result = TypeVar("Result")

RUNS_STOPPED = "stopped, its runs with a checkpoint; the same command continues"
"""Value of `when_stopped` for calls that are training runs."""
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_THREADS_VARIABLE = "OMP_NUM_THREADS"
_PAUSE_SECONDS = 1.0
"""Time after which a supply that had no call is asked again."""


class _NoMore:
    """Type of the mark that no more calls are given."""


_NO_MORE = _NoMore()


@dataclass(frozen=True)
class Call(Generic[Result]):
    """A function call that gets a process of its own. Function, arguments and result must be picklable."""

    label: str
    """Beginning of the error message if the process dies, for example the run folder."""
    function: Callable[..., Result]
    arguments: tuple[Any, ...] = ()


class OutOfMemory(RunStopped):
    """A signal killed a process, as the system does when memory runs out, or an allocation in it failed."""


def run_in_processes(
    calls: Sequence[Call[Result]],
    *,
    jobs: int = 1,
    on_result: Callable[[int, Result], None] | None = None,
    when_stopped: str = "stopped",
) -> list[Result]:
    """Make every call in a process of its own, `jobs` at a time, and return the results in the order of the calls.

    Args:
        on_result: called with the index and the result of each call as soon as it ends.
        when_stopped: second half of the message of `Interrupted`, after the name of the signal.

    Raises:
        ReloraError: the first one that a call raised, of the same class, with the same message and exit status. The
            other processes are stopped by SIGTERM before it is raised; so they are in the two cases below.
        OutOfMemory: a process was killed by a signal or had no memory left.
        RunStopped: a process ended in any other way without a result, for example by an exception that is not a
            `ReloraError`, whose traceback is then on standard error.
        Interrupted: SIGINT or SIGTERM arrived. Signals are handled in the main thread only.
    """
    results: dict[int, Result] = {}

    def note(index: int, outcome: Result | ReloraError) -> None:
        if isinstance(outcome, ReloraError):
            raise outcome
        results[index] = outcome
        if on_result is not None:
            on_result(index, outcome)

    serve_calls(iter(calls), note, jobs=jobs, when_stopped=when_stopped)
    return [results[index] for index in range(len(calls))]


def serve_calls(
    calls: Iterator[Call[Result] | None],
    on_end: Callable[[int, Result | ReloraError], None],
    *,
    jobs: int = 1,
    seconds: float = math.inf,
    when_stopped: str = "stopped",
) -> bool:
    """Make calls in processes of their own, `jobs` at a time, as they are given, until there are no more.

    Args:
        calls: gives a call whenever a process is free; None if there is none yet: it is asked again a little later.
        on_end: called with the number of each call that was given, from 0 on, and its result, or with the error that it
            ended with (see `run_in_processes`). An exception that it raises stops the other processes.
        seconds: time after which all processes are stopped by SIGTERM.
        when_stopped: second half of the message of `Interrupted`, after the name of the signal.

    Returns:
        Whether all calls have ended; False if the time was over first.

    Raises:
        Interrupted: SIGINT or SIGTERM arrived; the processes were stopped.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be 1 or more, not {jobs}")
    running: dict[Connection, tuple[int, Call[Result], BaseProcess]] = {}
    given, more, end = 0, True, time.monotonic() + seconds
    with _shared_threads(jobs), _stop_signals() as signals:
        try:
            while time.monotonic() < end:
                while more and len(running) < jobs:
                    call = next(calls, _NO_MORE)
                    if call is None:
                        break
                    if isinstance(call, _NoMore):
                        more = False
                        break
                    pipe, process = _start(call)
                    running[pipe] = given, call, process
                    given += 1
                if not (more or running):
                    return True
                pause = _PAUSE_SECONDS if more and len(running) < jobs else math.inf
                pause = min(pause, end - time.monotonic())
                ready = wait([*running, signals], None if pause == math.inf else max(pause, 0.0))
                if signals in ready:
                    number = signals.recv()
                    raise Interrupted(f"{signal.Signals(number).name}: {when_stopped}", number)
                for pipe in [pipe for pipe in running if pipe in ready]:
                    index, call, process = running.pop(pipe)
                    on_end(index, _outcome_of(pipe, process, call.label))
        finally:
            for _, _, process in running.values():
                process.terminate()  # SIGTERM: a training run writes a checkpoint and ends
            for _, _, process in running.values():
                process.join()
    return False


def _start(call: Call[Result]) -> tuple[Connection, BaseProcess]:
    """Start the process of a call; returns the pipe on which its answer arrives, and the process."""
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(call, sender))
    process.start()
    sender.close()  # the process now has the only copy, so the pipe closes when the process ends
    return receiver, process


def _outcome_of(pipe: Connection, process: BaseProcess, label: str) -> Any:
    """Receive the result of a call whose process answered or ended, or the error that call or process ended with."""
    result: Any = None
    error: ReloraError | None = None
    answered = False
    with suppress(EOFError, OSError):  # the process ended before or while it answered
        result, error = pipe.recv()
        answered = True
    process.join()
    pipe.close()
    status = process.exitcode
    if isinstance(error, OutOfMemory) or (not answered and status is not None and status < 0):
        return OutOfMemory(f"{label}: its process ended with status {status}, as by a lack of memory")
    if not answered:
        return RunStopped(f"{label}: its process ended with status {status}, see above")
    return result if error is None else error


def _answer(call: Call[Result], pipe: Connection) -> None:
    """Make a call in this process, which was started for it, and send (result, error) through the pipe."""
    os.setsid()  # Ctrl-C at the terminal reaches the caller alone, which stops its processes
    sys.stdout = sys.stderr
    threading.Thread(target=_end_with_parent, daemon=True).start()
    answer: tuple[Result | None, ReloraError | None]
    try:
        answer = call.function(*call.arguments), None
    except ReloraError as error:
        answer = None, error
    except (MemoryError, RuntimeError) as error:
        if not _is_failed_allocation(error):
            raise
        traceback.print_exc()
        answer = None, OutOfMemory(str(error))
    with suppress(BrokenPipeError):  # the caller was killed
        pipe.send(answer)
    if isinstance(answer[1], OutOfMemory):
        sys.exit(1)


def _is_failed_allocation(error: Exception) -> bool:
    """Whether an allocation failed: torch raises a class of its own on a GPU, a plain RuntimeError on a CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return type(error) is RuntimeError and "allocate memory" in str(error)


def _end_with_parent() -> None:
    """Wait for the parent process to end, then send SIGTERM to this process."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _shared_threads(jobs: int) -> Iterator[None]:
    """Give each process that is started inside the block its share of the caller's threads."""
    before = os.environ.get(_THREADS_VARIABLE)
    os.environ[_THREADS_VARIABLE] = str(max(1, torch.get_num_threads() // jobs))
    try:
        yield
    finally:
        if before is None:
            del os.environ[_THREADS_VARIABLE]
        else:
            os.environ[_THREADS_VARIABLE] = before


@contextmanager
def _stop_signals() -> Iterator[Connection]:
    """Turn SIGINT and SIGTERM inside the block into numbers that arrive on the pipe that is yielded.

    An exception from the signal handler could come between the start of a process and the note of it.
    """
    receiver, sender = get_context("spawn").Pipe(duplex=False)

    def forward(number: int, frame: FrameType | None) -> None:
        sender.send(number)

    in_main_thread = threading.current_thread() is threading.main_thread()
    handled = _STOP_SIGNALS if in_main_thread else ()
    before = {number: signal.signal(number, forward) for number in handled}
    try:
        yield receiver
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        receiver.close()
        sender.close()
