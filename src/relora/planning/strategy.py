"""Choice of `distributed.strategy: auto`: every rank has the whole model if it fits, else all ranks share one.

Rank 0 predicts the peak of a rank with the whole model (see `phase_cost`) and compares it with the least memory that
any rank has: that of its GPU, or its share of the machine's. A model whose steps cannot be simulated counts as fitting.
"""

from typing import TypeVar

import torch

from relora.config import FinetuneConfig, RunConfig
from relora.device import choose_device, free_memory_bytes
from relora.distributed.group import Group
from relora.errors import UserError
from relora.planning.phase_cost import finetuning_peak, phase_cost, phases_of
from relora.planning.probe import process_bytes

Config = TypeVar("Config", RunConfig, FinetuneConfig)


def settled_strategy(config: Config, group: Group) -> Config:
    """Return the configuration with a strategy in place of `auto`; unchanged on one process. All ranks call this."""
    if group.world == 1 or config.distributed.strategy != "auto":
        return config
    device = choose_device(config.device, group.local_rank)
    free = free_memory_bytes(device)
    if free is not None and device.type != "cuda":
        free //= group.local_world
    known = [bytes_free for bytes_free in group.gather(free) if bytes_free is not None]
    fits = not group.is_first or not known or fits_whole(config, device, group.world, min(known))
    strategy = group.broadcast("replicate" if fits else "shard")
    distributed = config.distributed.model_copy(update={"strategy": strategy})
    return config.model_copy(update={"distributed": distributed})


def fits_whole(config: RunConfig | FinetuneConfig, device: torch.device, world: int, limit: int) -> bool:
    """Whether the peak of one of `world` ranks, with the whole model, is predicted to be at most `limit` bytes."""
    try:
        if isinstance(config, FinetuneConfig):
            return finetuning_peak(config) <= limit
        sequences = -(-config.batch.sequences // world)
        micro_sequences = min(config.batch.micro_sequences, sequences)
        batch = config.batch.model_copy(update={"micro_sequences": micro_sequences})
        config, process = config.model_copy(update={"batch": batch}), process_bytes()
        phases = [phase_cost(config, name, first, steps, process, device) for name, first, steps in phases_of(config)]
    except UserError:
        return True
    return max(phase.checkpoint_peak for phase in phases) <= limit
