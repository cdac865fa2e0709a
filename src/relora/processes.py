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

import os
import signal
import sys
import threading
import traceback
from collections import deque
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
    if jobs < 1:
        raise ValueError(f"jobs must be 1 or more, not {jobs}")
    waiting = deque(enumerate(calls))
    running: dict[Connection, tuple[int, BaseProcess]] = {}
    results: dict[int, Result] = {}
    with _shared_threads(jobs), _stop_signals() as signals:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    index, call = waiting.popleft()
                    pipe, process = _start(call)
                    running[pipe] = index, process
                ready = wait([*running, signals])
                if signals in ready:
                    number = signals.recv()
                    raise Interrupted(f"{signal.Signals(number).name}: {when_stopped}", number)
                for pipe in [pipe for pipe in running if pipe in ready]:
                    index, process = running.pop(pipe)
                    results[index] = _result_of(pipe, process, calls[index].label)
                    if on_result is not None:
                        on_result(index, results[index])
        finally:
            for _, process in running.values():
                process.terminate()  # SIGTERM: a training run writes a checkpoint and ends
            for _, process in running.values():
                process.join()
    return [results[index] for index in range(len(calls))]


def _start(call: Call[Result]) -> tuple[Connection, BaseProcess]:
    """Start the process of a call; returns the pipe on which its answer arrives, and the process."""
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(call, sender))
    process.start()
    sender.close()  # the process now has the only copy, so the pipe closes when the process ends
    return receiver, process


def _result_of(pipe: Connection, process: BaseProcess, label: str) -> Any:
    """Receive the result of a call whose process answered or ended; raise what the call or the process ended with."""
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
        raise OutOfMemory(f"{label}: its process ended with status {status}, as by a lack of memory")
    if not answered:
        raise RunStopped(f"{label}: its process ended with status {status}, see above")
    if error is not None:
        raise error
    return result


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
