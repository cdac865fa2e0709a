"""DoRA: the factors turn the rows of the weight, and one trained number a row sets its length.

    y = m / ‖W + s·B A‖ · (W + s·B A) x + b        m [out] trained; ‖·‖ [out] of each row, a constant for the gradient

After Liu et al. 2024 (arXiv 2402.09353, equation 5; section 4.3 for the norm as a constant, which spares the gradient
the way through a matrix of the weight's size). m starts as the norms of W, so the layer starts as W.

The price: W + s·B A is formed once a forward pass, for its norms, and dropped (2·r·out·in operations, one tensor of the
weight's size); and the product [tokens, out] is kept for m's gradient.
"""

import torch
from torch import Tensor


def row_norms(direction: Tensor) -> Tensor:
    """Lengths [out] of the rows of [out, in]; of a zero row the smallest positive number, so that it stays zero."""
    norms: Tensor = torch.linalg.vector_norm(direction, dim=1)
    return norms.clamp_min_(torch.finfo(norms.dtype).tiny)


def rescaled(y: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """gain · y + b of y [..., out], in the precision of gain [out]: a small change of it must not be rounded away."""
    scaled = y * gain
    return (scaled if bias is None else scaled + bias).to(y.dtype)


def dora_step(weight: Tensor, update: Tensor, magnitude: Tensor) -> Tensor:
    """W' - W [out, in] in the place of `update` = s·B A, where W' is the weight that the layer multiplies by."""
    direction = update.add_(weight)
    return direction.mul_((magnitude / row_norms(direction))[:, None]).sub_(weight)
