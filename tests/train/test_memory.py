"""Bytes by kind equal those counted by hand."""

import torch
from tests.train.small import SETTINGS, Net, batch, loss

from relora.lowrank import LowRankConfig, inject
from relora.lowrank.config import Residual
from relora.train.memory import HeldBytes, held_bytes
from relora.train.optim import OptimizerConfig, build_optimizer

OFF = Residual()


def trained(model: Net, config: OptimizerConfig, residual: Residual = OFF) -> HeldBytes:
    """Count after one step, when all moments exist."""
    optimizer = build_optimizer(model, config)
    summed, tokens = loss(model, *batch(0))
    (summed / tokens).backward()
    optimizer.step()
    return held_bytes(model, optimizer, residual)


def test_full_rank() -> None:
    model = Net()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tensors = len(list(model.parameters()))
    config = SETTINGS["optimizer"]
    assert isinstance(config, OptimizerConfig)
    held = trained(model, config)
    assert held == HeldBytes(
        4 * parameters, 0, 4 * parameters, 8 * parameters + 4 * tensors
    )  # m, v, and the step of each tensor


def test_low_rank() -> None:
    """Two layers [8, 8] with factors of rank 2; then frozen in bf16 with an fp32 master and an int8 copy."""
    model = Net()
    plain = sum(parameter.numel() for parameter in model.parameters())
    inject(model, LowRankConfig(r=2, lora_alpha=2, target_modules=["0", "1"]))
    config = SETTINGS["optimizer"]
    assert isinstance(config, OptimizerConfig)
    held, factors = trained(model, config), 2 * 2 * 16
    assert (held.weights, held.factors) == (4 * plain, 4 * factors)
    assert held.gradients == 4 * (plain - 2 * 64 + factors)
    assert trained(model, config, Residual(scale=1.0)).gradients == 4 * (plain + factors)

    stored = Net()
    inject(stored, LowRankConfig(r=2, lora_alpha=2, target_modules=["0", "1"], base="bf16", frozen="int8"))
    copies = 2 * (64 + 4 * 8)  # codes, and a scale for every row
    assert trained(stored, config).weights == 4 * (plain - 2 * 64) + 2 * 2 * 64 + 4 * 2 * 64 + copies


def test_what_is_shared_counts_once() -> None:
    model = Net()
    model.head.weight = model.embed.weight
    held = held_bytes(model, torch.optim.SGD(model.parameters(), lr=0.1), OFF)
    assert held.weights == 4 * sum(parameter.numel() for parameter in set(model.parameters()))
    assert held.moments == 0
