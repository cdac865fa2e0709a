"""What a run does beyond training where several processes train it: join them, and share folder and work."""

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from relora.config import TrainingConfig
from relora.distributed.agree import check_same
from relora.distributed.group import Group
from relora.distributed.reduce import Buckets, Reduction, check_share
from relora.distributed.tree import Tree
from relora.errors import UserError
from relora.runs.changes import flat_settings
from relora.runs.settings import is_run
from relora.train.checkpoint import Checkpoints
from relora.train.replicated import ReplicatedCheckpoints


def join(config: TrainingConfig, device: torch.device, content: Mapping[str, str], group: Group) -> None:
    """Connect the ranks of a run, and check that all of them have the same; do nothing alone.

    Args:
        content: fingerprints of the data and the model that the configuration only points at.

    Raises:
        UserError: they have different configurations or data, or this run cannot be shared by so many.
    """
    if group.world == 1:
        return
    with group.stage("the first connection"):
        if config.distributed.strategy not in ("auto", "replicate"):
            raise UserError(
                f"distributed.strategy: {config.distributed.strategy} is not there yet; set `replicate`, or `auto`"
            )
        batch = config.batch
        check_share(group, batch.sequences, batch.micro_sequences, deterministic=config.distributed.deterministic)
        if device.type == "cuda" and group.local_world > 1 and config.device.startswith("cuda:"):
            raise UserError(f"device: {config.device} is one GPU for {group.local_world} processes; set `device: cuda`")
    group.connect(device, config.distributed.timeout_seconds)
    facts: dict[str, Any] = {
        **flat_settings(config),
        **{f"{name} (fingerprint)": text for name, text in content.items()},
        "device": device.type,
        "torch": torch.__version__,
        "threads (OMP_NUM_THREADS)": torch.get_num_threads(),
    }
    with group.stage("the comparison of configurations"):
        check_same(group, facts)


def reduction_of(config: TrainingConfig, group: Group) -> Reduction:
    """Return how the gradients of a step come together."""
    if config.distributed.deterministic:
        return Tree(group)
    return Reduction() if group.world == 1 else Buckets(group)


def opened_checkpoints(config: TrainingConfig, folder: Path, group: Group) -> Checkpoints:
    """Return the checkpoints of a run folder, which rank 0 writes."""
    place, keep, background = folder / "checkpoints", config.checkpoint.keep_last, config.checkpoint.background
    if group.world == 1:
        return Checkpoints(place, keep, background=background)
    return ReplicatedCheckpoints(place, keep, background=background, group=group)


def see_run_folder(folder: Path, group: Group) -> None:
    """Check that this rank sees the run folder that rank 0 has opened.

    Raises:
        UserError: it does not.
    """
    with group.stage("the look at the run folder"):
        if not is_run(folder):
            raise UserError(
                f"output_dir: {folder} is not there on {socket.gethostname()}; all ranks need a disk that they share"
            )
