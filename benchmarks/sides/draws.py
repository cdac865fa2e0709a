"""The same weights and tokens on every side: each drawn by its own key."""

import zlib

import torch
from torch import Tensor

from sides.shape import SEQUENCE


def generator(key: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(key.encode()))


@torch.no_grad()
def draw_(name: str, tensor: Tensor) -> None:
    """Initial values of a parameter, by its name in transformers' LLaMA with `lora_A`, `lora_B` beside `weight`."""
    values = torch.empty(tensor.shape)  # drawn in main memory, so that they are the same on every device
    if name.endswith("lora_A"):
        bound = tensor.shape[1] ** -0.5
        values.uniform_(-bound, bound, generator=generator(name))
    elif name.endswith("lora_B"):
        values.zero_()
    elif tensor.ndim == 1:
        values.fill_(1)  # a norm
    else:
        values.normal_(std=0.02, generator=generator(name))
    tensor.copy_(values)


def sequences(tokens: int, vocabulary: int) -> Tensor:
    """Uniform ids [tokens / 256, 256]; every step takes these, so that what has been learnt shows in the loss."""
    return torch.randint(vocabulary, (tokens // SEQUENCE, SEQUENCE), generator=generator("tokens"))


def next_tokens(ids: Tensor) -> Tensor:
    """Labels: the token after each; none after the last."""
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:]
    return labels
