"""The layer together with accumulation, activation checkpointing, torch.compile, DDP and sharding, and its memory."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tests.lowrank.peak_bytes import PeakBytes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from relora.lowrank import LowRankConfig, inject, low_rank_layers, restart
from relora.lowrank.costs import NOMINAL_RATES

ARITHMETICS = ["native", "int8"]


class Blocks(nn.Module):
    def __init__(self, depth: int = 2, side: int = 32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(side, side), nn.SiLU()) for _ in range(depth))
        self.run_block: Callable[..., Tensor] = lambda block, x: block(x)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.run_block(block, x)
        return x


def built(arithmetic: str, **sizes: int) -> Blocks:
    torch.manual_seed(0)
    model = Blocks(**sizes)
    inject(model, LowRankConfig(r=4, frozen=arithmetic, rates=NOMINAL_RATES))
    for layer in low_rank_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    return model


def data(rows: int = 64, side: int = 32) -> Tensor:
    return torch.randn(rows, side, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_accumulated_micro_batches_are_the_batch(arithmetic: str) -> None:
    """Also in int8, since each token has a scale of its own; only the order of the fp32 sums differs."""
    whole, parts = built(arithmetic), built(arithmetic)
    whole(data()).square().sum().backward()
    for part in data().split(16):
        parts(part).square().sum().backward()
    torch.testing.assert_close(gradients(parts), gradients(whole), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_activation_checkpointing_keeps_every_bit(arithmetic: str) -> None:
    plain, checkpointed = built(arithmetic), built(arithmetic)
    checkpointed.run_block = lambda block, x: checkpoint(block, x, use_reentrant=False)
    losses = []
    for model in (plain, checkpointed):
        losses.append(model(data().requires_grad_()).square().sum())
        losses[-1].backward()
    assert torch.equal(*losses)
    for name, gradient in gradients(plain).items():
        assert torch.equal(gradient, checkpointed.get_parameter(name).grad)


@pytest.mark.filterwarnings("ignore")  # torch's compiler emits warnings about itself
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_compiles_as_one_graph(arithmetic: str) -> None:
    """Blocks of one shape share one compilation, and restarts do not cause another."""
    plain, compiled = built(arithmetic), built(arithmetic)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # `reset` leaves what other tests have counted
    for block in compiled.blocks:
        block.compile(fullgraph=True)
    for cycle in (1, 2):
        for model in (plain, compiled):
            model(data()).square().sum().backward()
        torch.testing.assert_close(gradients(compiled), gradients(plain), rtol=1e-4, atol=1e-5)
        for model in (plain, compiled):
            restart(model, torch.optim.AdamW(model.parameters()), cycle=cycle)
            model.zero_grad()
    assert torch._dynamo.utils.counters["frames"]["ok"] <= 2 * len(compiled.blocks)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_backward_holds_the_gradient_of_one_weight_at_a_time(arithmetic: str) -> None:
    """dW and the merged weight are dropped within their layer, so eight layers need no more memory than two."""
    side, peaks = 128, {}
    for depth in (2, 8):
        model = built(arithmetic, depth=depth, side=side)
        loss = model(data(side=side)).square().sum()
        with PeakBytes() as bytes_held:
            loss.backward()
        factors = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        peaks[depth] = bytes_held.peak - factors
    assert peaks[8] - peaks[2] < 4 * side * side


@pytest.mark.parametrize("base", ["auto", "bf16", "int8"])
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_a_restart_needs_additional_memory_for_one_layer_only(base: str, arithmetic: str) -> None:
    side = 512
    torch.manual_seed(0)
    model = Blocks(depth=3, side=side)
    inject(model, LowRankConfig(r=4, base=base, frozen=arithmetic, rates=NOMINAL_RATES))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with PeakBytes() as bytes_held:
        restart(model, optimizer, cycle=1)
    one_layer = 4 * side * side
    coarse = (
        one_layer if base == "bf16" else one_layer // 2
    )  # the rounded copy, or the chunks of rows that are quantized
    assert one_layer <= bytes_held.peak < one_layer + coarse + 0.3 * one_layer


_groups: list[object] = []
"""Process group of this process, kept until it ends."""


def _rank(rank: int, store: str, arithmetic: str, sharded: bool, results: str) -> None:
    """Run one of two processes: half of the batch through a DDP or FSDP model; rank 0 writes the gradients."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    # The last reference must not be that of DDP's reducer: it would end the group under the interpreter's lock, and
    # wait for a thread of the group that wants the lock to drop what a backward pass left behind.
    _groups.append(dist.group.WORLD)
    try:
        model = built(arithmetic)
        if sharded:
            mesh = init_device_mesh("cpu", (2,))
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
            wrapped: nn.Module = model
        else:
            wrapped = DistributedDataParallel(model)
        wrapped(data().chunk(2)[rank]).square().sum().backward()
        found = gradients(model)
        if sharded:
            found = {name: gradient.full_tensor() for name, gradient in found.items()}
        if rank == 0:  # DDP and FSDP average the gradients over both processes
            torch.save({name: 2 * gradient for name, gradient in found.items()}, results)
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("arithmetic", "sharded"), [("int8", False), ("native", True)])
def test_two_processes_give_the_gradients_of_one(tmp_path: Path, arithmetic: str, sharded: bool) -> None:
    one = copy.deepcopy(built(arithmetic))
    one(data()).square().sum().backward()
    results = tmp_path / "gradients"
    # spawned, not forked: a fork of a process with threads can deadlock, and cannot use a GPU that its parent has used
    mp.start_processes(_rank, (str(tmp_path / "store"), arithmetic, sharded, str(results)), 2, start_method="spawn")
    both = torch.load(results, weights_only=True)
    torch.testing.assert_close(both, gradients(one), rtol=1e-4, atol=1e-5)
