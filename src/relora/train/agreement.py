"""What the ranks of a run tell one another: that they have the same weights, and how fast each of them is."""

import socket
from typing import Any

import torch

from relora.device import peak_memory_bytes
from relora.distributed.agree import check_equal
from relora.lowrank import low_rank_layers
from relora.train.optim import named_state
from relora.train.run import Progress, Run


def agree_on_all(run: Run, progress: Progress, when: str) -> None:
    """Compare all weights, masters and moments with those of the other ranks; do nothing alone.

    Raises:
        RankDrift: a tensor differs; the message names it.
    """
    if run.group.world == 1:
        return
    tensors = {name: parameter.detach() for name, parameter in run.model.named_parameters()}
    tensors |= dict(run.model.named_buffers())
    layers = low_rank_layers(run.model).items()
    masters = {f"{path}.weight (master)": layer.base.master for path, layer in layers}
    tensors |= {name: master for name, master in masters.items() if master is not None}
    tensors |= named_state(run.model, progress.optimizer)
    check_equal(run.group, tensors, f"{when} at step {progress.state.step}")


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
