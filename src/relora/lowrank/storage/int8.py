"""Matrix products with a frozen weight in int8.

    x Wᵀ ≈ (p ⊗ c) · (X̂ Ŵᵀ)        X̂ [tokens, in] and Ŵ [out, in] int8 codes, accumulated in int32
    dY W ≈ p' · (D̂ Ŵ)              D̂ [tokens, out] int8 codes of dY · c

A weight that does not change from step to step is quantized once: Ŵ has one scale per output channel (c [out]).
Activations and gradients are quantized in every call, with one scale per token (p, p' [tokens]). The scheme follows
SwitchBack (Wortsman et al. 2023, arXiv 2304.13013, section 2.2), which trains its weight: it quantizes the weight in
every step and computes the weight's gradient in 16 bits. A frozen weight has no gradient. The backward product reuses
the codes Ŵ, with c multiplied into dY before dY is quantized; so the weight needs one byte per parameter, and the
gradient is that of the product which the forward pass computed. The price is a rounding error of about 1% in each
product.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

_CACHED_TOKENS = 512
"""Tokens that a CPU multiplies at a time, so that their codes stay in its cache."""
LEVELS = 127
"""Largest code. Codes run from -127 to 127: symmetric, so that a product needs no correction for a zero point."""


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize x [rows, n] to int8 codes [rows, n] and fp32 scales [rows, 1]; x is close to codes · scale.

    A row with a NaN or an infinity gets a scale that is not finite, so whatever is computed from that row is not finite
    either.
    """
    scale = x.abs().amax(1, keepdim=True).float().clamp_min(torch.finfo(torch.float32).tiny) / LEVELS
    return (x / scale).round_().to(torch.int8), scale


def dequantize_int8(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers [rows, n] of `dtype` that codes [rows, n] with scales [rows, 1] represent."""
    return codes.to(dtype) * scale.to(dtype)


def runs_in_int8(tokens: int, codes: Tensor) -> bool:
    """Whether the device has a fast int8 product for this many tokens and these codes [out, in].

    cuBLAS requires more than 16 rows and sides that are multiples of 8. Where the sides are not multiples of 16, its
    int8 product takes three times as long as the bf16 product (H100), so such shapes count as unsupported.
    """
    if codes.device.type == "cuda":
        return tokens > 16 and all(side % 16 == 0 for side in codes.shape)
    return codes.device.type == "cpu"


def int8_product(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Compute x Wᵀ [tokens, out] in fp32 from x [tokens, in] and a weight's codes [out, in] and scales [out, 1]."""
    y = x.new_empty(x.shape[0], codes.shape[0], dtype=torch.float32)
    for part, result in _token_chunks(x, y):
        part_codes, part_scale = quantize_rows(part)
        torch.mul(torch._int_mm(part_codes, codes.T), scale.T, out=result).mul_(part_scale)
    return y


def int8_product_backward(grad: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Compute dY W [tokens, in] in fp32 from dY [tokens, out] and a weight's codes [out, in] and scales [out, 1]."""
    if codes.device.type == "cuda":
        codes = column_major(codes)
    grad_x = grad.new_empty(grad.shape[0], codes.shape[1], dtype=torch.float32)
    for part, result in _token_chunks(grad, grad_x):
        part_codes, part_scale = quantize_rows(part * scale.T)
        torch.mul(torch._int_mm(part_codes, codes), part_scale, out=result)
    return grad_x


def column_major(codes: Tensor) -> Tensor:
    """Return the same matrix in column-major memory layout; cuBLAS multiplies by it up to 5 times as fast (H100)."""
    return codes.T.contiguous().T


def _token_chunks(x: Tensor, y: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """Split both tensors along the tokens: on a CPU into chunks that its cache holds, elsewhere into one chunk."""
    tokens = _CACHED_TOKENS if x.device.type == "cpu" else x.shape[0]
    return zip(torch.split(x, tokens), torch.split(y, tokens), strict=True)
