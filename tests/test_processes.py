"""Calls in processes of their own: results, errors and deaths come back, and nothing is left behind."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from relora.errors import Diverged, Interrupted, NonFinite, ReloraError, RunStopped, UserError
from relora.processes import Call, OutOfMemory, run_in_processes, serve_calls


def square(number: int) -> tuple[int, int, int]:
    print("printed in the process")
    return number**2, os.getpid(), torch.get_num_threads()


def fail(error: Exception) -> None:
    raise error


def allocate() -> None:
    torch.empty(2**58)


def wait_for_sigterm(folder: Path) -> None:
    """Write FOLDER/started, and FOLDER/stopped at SIGTERM."""

    def stop(*_: object) -> None:
        (folder / "stopped").touch()
        sys.exit()

    signal.signal(signal.SIGTERM, stop)
    (folder / "started").touch()
    while True:
        time.sleep(0.05)


def fail_after(file: Path) -> None:
    wait_until(file.exists)
    raise UserError("this call failed")


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_results_come_back_in_order(capfd: pytest.CaptureFixture[str]) -> None:
    """The caller is a thread other than the main one, where signals cannot be handled."""
    before = os.environ.get("OMP_NUM_THREADS")
    told: dict[int, int] = {}
    found: list[tuple[int, int, int]] = []

    def run() -> None:
        calls = [Call(f"call {number}", square, (number,)) for number in range(3)]
        found.extend(run_in_processes(calls, jobs=2, on_result=lambda index, result: told.update({index: result[0]})))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert [result for result, _, _ in found] == [0, 1, 4] and told == {0: 0, 1: 1, 2: 4}
    assert len({process for _, process, _ in found} | {os.getpid()}) == 4
    assert {threads for _, _, threads in found} == {max(1, torch.get_num_threads() // 2)}
    assert os.environ.get("OMP_NUM_THREADS") == before
    out, err = capfd.readouterr()
    assert out == "" and err.count("printed in the process") == 3


def test_no_calls_and_no_jobs() -> None:
    assert run_in_processes([]) == []
    with pytest.raises(ValueError, match="jobs"):
        run_in_processes([], jobs=0)


@pytest.mark.parametrize(
    "error",
    [
        UserError("lowrank.r: too large"),
        Diverged("loss is nan"),
        NonFinite("gradient is inf", loss=2.5, sequences=range(3, 5)),
        Interrupted("SIGTERM: stopped", signal.SIGTERM),
    ],
)
def test_an_error_comes_back_as_what_it_was(error: ReloraError) -> None:
    with pytest.raises(ReloraError) as found:
        run_in_processes([Call("the call", fail, (error,))])
    assert type(found.value) is type(error)
    assert (str(found.value), found.value.exit_status) == (str(error), error.exit_status)
    assert vars(found.value) == vars(error)


def test_a_process_that_is_killed_is_said_to_lack_memory() -> None:
    with pytest.raises(OutOfMemory, match="the call: its process ended with status -6, as by a lack of memory"):
        run_in_processes([Call("the call", os.abort)])


def test_an_allocation_that_fails_is_a_lack_of_memory(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OutOfMemory, match="the call: its process ended with status 1, as by a lack of memory"):
        run_in_processes([Call("the call", allocate)])
    assert "allocate memory" in capfd.readouterr().err


def test_another_error_leaves_its_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunStopped, match="the call: its process ended with status 1, see above") as found:
        run_in_processes([Call("the call", fail, (RuntimeError("a mistake in the code"),))])
    assert not isinstance(found.value, OutOfMemory)
    assert "RuntimeError: a mistake in the code" in capfd.readouterr().err


def test_an_error_stops_the_other_processes(tmp_path: Path) -> None:
    calls = [Call("one", wait_for_sigterm, (tmp_path,)), Call("other", fail_after, (tmp_path / "started",))]
    with pytest.raises(UserError, match="this call failed"):
        run_in_processes(calls, jobs=2)
    assert (tmp_path / "stopped").exists()


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_processes_end_with_their_parent(number: signal.Signals, status: int, tmp_path: Path) -> None:
    """A caller that is stopped waits for its processes; the processes of a caller that is killed stop by themselves."""
    source = f"""
        import sys
        from pathlib import Path
        from relora.errors import Interrupted
        from relora.processes import Call, run_in_processes
        from tests.test_processes import wait_for_sigterm

        if __name__ == "__main__":
            try:
                run_in_processes([Call("call", wait_for_sigterm, (Path({str(tmp_path)!r}),))], when_stopped="it ended")
            except Interrupted as error:
                print(error)
                sys.exit(error.exit_status)
    """
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(source))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as process:
        wait_until((tmp_path / "started").exists)
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == status
    assert out == ("" if number == signal.SIGKILL else f"{number.name}: it ended\n")
    wait_until((tmp_path / "stopped").exists)


def test_calls_come_as_earlier_ones_end() -> None:
    """A supply that has nothing yet is asked again; an error is an outcome, and the others go on."""
    ended: dict[int, object] = {}

    def supply() -> Iterator[Call[None] | None]:
        yield Call("first", fail, (UserError("wrong"),))
        while not ended:
            yield None
        yield Call("second", fail, (RunStopped("stopped"),))

    assert serve_calls(supply(), ended.__setitem__, jobs=2)
    assert [(index, type(outcome), str(outcome)) for index, outcome in ended.items()] == [
        (0, UserError, "wrong"),
        (1, RunStopped, "stopped"),
    ]


def test_processes_are_stopped_when_the_time_is_over(tmp_path: Path) -> None:
    def supply() -> Iterator[Call[None] | None]:
        yield Call("endless", wait_for_sigterm, (tmp_path,))
        while True:
            yield None

    assert not serve_calls(supply(), lambda index, outcome: None, jobs=2, seconds=20)
    assert (tmp_path / "stopped").exists() or not (tmp_path / "started").exists()
