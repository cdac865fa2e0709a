"""The run folder: who may write into it, and what stands there.

    config.yaml  environment.json  tokenizer/  metrics.jsonl  restarts.jsonl  checkpoints/
    model/  samples.json  report.html

A folder belongs to one configuration. The same command on it continues the run; another configuration is refused by
name.
"""

import fcntl
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from relora.config import RunConfig, TrainingConfig, load_config, to_yaml
from relora.errors import RunStopped, UserError
from relora.files.atomic import write_durably
from relora.files.untrusted import check_folder
from relora.runs.environment import describe_environment


@contextmanager
def claim(config: TrainingConfig, fresh: bool) -> Iterator[Path]:
    """The run's folder, ready to be written and held alone: new, or holding an earlier part of a run.

    `fresh` moves what is there aside, to the first free `NAME.1`, `NAME.2` ...; nothing is deleted.

    Raises:
        UserError: the folder holds something else, another process is writing it, or it cannot be written. Nothing
            was changed.
        RunStopped: the disk failed while the folder was held.
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
            what = f"{error.filename or folder}: {error.strerror or error}"
            raise RunStopped(f"{what}; mend the disk or make room, and run the same command again") from error


def check_space(folder: Path, needed_bytes: int, *, continuing: bool = False) -> None:
    """`UserError` if the disk that will hold `folder` has less than `needed_bytes` free.

    `continuing`: the checkpoints that are there count as free, since later ones take their place.
    """
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if continuing:
        files = [file.stat() for file in (folder / "checkpoints").rglob("*.safetensors")]
        free += sum({file.st_ino: file.st_size for file in files}.values())  # one that several share counts once
    if free < needed_bytes:
        raise UserError(
            f"output_dir: {folder} needs {needed_bytes / 1e6:,.0f} MB for checkpoints and the model, but "
            f"{free / 1e6:,.0f} MB are free; make room, choose another output_dir or lower checkpoint.keep_last"
        )


def describe_run(folder: Path, config: TrainingConfig, parameters: int) -> None:
    """Write config.yaml and environment.json: what the run is, and what it runs on."""
    environment = {"parameters": parameters, **describe_environment()}
    try:
        write_durably(folder / "config.yaml", to_yaml(config))  # first: it makes the folder a run's
        write_durably(folder / "environment.json", json.dumps(environment, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"output_dir: {folder} cannot be written: {error.strerror}") from None


def open_run(folder: str | Path) -> tuple[Path, RunConfig]:
    """An existing run folder and its configuration; `UserError` where there is none."""
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: not a run folder (no config.yaml in it)")
    check_folder(folder)
    return folder, load_config(folder / "config.yaml")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder alone. The lock is on the folder itself and dies with its process, so none is ever stale."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"output_dir: another process is writing {folder}; wait for it, or stop it first"
            raise UserError(message) from None
        yield
    finally:
        os.close(descriptor)


def _free_name(folder: Path) -> Path:
    """`NAME.1`, or the next that is not there."""
    return next(aside for n in itertools.count(1) if not (aside := folder.with_name(f"{folder.name}.{n}")).exists())


def _may_hold_a_run(folder: Path) -> bool:
    """Whether a folder is a run's, or holds no more than what a run leaves that was killed as it began."""
    return {path.name for path in folder.iterdir()} <= {"config.yaml.partial"} or (folder / "config.yaml").is_file()
