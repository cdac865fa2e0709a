"""A checkpoint written in the background holds the tensors as they were when `save` was called."""

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from relora.lowrank import LowRankConfig, exact_tensors, inject, restart
from relora.train import checkpoint_parts as module
from relora.train.checkpoint import Checkpoints
from relora.train.checkpoint_format import SavedState
from relora.train.optim import OptimizerConfig, build_optimizer, named_state

MERGES = 20
WIDTH = 32


class Blocks(nn.Module):
    """An embedding and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, WIDTH)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.embed(ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def clones(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not bit-equal."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def test_a_merge_right_after_a_save_does_not_reach_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer is made to wait until the merge is done."""
    merged, write = threading.Event(), module.save_file

    def late(*arguments: object) -> None:
        assert merged.wait(60)
        write(*arguments)

    monkeypatch.setattr(module, "save_file", late)
    torch.manual_seed(0)
    model = Blocks()
    inject(model, LowRankConfig(r=4, lora_alpha=4), seed=0)
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-2, lowrank_lr=1e-2))
    checkpoints = Checkpoints(tmp_path)
    for step in range(1, MERGES + 1):
        model(torch.arange(16)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        tensors, moments = exact_tensors(model), named_state(model, optimizer)
        frozen = {name: tensors.pop(name) for name, p in model.named_parameters() if not p.requires_grad}
        before = clones(tensors | frozen), clones(moments)
        state = SavedState(step=step, positions={}, frozen_since=step - 1)
        checkpoints.save(state, tensors, frozen, moments, {})
        restart(model, optimizer, cycle=step)
        assert step not in checkpoints.steps()
        merged.set()
        assert len(differing(exact_tensors(model), before[0])) >= 6  # two weights and four factors have changed
        checkpoints.wait()
        saved = Checkpoints(tmp_path).open(step)
        assert not differing(saved.weights(), before[0])
        assert not differing(saved.optimizer(), before[1])
        merged.clear()
