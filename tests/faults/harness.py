"""Ends real runs of `relora` at chosen moments, continues them, and compares them with runs that were left alone.

    with Server() as server:
        ended = server.relora("pretrain", config, watch=run_folder, blows=[Blow(call="relora.train.loop:restart")])

One server process imports torch and relora once and forks a child for every command, so that a command costs no
start-up. Nothing in relora knows of this: the child wraps the function that a `Blow` names, or counts the events of
the file system under the watched folder (audit hooks and the few calls that raise none), and signals itself there.
From the background thread as from the main one: the kernel does not ask which thread dies.
"""

import builtins
import gc
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from tests.paths import ROOT

HANG_SECONDS = 240
"""A child that takes longer has hung; it is ended by SIGALRM, which no test takes for a success."""
TIMINGS = {"tokens_per_second", "step_seconds", "seconds", "peak_memory_bytes"}
"""What differs between two runs of the same numbers."""
WARM = (
    "relora.cli",
    "relora.data.pretraining.prepare",
    "relora.recipes.pretrain",
    "torch._dynamo",  # what an optimizer imports at its first step
    "transformers.models.llama.modeling_llama",
    "transformers.generation.utils",
    "plotly.graph_objects",
)
"""Imported by the server, so that no child has to."""


@dataclass(frozen=True, kw_only=True)
class Blow:
    """A signal and the moment it falls: at a call, at an event of the file system, or after a time."""

    call: str = ""
    """`module:qualified.name` of the function, as the code that calls it finds it."""
    after: bool = False
    """When that call has returned; else before it begins."""
    event: str = ""
    """A regular expression: searched in events such as `rename checkpoints/.step-00000005.partial`."""
    seconds: float = 0.0
    """Without `call` and `event`: this long after the start."""
    nth: int = 1
    """The how-manieth such call or event."""
    cut: str = ""
    """This file of the watched folder first loses half of its last line: what a kill inside a write leaves."""
    signal: int = signal.SIGKILL


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    """The exit status, or minus the signal."""
    printed: str
    """stdout and stderr."""
    events: tuple[str, ...]
    """What happened to the watched folder, in order."""
    seconds: float
    """It took."""
    seconds_after_blow: float
    """From the last timed blow to the end."""

    @property
    def killed(self) -> bool:
        """By SIGKILL."""
        return self.status == -signal.SIGKILL

    @property
    def shell_status(self) -> int:
        """What a shell or a scheduler sees: 128 + the number for a process that died of a signal."""
        return self.status if self.status >= 0 else 128 - self.status


class Server:
    """The process that forks. `folder` holds what the children print; nothing of it is kept."""

    def __init__(self, folder: Path) -> None:
        self._printed, self._events = folder / "printed.txt", folder / "events.txt"

    def __enter__(self) -> Self:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.faults.harness"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._process:  # closes its stdin, which ends it
            pass

    def relora(
        self, *arguments: object, watch: Path, blows: Sequence[Blow] = (), dials: dict[str, int] | None = None
    ) -> Ended:
        """Run `relora ARGUMENTS...` in a child.

        Args:
            watch: the folder whose events count.
            blows: what befalls the child.
            dials: `module:NAME` -> value of a constant, e.g. to get many shards from little text.
        """
        request = {
            "arguments": [str(argument) for argument in arguments],
            "watch": str(watch.absolute()),
            "blows": [asdict(blow) for blow in blows],
            "dials": dials or {},
            "printed": str(self._printed),
            "events": str(self._events),
        }
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        if not (line := self._process.stdout.readline()):
            raise RuntimeError("the server has ended; what it said stands above")
        answer = json.loads(line)
        events = tuple(self._events.read_text(encoding="utf-8").splitlines())
        return Ended(printed=self._printed.read_text(encoding="utf-8"), events=events, **answer)


def outcome_of(folder: Path) -> dict[str, object]:
    """All of a finished run that must not depend on how often it was interrupted.

    Left out: times and memory, what describes the machine, and how many older checkpoints are kept.
    """
    files = files_of(folder)
    newest = max(name for name in files if name.startswith("checkpoints/step-")).rpartition("/")[0]
    outcome: dict[str, object] = {"files": sorted(name for name in files if not name.startswith("checkpoints/step-"))}
    for name, content in files.items():
        if name.endswith(".jsonl"):
            lines = map(json.loads, content.splitlines())
            outcome[name] = [{key: line[key] for key in line.keys() - TIMINGS} for line in lines]
        elif name == f"{newest}/state.json":
            state = json.loads(content)
            outcome[name] = {key: state[key] for key in state.keys() - {"positions"}}  # lengths of lines with times
        elif name.startswith(("model/", "samples", "tokenizer/")) or name in _tensor_files(newest, files):
            outcome[name] = content
    return outcome


def _tensor_files(checkpoint: str, files: Iterable[str]) -> set[str]:
    return {name for name in files if name.startswith(f"{checkpoint}/") and name.endswith(".safetensors")}


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def difference(expected: Mapping[str, object], found: Mapping[str, object]) -> str:
    """What the first difference is; nothing if there is none."""
    for name in (*expected, *(found.keys() - expected.keys())):
        here, there = expected.get(name), found.get(name)
        if here != there:
            if isinstance(here, list) and isinstance(there, list):
                pairs = enumerate(zip_longest(here, there), start=1)
                number, (one, other) = next(pair for pair in pairs if pair[1][0] != pair[1][1])
                return f"{name}, line {number}: {str(other)[:200]} where {str(one)[:200]} should be"
            return f"{name}: {'missing' if there is None else 'more' if here is None else 'other content'}"
    return ""


