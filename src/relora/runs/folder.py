"""The run folder: one process at a time writes it, and it belongs to one configuration.

    config.yaml  environment.json  tokenizer/  metrics.jsonl  restarts.jsonl  checkpoints/
    model/  samples.json  report.html

The same command on the folder continues the run. A command with another configuration is refused, and the message
names the keys that differ (`recipes.resume`).
"""

import itertools
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from relora.config import RunConfig, TrainingConfig, load_config, to_yaml
from relora.errors import RunStopped, UserError
from relora.files.atomic import write_json, write_text
from relora.files.locks import FileLock
from relora.files.untrusted import check_folder
from relora.runs.environment import describe_environment
from relora.runs.settings import CONFIG_FILE, is_run, run_folder


@contextmanager
def claim(config: TrainingConfig, fresh: bool) -> Iterator[Path]:
    """Lock the run folder for this process and yield its path; the folder is new or holds an earlier part of a run.

    Args:
        config: the configuration, whose `output_dir` is the folder.
        fresh: rename a folder that is there to the first free `NAME.1`, `NAME.2` ... and create a new one. Nothing
            is deleted.

    Raises:
        UserError: the folder holds something else, another process is writing it, or it cannot be written. Nothing
            was changed.
        RunStopped: an `OSError` came out of the `with` block, such as a full disk.
    """
    folder = Path(config.output_dir)
    with ExitStack() as held:
        try:
            if folder.is_dir():
                held.enter_context(_locked(folder))
            if fresh and folder.exists():
                folder.rename(_free_name(folder))
            if folder.exists():
                if not _may_hold_a_run(folder):
                    raise UserError(
                        f"output_dir: {folder} exists and is not a run folder (no config.yaml in it); choose another"
                    )
                check_folder(folder)
            else:
                folder.mkdir(parents=True)
                held.enter_context(_locked(folder))
        except OSError as error:
            raise UserError(f"output_dir: {folder} cannot be written: {error.strerror}") from None
        try:
            yield folder
        except OSError as error:
            problem = f"{error.filename or folder}: {error.strerror or error}"
            raise RunStopped(f"{problem}; mend the disk or make room, and run the same command again") from error


def check_space(folder: Path, needed_bytes: int, *, continuing: bool = False) -> None:
    """Check that the disk that will hold `folder` has `needed_bytes` free.

    Args:
        folder: the run folder, which need not exist yet.
        needed_bytes: bytes that the run will write.
        continuing: count the bytes of the checkpoints in the folder as free, since later ones replace them.

    Raises:
        UserError: there is less space.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free_bytes = shutil.disk_usage(existing).free
    if continuing:
        files = [file.stat() for file in (folder / "checkpoints").rglob("*.safetensors")]
        free_bytes += sum({file.st_ino: file.st_size for file in files}.values())  # hard links count once
    if free_bytes < needed_bytes:
        raise UserError(
            f"output_dir: {folder} needs {needed_bytes / 1e6:,.0f} MB for checkpoints and the model, but "
            f"{free_bytes / 1e6:,.0f} MB are free; make room, choose another output_dir or lower checkpoint.keep_last"
        )


def describe_run(folder: Path, config: TrainingConfig, parameters: int, notes: Sequence[str] = ()) -> None:
    """Write config.yaml, the resolved configuration, and environment.json, the environment and the model's size.

    Args:
        folder: the run folder, claimed.
        config: the configuration of the run.
        parameters: number of the model's parameters.
        notes: lines on what of the model gets no factors or never trains.

    Raises:
        UserError: the folder cannot be written.
    """
    environment = {"parameters": parameters, **({"notes": list(notes)} if notes else {}), **describe_environment()}
    try:
        write_text(folder / CONFIG_FILE, to_yaml(config))  # first, since it makes the folder a run folder
        write_json(folder / "environment.json", environment)
    except OSError as error:
        raise UserError(f"output_dir: {folder} cannot be written: {error.strerror}") from None


def open_run(folder: str | Path) -> tuple[Path, RunConfig]:
    """Return the path and the configuration of an existing pretraining run.

    Raises:
        UserError: it is not a run folder, or its config.yaml is not a valid configuration for pretraining.
    """
    folder = run_folder(folder)
    return folder, load_config(folder / CONFIG_FILE)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the kernel's lock on a folder, which is released when the process ends in any way, so it is never stale.

    Raises:
        UserError: another process holds the lock.
    """
    lock = FileLock(folder)
    if not lock.try_acquire():
        raise UserError(f"output_dir: another process is writing {folder}; wait for it, or stop it first")
    try:
        yield
    finally:
        lock.release()


def is_being_written(folder: Path) -> bool:
    """Return whether a process has claimed a folder, which need not exist."""
    if not folder.is_dir():
        return False
    lock = FileLock(folder)
    free = lock.try_acquire()
    lock.release()
    return not free


def _free_name(folder: Path) -> Path:
    """Return the first of `NAME.1`, `NAME.2` ... that does not exist."""
    names = (folder.with_name(f"{folder.name}.{number}") for number in itertools.count(1))
    return next(path for path in names if not path.exists())


def _may_hold_a_run(folder: Path) -> bool:
    """Return whether a folder is a run folder, or is empty but for what a run leaves that was killed at its start."""
    # earlier versions named the temporary without the leading dot
    leftovers = {f".{CONFIG_FILE}.partial", f"{CONFIG_FILE}.partial"}
    return is_run(folder) or {path.name for path in folder.iterdir()} <= leftovers
