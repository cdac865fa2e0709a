"""DoRA: the factors change the direction of the weight's rows, and one trained number per row sets the row's length.

    y = m / ‖W + s·B A‖ · (W + s·B A) x + b        m [out] trained; ‖·‖ [out] norm of each row, constant in the gradient

After Liu et al. 2024 (arXiv 2402.09353, equation 5). Section 4.3 there treats the norm as a constant, so that the
gradient needs no pass through a matrix of the weight's size. m starts as the row norms of W, so the layer starts with
the function of W.

The price: W + s·B A is formed once per forward pass for its norms and dropped (2·r·out·in operations, one tensor of the
weight's size), and the product [tokens, out] is kept for m's gradient.
"""

import torch
from torch import Tensor


def row_norms(direction: Tensor) -> Tensor:
    """Return the norms [out] of the rows of a matrix [out, in].

    The norm of a zero row is given as the smallest positive number, so that dividing by it leaves the row zero.
    """
    norms: Tensor = torch.linalg.vector_norm(direction, dim=1)
    return norms.clamp_min_(torch.finfo(norms.dtype).tiny)


def rescaled(y: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """Return gain · y + b for y [..., out] and gain [out], in y's dtype.

    It is computed in gain's precision, so that a small change of the gain is not rounded away.
    """
    scaled = y * gain
    if bias is not None:
        scaled = scaled + bias
    return scaled.to(y.dtype)


def dora_update_(weight: Tensor, update: Tensor, magnitude: Tensor) -> Tensor:
    """Turn the update s·B A into DoRA's update W' - W [out, in], in place.

    W' = m / ‖W + s·B A‖ · (W + s·B A) is the weight that the layer multiplies by.
    """
    direction = update.add_(weight)
    return direction.mul_((magnitude / row_norms(direction))[:, None]).sub_(weight)
