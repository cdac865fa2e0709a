"""The runs of a comparison: each in a process of its own, several side by side, none twice.

    RUNS/lora-warm-lr0.004-1000steps-seed0-1f3a9c2e/      a run folder, and in it
        outcome.json                                      what came of it, once it has ended

The last part of the name is a hash of all that decides the run's numbers, tokens included, so a run is found again by
any comparison that wants just this one, and none is mistaken for another. A run that was interrupted is continued. One
whose numbers stop being finite has an outcome, too.
"""

import hashlib
import json
import math
import os
import shutil
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from pydantic import TypeAdapter, ValidationError

from relora.config import RunConfig
from relora.data.pretraining.shards import PreparedFolder
from relora.errors import Diverged, Interrupted, ReloraError, RunStopped, UserError
from relora.files.atomic import write_durably
from relora.files.untrusted import read_json
from relora.measure import Evaluation
from relora.recipes.pretrain import pretrain
from relora.report.history import read_history
from relora.report.metrics import number
from relora.train.memory import HeldBytes
from relora.train.projected_optimizers import PROJECTED_OPTIMIZERS

OUTCOME = "outcome.json"
_UNIMPORTANT = {"output_dir", "log", "checkpoint", "samples"}
"""Sections that change none of a run's numbers."""
_BIG = ("checkpoints", "model", "report.html")
"""What a finished run of a comparison is not kept for; `relora report` draws the page again."""
_STOP = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one run, and what it took."""

    folder: str
    diverged: bool
    seed: int
    lr: float
    lowrank_lr: float | None
    """None of a full-rank run."""
    loss: float | None
    """Held out, of the final model, nats per token; None where the run diverged."""
    perplexity: float | None
    held_out_tokens: int
    steps: int
    tokens: int
    """Trained on."""
    trainable_parameters: int
    """At the end."""
    parameters: int
    """Of the model, factors not counted."""
    seconds: float
    """Of training steps."""
    tokens_per_second: float
    peak_memory_bytes: int
    """Of its process or device, warm start included."""
    memory: HeldBytes | None
    """By kind, at the end of training."""

    @property
    def score(self) -> float:
        """The loss; infinite where there is none."""
        return math.inf if self.loss is None else self.loss


def settled_folder(config: RunConfig, runs: Path, name: str) -> RunConfig:
    """The configuration with the run folder that is its own, `name` being the part for people."""
    folder = runs / f"{name}-{config.total_steps}steps-seed{config.seed}-{_fingerprint(config)[:8]}"
    return config.model_copy(update={"output_dir": str(folder)})


def run_all(
    configs: Sequence[RunConfig], *, jobs: int, keep: bool, tell: Callable[[int, Outcome], None]
) -> list[Outcome]:
    """The outcomes of all runs, in their order; those that are not there yet are made, `jobs` at a time.

    Args:
        keep: leave checkpoints, models and reports in the run folders.
        tell: called with the index and the outcome of every run as it ends, not of those that were there.

    Raises:
        UserError, RunStopped: what ended a run, other than numbers that are not finite. Interrupted: by a signal. The
            runs that are under way stop with a checkpoint.
    """
    outcomes = {index: outcome for index, config in enumerate(configs) if (outcome := _outcome_of(config))}
    waiting = deque(index for index in range(len(configs)) if index not in outcomes)
    working: dict[Connection, tuple[int, BaseProcess]] = {}
    with _stop_signals(), _threads_for(jobs):
        try:
            while waiting or working:
                while waiting and len(working) < jobs:
                    pipe, process = _start(configs[waiting[0]], keep)
                    working[pipe] = waiting.popleft(), process
                for ready in wait(list(working)):
                    pipe = cast(Connection, ready)
                    index, process = working.pop(pipe)
                    _check_end(pipe, process, configs[index])
                    outcome = _outcome_of(configs[index])
                    assert outcome is not None  # a process that ends well has written it
                    outcomes[index] = outcome
                    tell(index, outcome)
        finally:
            for _, process in working.values():
                process.terminate()  # stops it with a checkpoint
            for _, process in working.values():
                process.join()
    return [outcomes[index] for index in range(len(configs))]


def _fingerprint(config: RunConfig) -> str:
    """Of all that decides the numbers; what its method has no use for does not count."""
    tree: dict[str, Any] = config.model_dump(mode="json", exclude=_UNIMPORTANT)
    tree["data"] |= {
        "train": [(PreparedFolder.open(source.path).content, source.weight) for source in config.data.sources],
        "validation": PreparedFolder.open(config.data.validation).content,
    }
    if config.method == "full":
        for key in ("variant", "lowrank", "warm_start", "restart"):
            del tree[key]
        if config.optimizer.matrix_lr is not None:
            tree["matrices"] = config.lowrank.target_modules
        tree["optimizer"] = {key: value for key, value in tree["optimizer"].items() if "lowrank" not in key}
    if config.optimizer.name not in PROJECTED_OPTIMIZERS:
        del tree["optimizer"]["projection"]
    return hashlib.blake2b(json.dumps(tree, sort_keys=True).encode(), digest_size=16).hexdigest()


def _outcome_of(config: RunConfig) -> Outcome | None:
    """What the run folder says; None where the run has not ended."""
    file = Path(config.output_dir) / OUTCOME
    if not file.is_file():
        return None
    try:
        outcome = TypeAdapter(Outcome).validate_python(read_json(file))
    except ValidationError:
        raise UserError(f"{file}: damaged; delete its folder, and the run is made again") from None
    return replace(outcome, folder=config.output_dir)  # it may have been moved since


def _start(config: RunConfig, keep: bool) -> tuple[Connection, BaseProcess]:
    here, there = get_context("spawn").Pipe(duplex=False)
    process = get_context("spawn").Process(target=_work, args=(config, keep, there))
    process.start()
    there.close()  # so that the end of the process is the end of the pipe
    return here, process


def _check_end(pipe: Connection, process: BaseProcess, config: RunConfig) -> None:
    """Raise what ended a process, if it is not that its run is done."""
    message, status = None, 0
    with suppress(EOFError):  # it ended without a word
        message, status = pipe.recv()
    process.join()
    if message is None and process.exitcode:
        why = "as by a lack of memory" if process.exitcode < 0 else "see above"
        raise RunStopped(f"{config.output_dir}: its process ended with status {process.exitcode}, {why}")
    if message is not None:
        kinds = {UserError.exit_status: UserError, RunStopped.exit_status: RunStopped}
        raise kinds[status](message) if status in kinds else Interrupted(message, status - 128)


def _work(config: RunConfig, keep: bool, pipe: Connection) -> None:
    """In the run's own process: train, and write what came of it."""
    os.setsid()  # Ctrl-C goes to the comparison, which tells its runs
    sys.stdout = sys.stderr  # what a run has to say is no part of the comparison's figures
    threading.Thread(target=_end_with_parent, daemon=True).start()
    folder = Path(config.output_dir)
    try:
        outcome = _run(config)
    except ReloraError as error:
        with suppress(BrokenPipeError):  # the comparison was killed
            pipe.send((str(error), error.exit_status))
        return
    write_durably(folder / OUTCOME, json.dumps(asdict(outcome), indent=1) + "\n")
    for name in () if keep else _BIG:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _end_with_parent() -> None:
    """A comparison that was killed leaves no runs behind that nobody waits for."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _run(config: RunConfig) -> Outcome:
    try:
        result = pretrain(config, quiet=True)
    except Diverged as error:
        print(f"{config.output_dir}: {error}", file=sys.stderr)
        result = None
    history = read_history(Path(config.output_dir))
    evaluation: Evaluation | None = result.evaluation if result else None
    if evaluation and not math.isfinite(evaluation.loss):
        evaluation = None
    done, seconds = 0, 0.0
    for record in history.train:
        seconds += (record["step"] - done) * (number(record, "step_seconds") or 0.0)
        done = record["step"]
    steps, tokens = history.last
    return Outcome(
        folder=config.output_dir,
        diverged=evaluation is None,
        seed=config.seed,
        lr=config.optimizer.lr,
        lowrank_lr=None if config.method == "full" else config.lowrank_lr,
        loss=evaluation.loss if evaluation else None,
        perplexity=evaluation.perplexity if evaluation else None,
        held_out_tokens=evaluation.tokens if evaluation else 0,
        steps=steps,
        tokens=tokens,
        trainable_parameters=result.trainable_parameters if result else 0,
        parameters=int(number(history.environment, "parameters") or 0),
        seconds=seconds,
        tokens_per_second=tokens / seconds if seconds else 0.0,
        peak_memory_bytes=int(max((number(record, "peak_memory_bytes") or 0 for record in history.train), default=0)),
        memory=result.memory if result else None,
    )


@contextmanager
def _threads_for(jobs: int) -> Iterator[None]:
    """Processes that are started within share the threads of this one."""
    name, before = "OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS")
    os.environ[name] = str(max(1, torch.get_num_threads() // jobs))
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def _stop_signals() -> Iterator[None]:
    """SIGINT and SIGTERM within raise `Interrupted`."""

    def stop(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        raise Interrupted(f"{name}: stopped, its runs with a checkpoint; the same command continues", number)

    before = {number: signal.signal(number, stop) for number in _STOP}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
