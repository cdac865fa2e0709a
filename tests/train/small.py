"""A network of two blocks that learns in ten steps, its batches and its loss."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from relora.lowrank import LowRankConfig, RestartConfig
from relora.train.optim import OptimizerConfig


class Sequences(NamedTuple):
    input_ids: Tensor
    labels: Tensor


class Net(nn.Module):
    """Embedding, two blocks, head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16)
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)


def batch(step: int) -> Sequences:
    """Successors modulo 16, which a network can learn."""
    ids = torch.randint(0, 16, (4, 6), generator=torch.Generator().manual_seed(step))
    return Sequences(ids, (ids + 1) % 16)


def loss(model: nn.Module, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = model(input_ids).flatten(0, 1).float()
    return nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum"), torch.tensor(labels.numel())


SETTINGS: dict[str, object] = {
    "place_of": lambda number, sequences: f"batch {number}, sequences {sequences.start}-{sequences.stop - 1}",
    "optimizer": OptimizerConfig(lr=0.02, lowrank_lr=0.04),
    "lowrank": LowRankConfig(r=2, lora_alpha=2),
    "restart": RestartConfig(),
    "settings": {},
    "autocast": None,
    "seed": 0,
    "micro_sequences": 2,
    "clip_grad_norm": 1.0,
    "non_finite": "stop",
    "non_finite_limit": 3,
    "sync_every_steps": 1,
    "log_every_steps": 1,
    "evaluate_every_steps": 100,
    "checkpoint_every_steps": 100,
}
"""Settings of a run of this network; each test adds or replaces some."""
