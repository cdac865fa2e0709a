"""The arithmetic of one low-rank layer: y = x Wᵀ + b + s (x Aᵀ) Bᵀ.

This is the factored form of LoRA (Hu et al. 2021, arXiv 2106.09685, section 4.1): the product B A is never formed, so a
layer pays T·r·(in + out) multiply-adds on top of its frozen product, and autograd keeps x Aᵀ [T, r] for the way back.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor | float,
    dropout: float = 0.0,
) -> Tensor:
    """y [..., out] of x [..., in], weight [out, in], bias [out], lora_A [r, in] and lora_B [out, r].

    `dropout` acts on the input of the factors alone.
    """
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        weight = weight.to(x.dtype)  # a base stored in bf16 under fp32 arithmetic
    frozen = F.linear(x, weight, bias)
    # without autocast, half-precision activations meet fp32 factors: small updates live there, so their precision wins
    x = x.to(lora_A.dtype)
    compressed = F.linear(F.dropout(x, dropout) if dropout else x, lora_A)  # [..., r]: the cheapest place to scale
    return frozen + F.linear(scaling * compressed, lora_B).to(frozen.dtype)
