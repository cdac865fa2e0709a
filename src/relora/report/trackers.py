"""Where the figures go besides metrics.jsonl: TensorBoard, Weights & Biases, Trackio.

None of them asks a question on the terminal: Weights & Biases without a configured key logs offline, under
the run folder. Each library is imported in the one function that needs it.
"""

import importlib.util
import netrc
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from relora.errors import UserError
from relora.report.metrics import Record

PROJECT = "relora"


class Tracker(Protocol):
    """Takes every record of the run; may raise whatever its library raises."""

    def log(self, record: Record) -> None: ...

    def close(self) -> None: ...


def check_trackers(names: Sequence[str]) -> None:
    """`UserError` naming the extra of the first tracker whose library is absent; opens and writes nothing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"log.trackers: {name} is not installed; run: pip install 'relora[{name}]'")


def open_trackers(
    names: Sequence[str], run_folder: Path, config: Mapping[str, Any], first_step: int = 0
) -> list[Tracker]:
    """The named trackers; `UserError` names the extra whose library is absent.

    `first_step`: updates done before this start, i.e. the step of the checkpoint that is resumed (0 for a new
    run). TensorBoard then hides what it had been told of later steps.
    """
    return [_open(name, run_folder, config, first_step) for name in names]


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """The figures of a record under names that dashboards group by: `train/loss`, `evaluation/perplexity`."""
    kind = record.get("kind", "run")
    for name, value in record.items():
        if name != "step" and isinstance(value, int | float):
            yield f"{kind}/{name}", float(value)


class TensorBoard:
    """Event files under RUN/tensorboard; `tensorboard --logdir RUN` shows them."""

    def __init__(self, run_folder: Path, config: Mapping[str, Any], first_step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        # what was written at these steps before a kill is not shown twice (a new run's first step is 0)
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
    """One wandb run named after the run folder; offline, under RUN/wandb, when no API key is configured."""

    def __init__(self, run_folder: Path, config: Mapping[str, Any], first_step: int) -> None:
        import wandb

        id_file = run_folder / "wandb_run_id"
        if not (first_step and id_file.exists()):
            id_file.write_text(secrets.token_hex(4))
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
    """One trackio run named after the run folder, in trackio's local database."""

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
    openers: dict[str, Callable[[Path, Mapping[str, Any], int], Tracker]] = {
        "tensorboard": TensorBoard,
        "wandb": WeightsAndBiases,
        "trackio": Trackio,
    }
    try:
        return openers[name](run_folder, config, first_step)
    except Exception as error:  # whatever the library raises: no network, no rights, a damaged database
        reason = " ".join(str(error).split())
        raise UserError(f"log.trackers: {name} cannot start: {reason}; mend that or leave it out") from error


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _config_lines(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _config_lines(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}: {value}"
