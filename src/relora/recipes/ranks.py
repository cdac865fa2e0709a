"""Runs of several processes: join them, and share the run folder and the work."""

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from relora.config import FinetuneConfig, TrainingConfig
from relora.distributed.agree import check_same
from relora.distributed.group import Group
from relora.distributed.reduce import Buckets, Reduction, check_share
from relora.distributed.sharded_reduction import ShardedReduction
from relora.distributed.sharding import ShardedModel
from relora.distributed.tree import Tree
from relora.errors import UserError
from relora.lowrank.divided_layer import check_divisible
from relora.lowrank.targets import find_targets, is_conv1d
from relora.model.blocks import decoder_blocks
from relora.recipes.from_settings import lowrank_of
from relora.runs.changes import flat_settings
from relora.runs.settings import is_run
from relora.train.checkpoint import Checkpoints
from relora.train.replicated import ReplicatedCheckpoints
from relora.train.sharded_checkpoint import ShardedCheckpoints


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


def reduction_of(config: TrainingConfig, model: nn.Module, device: torch.device, group: Group) -> Reduction:
    """Return how the gradients of a step come together; a model that is to be sharded is divided here."""
    if (sharers := sharers_of(config, group)) > 1:
        shape, names = (group.world // sharers, sharers), ("replicas", "rows")
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
        mesh = mesh if shape[0] > 1 else mesh["rows"]
        return ShardedReduction(group, ShardedModel(model, decoder_blocks(model), mesh, device))
    if config.distributed.deterministic:
        return Tree(group)
    return Reduction() if group.world == 1 else Buckets(group)


def first_device(config: TrainingConfig, device: torch.device, group: Group) -> torch.device:
    """Return where a whole model is held before the run begins: on the device, or in main memory if ranks share it."""
    return device if sharers_of(config, group) == 1 else torch.device("cpu")


def sharers_of(config: TrainingConfig, group: Group) -> int:
    """Return the number of ranks that share one copy of the model; 1 where every rank has the whole model."""
    sharers = {"shard": group.world, "hybrid": group.local_world}
    return sharers.get(config.distributed.strategy, 1) if group.world > 1 else 1


def check_shardable(config: TrainingConfig, model: nn.Module, group: Group) -> None:
    """Raise `UserError` if this run wants a strategy that its method, its model or these ranks cannot have."""
    strategy, sharers = config.distributed.strategy, sharers_of(config, group)
    if strategy == "hybrid" and group.world > 1 and not 1 < sharers < group.world:
        raise UserError(
            f"distributed.strategy: hybrid divides the model among the ranks of a machine, and here are "
            f"{group.world // group.local_world} machines with {group.local_world} each; set `shard`, or `replicate`"
        )
    if sharers == 1:
        return
    what = f"distributed.strategy: {strategy}"
    if config.optimizer.name != "adamw":
        raise UserError(
            f"{what} divides matrices, which optimizer.name: {config.optimizer.name} needs whole; set adamw"
        )
    if config.distributed.deterministic:
        raise UserError(f"{what} adds up gradients rank by rank; distributed.deterministic needs `replicate`")
    if isinstance(config, FinetuneConfig) and config.lowrank.init == "gradient-svd":
        raise UserError(f"{what}: lowrank.init: gradient-svd needs all gradients at once; set kaiming or `replicate`")
    if isinstance(config, FinetuneConfig) and config.lowrank.trainable_tokens:
        raise UserError(f"{what}: lowrank.trainable_tokens needs whole embeddings; set `replicate`")
    if not decoder_blocks(model):
        raise UserError(f"{what}: the model has no repeated blocks to be divided by; set `replicate`")
    for name, module in model.named_modules():
        if is_conv1d(module) and module.weight.shape[1] % sharers:
            raise UserError(f"{what}: {name} has {module.weight.shape[1]} outputs, no multiple of {sharers} ranks")
    if config.method != "full" and (lowrank := lowrank_of(config)).base == "nf4":
        for name in find_targets(model, lowrank):
            linear = model.get_submodule(name)
            out_features, in_features = model.get_parameter(f"{name}.weight").shape[:: -1 if is_conv1d(linear) else 1]
            check_divisible(name, out_features, in_features, sharers)


def opened_checkpoints(config: TrainingConfig, folder: Path, group: Group) -> Checkpoints:
    """Return the checkpoints of a run folder, which rank 0 writes, or all ranks of a sharded run together."""
    place, keep, background = folder / "checkpoints", config.checkpoint.keep_last, config.checkpoint.background
    if group.world == 1:
        return Checkpoints(place, keep, background=background)
    if (sharers := sharers_of(config, group)) > 1:
        return ShardedCheckpoints(place, keep, background=background, group=group, writers=sharers)
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
