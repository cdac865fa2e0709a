"""Products with a frozen weight in 8 bits.

    x Wᵀ ~ (p ⊗ c) · (X̂ Ŵᵀ)        X̂ [tokens, in] and Ŵ [out, in] int8, accumulated in int32
    dY W ~ p' · (D̂ Ŵ)              D̂ the codes of dY · c

A weight that does not move has the time to be quantized once: Ŵ with one scale per output channel (c), while
activations get one scale per token (p) on the fly. After SwitchBack (Wortsman et al. 2023, arXiv 2304.13013, section
2.2), which quantizes the weight at every step and keeps its gradient in 16 bits; here there is no weight gradient. The
backward product uses the same codes, with c folded into dY before that is quantized: one byte per parameter, and the
gradient of the product that ran. The price is a rounding error of some 1% in each product.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

_CACHED_TOKENS = 512
LEVELS = 127
"""Codes run from -127 to 127: symmetric, so that a product needs no correction for a zero point."""


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, n] as int8 codes [rows, n] and fp32 scales [rows, 1]; x is close to codes · scale.

    A row with a NaN or an infinity has a scale that is not finite, so what is made of it is not finite either.
    """
    scale = x.abs().amax(1, keepdim=True).float().clamp_min(torch.finfo(torch.float32).tiny) / LEVELS
    return (x / scale).round_().to(torch.int8), scale


def dequantized(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes [rows, n] with scales [rows, 1] as numbers again."""
    return codes.to(dtype) * scale.to(dtype)


def runs_in_int8(tokens: int, codes: Tensor) -> bool:
    """Whether the device multiplies these shapes in int8, and not in the slowest of ways.

    cuBLAS wants more than 16 rows and sides in eights; where they are not in sixteens it takes three times as long as
    for bf16 (H100).
    """
    if codes.device.type == "cuda":
        return tokens > 16 and all(side % 16 == 0 for side in codes.shape)
    return codes.device.type == "cpu"


def product(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """x Wᵀ [tokens, out] in fp32 of x [tokens, in] and a weight's codes [out, in] and scales [out, 1]."""
    y = x.new_empty(x.shape[0], codes.shape[0], dtype=torch.float32)
    for part, result in _parts(x, y):
        part_codes, part_scale = quantize_rows(part)
        torch.mul(torch._int_mm(part_codes, codes.T), scale.T, out=result).mul_(part_scale)
    return y


def product_backward(grad: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """dY W [tokens, in] in fp32 of dY [tokens, out]."""
    if codes.device.type == "cuda":
        codes = columnwise(codes)
    grad_x = grad.new_empty(grad.shape[0], codes.shape[1], dtype=torch.float32)
    for part, result in _parts(grad, grad_x):
        part_codes, part_scale = quantize_rows(part * scale.T)
        torch.mul(torch._int_mm(part_codes, codes), part_scale, out=result)
    return grad_x


def columnwise(codes: Tensor) -> Tensor:
    """The same matrix, laid out by columns: a right factor that cuBLAS is several times as fast with (H100: 5)."""
    return codes.T.contiguous().T


def _parts(x: Tensor, y: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """Both in stretches of tokens that a CPU's cache holds."""
    tokens = _CACHED_TOKENS if x.device.type == "cpu" else x.shape[0]
    return zip(torch.split(x, tokens), torch.split(y, tokens), strict=True)
