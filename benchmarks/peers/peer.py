"""What every peer trains, and what the campaigns need of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

CORPUS = Path(__file__).parents[2] / "corpus"
STEPS, SAVE_EVERY, BATCH, WINDOW = 40, 5, 4, 64
VOCABULARY = 257
"""The bytes, and one token for the beginning of a text."""
LAYERS, WIDTH, HEADS, INNER = 2, 64, 4, 176
NAN_STEP = 23
BEGIN = "@@begin"
"""Printed into the log of a run when its training loop starts."""


@dataclass(frozen=True)
class Case:
    """How one run differs from the undisturbed one."""

    nan: bool = False
    """One loss is NaN, at step NAN_STEP."""
    pause: float = 0.0
    """Seconds more that a forward pass takes, for what takes seconds to react."""
    signal_saves: bool = False
    """The peer's own saving on SIGTERM, where it has one (off by default there)."""


UNDISTURBED = Case()


class Peer(Protocol):
    packages: tuple[str, ...]
    """Whose versions stand above the table."""
    state: tuple[str, ...]
    """Files of a checkpoint that hold what a run goes on with."""
    pickles: tuple[str, ...]
    """Files of a checkpoint that a hostile pickle may stand in for."""
    saves_on_signal: bool

    def prepare(self, work: Path) -> None:
        """Lay down the data and import all that training needs, once: runs are forked afterwards."""

    def train(self, folder: Path, case: Case) -> None:
        """Train to the end, from the newest checkpoint where there is one. Runs in a process of its own."""

    def checkpoints(self, folder: Path) -> list[Path]:
        """From old to new, by the number in the name, whole or not."""

    def weights(self, folder: Path) -> dict[str, torch.Tensor]:
        """What was trained, at the end."""


def by_number(folder: Path, pattern: str) -> list[Path]:
    """Folders that match, in the order of the number at the end of their names."""
    return sorted(folder.glob(pattern), key=number)


def number(checkpoint: Path) -> int:
    """The step a checkpoint's name claims."""
    return int(checkpoint.name.rsplit("-", 1)[1])