def serve() -> None:
    """Take requests line by line, one child each."""
    for module in WARM:
        importlib.import_module(module)
    gc.freeze()  # a collection in a child would copy every page it looks at
    for line in sys.stdin:
        request = json.loads(line)
        blows = [Blow(**blow) for blow in request["blows"]]
        started = time.monotonic()
        if (child := os.fork()) == 0:
            _run_child(request, [blow for blow in blows if blow.call or blow.event])
        struck = started
        for blow in sorted((b for b in blows if not b.call and not b.event), key=lambda b: b.seconds):
            time.sleep(max(0.0, started + blow.seconds - time.monotonic()))
            struck = time.monotonic()
            os.kill(child, blow.signal)  # a child that has ended is not reaped yet, so its number is its own
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        ended = time.monotonic()
        answer = {"status": status, "seconds": ended - started, "seconds_after_blow": ended - struck}
        print(json.dumps(answer), flush=True)


def _run_child(request: dict[str, Any], blows: list[Blow]) -> NoReturn:
    """The command line as a person starts it, with the blows laid."""
    from relora.cli import main

    signal.alarm(HANG_SECONDS)
    printed = os.open(request["printed"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(printed, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for name, value in request["dials"].items():
        owner, attribute = _find(name)
        setattr(owner, attribute, value)
    folder = Path(request["watch"])
    for blow in blows:
        if blow.call:
            _lay(blow, folder)
    _watch(folder, Path(request["events"]), [blow for blow in blows if blow.event])
    sys.argv = ["relora", *request["arguments"]]
    status: object = 0
    try:
        main()
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    for thread in threading.enumerate():  # as the interpreter does at its end, whose other work takes a second
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(bool(status)))


def _strike(blow: Blow, folder: Path) -> None:
    if blow.cut:
        file = folder / blow.cut
        lines = file.read_bytes().splitlines(keepends=True)
        os.truncate(file, file.stat().st_size - (len(lines[-1]) + 1) // 2)
    os.kill(os.getpid(), blow.signal)


def _find(name: str) -> tuple[Any, str]:
    """`module:a.b` -> the object `a` and `b`."""
    module, _, path = name.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, attribute = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, attribute


def _lay(blow: Blow, folder: Path) -> None:
    """Wrap the function so that its nth call is met by the blow."""
    owner, attribute = _find(blow.call)
    function, calls = getattr(owner, attribute), 0

    def wrapped(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        struck = calls == blow.nth
        if struck and not blow.after:
            _strike(blow, folder)
        result = function(*arguments, **named)
        if struck and blow.after:
            _strike(blow, folder)
        return result

    setattr(owner, attribute, wrapped)


def _watch(folder: Path, log: Path, blows: list[Blow]) -> None:
    """Note every change under `folder` in `log`, just before it happens, and let the blows fall.

    Opening for writing is noted twice: before it, and when the file is there, empty. Files that are written outside
    of Python (safetensors) are noted before, half written, and after.
    """
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    counts, lock = dict.fromkeys(blows, 0), threading.RLock()

    def happened(kind: str, *paths: Path, cut: bool = False) -> None:
        if not any(path.is_relative_to(folder) for path in paths):
            return
        event = f"{kind} {' to '.join(os.path.relpath(path, folder) for path in paths)}"
        with lock:
            os.write(out, f"{event}\n".encode())
            for blow in counts:
                counts[blow] += (met := bool(re.search(blow.event, event)))
                if met and counts[blow] == blow.nth:
                    if cut:
                        os.truncate(paths[0], paths[0].stat().st_size // 2)
                    _strike(blow, folder)

    def audit(kind: str, arguments: tuple[Any, ...]) -> None:
        name = kind.partition(".")[2]
        if kind == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR):
                happened("open", _absolute(path))
        elif kind == "os.truncate":
            happened(name, _absolute(arguments[0]))
        elif kind in ("os.rename", "os.link"):
            source, target, *folders = arguments
            happened(name, *map(_absolute, (source, target), folders))
        elif kind in ("os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"):
            happened(name, _absolute(arguments[0], arguments[-1]))

    def opened(file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        stream = plain_open(file, mode, *arguments, **named)
        if mode[0] in "wax":
            happened("opened", _absolute(file))
        return stream

    def synced(descriptor: int) -> None:
        happened("sync", _absolute(descriptor))
        plain_fsync(descriptor)

    def serialized(tensors: Any, file: Any, metadata: Any = None) -> None:
        happened("write", _absolute(file))
        plain_serialize(tensors, file, metadata=metadata)
        happened("half", _absolute(file), cut=True)
        happened("written", _absolute(file))

    safetensors = importlib.import_module("safetensors.torch")
    plain_open, plain_fsync, plain_serialize = builtins.open, os.fsync, safetensors.serialize_file
    builtins.open = io.open = opened
    os.fsync = synced
    safetensors.serialize_file = serialized
    sys.addaudithook(audit)


def _absolute(path: Any, folder: Any = -1) -> Path:
    """Of a path or an open file; of a name told relative to an open folder (as `shutil.rmtree` does), too."""
    if isinstance(path, int):
        return Path(f"/proc/self/fd/{path}").readlink()
    within = isinstance(folder, int) and folder >= 0
    return (Path(f"/proc/self/fd/{folder}").readlink() if within else Path.cwd()) / os.fsdecode(path)


if __name__ == "__main__":
    serve()
