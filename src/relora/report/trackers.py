"""Trackers, which receive the records of a run besides metrics.jsonl: TensorBoard, Weights & Biases, Trackio.

No tracker asks a question on the terminal: without a configured key, Weights & Biases logs offline into the run folder.
Each library is imported in the one function that needs it.
"""

import importlib.util
import netrc
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from relora.errors import UserError
from relora.files.atomic import write_text
from relora.report.metrics import Record

PROJECT = "relora"


class Tracker(Protocol):
    """Receiver of every record of a run; its methods may raise any exception of its library."""

    def log(self, record: Record) -> None: ...

    def close(self) -> None: ...


def check_trackers(names: Sequence[str]) -> None:
    """Raise `UserError`, which names the extra to install, if a tracker's library is absent; open and write nothing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"log.trackers: {name} is not installed; run: pip install 'relora[{name}]'")


def open_trackers(
    names: Sequence[str], run_folder: Path, config: Mapping[str, Any], first_step: int = 0
) -> list[Tracker]:
    """Open the named trackers.

    Args:
        names: any of `tensorboard`, `wandb`, `trackio`.
        run_folder: the trackers take its name, and two of them write into it.
        config: settings of the run, which are shown with it.
        first_step: optimizer steps done before this start, i.e. the step of the checkpoint that is resumed, 0 for a
            new run. TensorBoard hides figures of later steps that were logged before.

    Raises:
        UserError: a tracker cannot start, for example without a network.
    """
    return [_open(name, run_folder, config, first_step) for name in names]


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """Yield the numbers of a record with names that dashboards group by: `train/loss`, `evaluation/perplexity`."""
    kind = record.get("kind", "run")
    for name, value in record.items():
        if name != "step" and isinstance(value, int | float):
            yield f"{kind}/{name}", float(value)


class TensorBoard:
    """Tracker that writes event files into RUN/tensorboard, to be shown by `tensorboard --logdir RUN`."""

    def __init__(self, run_folder: Path, config: Mapping[str, Any], first_step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        # hides events of the steps that are trained again after a kill, including step 0 where the run starts anew
        purge_step = first_step + 1 if first_step else 0
        self._writer = SummaryWriter(str(run_folder / "tensorboard"), purge_step=purge_step)
        if not first_step:
            self._writer.add_text("config", "".join(f"    {line}\n" for line in _config_lines(config)))

    def log(self, record: Record) -> None:
        for name, value in scalars(record):
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Tracker with one wandb run, named after the run folder; offline, in RUN/wandb, where no API key is configured."""

    def __init__(self, run_folder: Path, config: Mapping[str, Any], first_step: int) -> None:
        import wandb

        id_file = run_folder / "wandb_run_id"
        if not (first_step and id_file.exists()):
            write_text(id_file, secrets.token_hex(4))
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run_folder.name,
            id=id_file.read_text(),
            resume="allow",
            dir=str(run_folder),
            config=dict(config),
            mode=os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline"),
            settings=wandb.Settings(silent=True),
        )

    def log(self, record: Record) -> None:
        self._run.log(dict(scalars(record)), step=record["step"])

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """Tracker with one trackio run, named after the run folder, in trackio's local database."""

    def __init__(self, run_folder: Path, config: Mapping[str, Any], first_step: int) -> None:
        import trackio

        self._run = trackio.init(
            project=PROJECT,
            name=run_folder.name,
            config=dict(config),
            resume="allow" if first_step else "never",
            embed=False,
        )

    def log(self, record: Record) -> None:
        self._run.log(dict(scalars(record)), step=record["step"])

    def close(self) -> None:
        self._run.finish()


def _open(name: str, run_folder: Path, config: Mapping[str, Any], first_step: int) -> Tracker:
    """Open one tracker; `UserError` for whatever its library raises."""
    openers: dict[str, Callable[[Path, Mapping[str, Any], int], Tracker]] = {
        "tensorboard": TensorBoard,
        "wandb": WeightsAndBiases,
        "trackio": Trackio,
    }
    try:
        return openers[name](run_folder, config, first_step)
    except Exception as error:  # the libraries raise many types: no network, no rights, a damaged database
        reason = " ".join(str(error).split())
        raise UserError(f"log.trackers: {name} cannot start: {reason}; mend that or leave it out") from error


def _has_wandb_key() -> bool:
    """Whether an API key is configured, in the environment or in the user's netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _config_lines(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield one line `section.key: value` for every setting."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _config_lines(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}: {value}"
