"""Exchanges between the ranks of a run: that they have the same weights, and how fast each of them is."""

import socket
from typing import Any

import torch
from torch import Tensor

from relora.device import peak_memory_bytes
from relora.distributed.agree import check_equal
from relora.lowrank import low_rank_layers
from relora.lowrank.division import division_of, part_of
from relora.lowrank.linear import LowRankLinear
from relora.train.optim import named_state
from relora.train.run import Progress, Run
from relora.train.sharded_checkpoint import parts_of_state


def agree_on_all(run: Run, progress: Progress, when: str) -> None:
    """Compare all weights, masters and moments with those of the other ranks; do nothing alone.

    Of a divided model those are compared that every rank has whole and, where there are several copies of it, the parts
    of each rank with the same parts of the other copies.

    Raises:
        RankDrift: a tensor differs; the message names it.
    """
    if run.group.world == 1:
        return
    divided = parts_of_state(run.model, progress.optimizer).keys()
    tensors: dict[str, Tensor | None] = {}
    tensors |= {name: one.detach() for name, one in run.model.named_parameters() if part_of(one) is None}
    layers = {path: layer for path, layer in low_rank_layers(run.model).items() if layer.division is None}
    buffers = dict(run.model.named_buffers())
    tensors |= {name: buffer for name, buffer in buffers.items() if not name.endswith(LowRankLinear.divided_buffers)}
    for path, layer in layers.items():
        tensors |= {f"{path}.{name}": getattr(layer, name) for name in layer.divided_buffers}
    masters = {f"{path}.weight (master)": layer.base.master for path, layer in layers.items()}
    state = named_state(run.model, progress.optimizer)
    tensors |= masters | {name: tensor for name, tensor in state.items() if name not in divided}
    there = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    check_equal(run.group, there, f"{when} at step {progress.state.step}")
    if (division := division_of(run.model)) is not None:
        parts = {name: one.detach() for name, one in run.model.named_parameters() if part_of(one) is not None}
        parts |= {name: state[name] for name in divided}
        check_equal(run.group, parts, f"{when} at step {progress.state.step}", division.count)


def figures_of_ranks(run: Run, progress: Progress, steps: float) -> dict[str, Any]:
    """Return the memory of a metric record and, with several ranks, how they differ; warn of a slow rank.

    Args:
        steps: number of steps since the last record.
    """
    memory = peak_memory_bytes(next(run.model.parameters()).device)
    if run.group.world == 1:
        return {"peak_memory_bytes": memory}
    own = [progress.unlogged_seconds - progress.unlogged_waited_seconds, progress.unlogged_data_seconds, float(memory)]
    table = torch.zeros(run.group.world, len(own), dtype=torch.float64)
    table[run.group.rank] = torch.tensor(own, dtype=torch.float64)
    busy, data, bytes_held = run.group.sum_(table).T.tolist()
    for rank, times in progress.pace.slow_ranks(busy).items():
        hosts = run.group.gather(socket.gethostname())
        run.reporter.warning(
            f"step {progress.state.step}: rank {rank} on {hosts[rank]} computes {times:.1f} times as long as the "
            "others, which wait for it at every step"
        )
    return {
        "ranks": run.group.world,
        "own_seconds_min": min(busy) / steps,
        "own_seconds_max": max(busy) / steps,
        "slowest_rank": busy.index(max(busy)),
        "data_seconds_min": min(data) / steps,
        "data_seconds_max": max(data) / steps,
        "reduced_bytes": run.reduction.sent_bytes,
        "peak_memory_bytes": int(max(bytes_held)),
        "peak_memory_bytes_min": int(min(bytes_held)),
    }
