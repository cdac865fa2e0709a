"""A frozen weight in 4 bits: NF4, whose sixteen levels are equally likely under a normal distribution.

    W ~ absmax · level[code]        one fp32 absmax for 64 numbers of a row; two codes in a byte

After Dettmers et al. 2023 (QLoRA, arXiv 2305.14314, section 3), by the kernels of bitsandbytes. 4.5 bits a parameter:
the scales are not quantized in their turn, which would save 0.4 more. The price: a weight moves by some 9% of its norm,
and before every product a layer's codes become numbers again.

Quantizing what codes stand for gives the same codes: the largest number of a block is a level exactly.
"""

import importlib.util
import logging

import torch
from torch import Tensor

from relora.errors import UserError

BLOCK = 64


def check_installed() -> None:
    """`UserError` naming the extra where bitsandbytes is absent; loads nothing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "lowrank.base: nf4 needs bitsandbytes, which is not installed; run: pip install 'relora[quant]'"
        )


def check_sides(in_features: int, name: str) -> None:
    """`UserError` where the numbers of a row do not fill its bytes."""
    if in_features % 2:
        raise UserError(
            f"lowrank.base: nf4 keeps two numbers in a byte, and {name or 'the layer'} has {in_features} inputs; "
            "choose another base, or leave the layer out of lowrank.target_modules"
        )


def quantize_nf4(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, n] as codes [rows, n / 2] uint8 and absmax [rows · n / 64, rounded up] fp32.

    Blocks run on from row to row where 64 does not divide n.
    """
    check_installed()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of missing kernels that are not used here
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(x.float().contiguous(), blocksize=BLOCK, quant_type="nf4")
    return codes.view(x.shape[0], -1), state.absmax


def dequantize_nf4(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers [rows, n] that codes [rows, n / 2] stand for."""
    from bitsandbytes import functional

    rows, numbers = codes.shape[0], 2 * codes.numel()
    made = dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32
    # As rows of one block each: of other rows that 64 does not divide, the CPU's kernel (0.50.2) confuses the scales.
    shape = torch.Size((numbers // BLOCK, BLOCK) if numbers % BLOCK == 0 else (1, numbers))
    state = functional.QuantState(absmax, shape=shape, blocksize=BLOCK, quant_type="nf4", dtype=made)
    dense: Tensor = functional.dequantize_4bit(codes.reshape(-1, 1), state)
    return dense.reshape(rows, -1).to(dtype)
