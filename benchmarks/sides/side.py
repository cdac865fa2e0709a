"""What every side is made of, and the step of all but ours."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sides.shape import Place

LR, CLIP, ALPHA = 1e-3, 1.0, 32
"""Learning rate of everything, norm to clip to, lora_alpha."""


@dataclass(frozen=True)
class Side:
    """A model in training."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Callable[[Tensor], float]
    """One whole optimizer step on token ids [sequences, 256]; the loss before it, in nats per token."""
    held: object = None
    """What must live as long as the side."""


def stepping(model: nn.Module, loss_of: Callable[[Tensor], Tensor], place: Place) -> Side:
    """Forward, backward, clip, fused AdamW, and gradients dropped."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)

    def step(ids: Tensor) -> float:
        with torch.autocast(place.device, dtype=torch.bfloat16, enabled=place.bf16):
            loss = loss_of(ids.to(place.device))
        loss.backward()
        nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return Side(model, optimizer, step)
