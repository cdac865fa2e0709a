"""A frozen weight in 4 bits: NF4, whose sixteen levels are equally likely under a normal distribution.

    W ≈ absmax · level[code]        one fp32 absmax per block of 64 consecutive numbers; two codes per byte

After Dettmers et al. 2023 (QLoRA, arXiv 2305.14314, section 3), computed by the kernels of bitsandbytes. It takes 4.5
bits per parameter. The scales themselves are not quantized (QLoRA's double quantization), which would save 0.4 bits
more. The price: quantization changes a weight by about 9% of its norm, and a layer's codes are dequantized before every
product.

Quantizing dequantized numbers gives the same codes again, because the largest number of a block is exactly a level.
"""

import importlib.util
import logging

import torch
from torch import Tensor

from relora.errors import UserError

BLOCK = 64
"""Consecutive numbers that share one absmax."""


def check_installed() -> None:
    """Raise `UserError`, which names the extra to install, if bitsandbytes is absent. Nothing is imported."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "lowrank.base: nf4 needs bitsandbytes, which is not installed; run: pip install 'relora[quant]'"
        )


def check_sides(in_features: int, name: str) -> None:
    """Raise `UserError` if a row has an odd number of inputs, so that its codes do not fill whole bytes."""
    if in_features % 2:
        raise UserError(
            f"lowrank.base: nf4 keeps two numbers in a byte, and {name or 'the layer'} has {in_features} inputs; "
            "choose another base, or leave the layer out of lowrank.target_modules"
        )


def quantize_nf4(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize x [rows, n] to codes [rows, n / 2] uint8 and absmax [rows · n / 64, rounded up] fp32.

    Where 64 does not divide n, a block continues from the end of one row into the next row.
    """
    check_installed()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of missing kernels that are not used here
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(x.float().contiguous(), blocksize=BLOCK, quant_type="nf4")
    return codes.view(x.shape[0], -1), state.absmax


def dequantize_nf4(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers [rows, n] of `dtype` that codes [rows, n / 2] represent."""
    from bitsandbytes import functional

    rows, numbers = codes.shape[0], 2 * codes.numel()
    kernel_dtype = dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32
    # One block per row where possible: with other row lengths that 64 does not divide, the CPU kernel of bitsandbytes
    # 0.50.2 confuses the scales.
    shape = torch.Size((numbers // BLOCK, BLOCK) if numbers % BLOCK == 0 else (1, numbers))
    state = functional.QuantState(absmax.flatten(), shape=shape, blocksize=BLOCK, quant_type="nf4", dtype=kernel_dtype)
    dense: Tensor = functional.dequantize_4bit(codes.reshape(-1, 1), state)
    return dense.reshape(rows, -1).to(dtype)
