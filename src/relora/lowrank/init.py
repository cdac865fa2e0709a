"""Initialization of the two factors of a layer.

    kaiming        A uniform in ± 1/sqrt(in), B = 0             Hu et al. 2021 (arXiv 2106.09685, section 4.1)
    orthogonal     A with orthonormal rows, B = 0
    pissa          s·B A = the r largest singular triplets of W   Meng et al. 2024 (arXiv 2404.02948, section 3)
    gradient-svd   LoRA-GA: A and B along W's first gradient      Wang et al. 2024 (arXiv 2407.05000, section 3)

With B = 0 the layer computes the same as W. The last two start with a product s·B A that is not zero; it is subtracted
from W, and the difference is the weight that stays frozen, so the layer starts with the same function, too. Their price
is a singular value decomposition per layer, of order out·in·min(out, in): seconds where a side is 1,000, minutes on a
CPU where it is 4,000.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Init = Literal["kaiming", "orthogonal", "pissa", "gradient-svd"]
NONZERO_INITS = ("pissa", "gradient-svd")
"""Initializations whose product s·B A is not zero; it is subtracted from W."""


def kaiming(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draw A [r, in] Kaiming-uniform with a = sqrt(5): uniform in ± 1/sqrt(in)."""
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(*shape).uniform_(-bound, bound, generator=generator)


def orthogonal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draw A [r, in] in float64 with r orthonormal rows, uniformly over all such matrices.

    A is the Q of the QR decomposition of a normal matrix, with signs fixed by R's diagonal.
    """
    r, in_features = shape
    q, triangle = torch.linalg.qr(torch.empty(in_features, r).normal_(generator=generator).double())
    rows: Tensor = (q * triangle.diagonal().sign()).T
    return rows


DRAW_A: dict[str, Callable[[Sequence[int], torch.Generator], Tensor]] = {
    **dict.fromkeys(get_args(Init), kaiming),
    "orthogonal": orthogonal,
}
"""Function that draws A, for each `Init`; with `pissa` and `gradient-svd` other factors later replace the drawn A."""


def principal_factors(weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Compute A [r, in] and B [out, r] such that s·B A is the best approximation of rank r to W [out, in].

    Each singular value is shared equally: A's row and B's column have the same length.
    """
    u, values, vt = torch.linalg.svd(weight, full_matrices=False)
    roots = (values[:r] / scaling).sqrt()
    return roots[:, None] * vt[:r], u[:, :r] * roots


def gradient_factors(gradient: Tensor, r: int, stable_gamma: float) -> tuple[Tensor, Tensor]:
    """Compute A [r, in] and B [out, r] from singular vectors of dW [out, in]: A from the first r, B from the next r.

    The gradient of B then lies along the first r singular directions and that of A along the next r, so the first step
    follows dW in 2r directions. Both factors are scaled by out^(1/4) / sqrt(gamma), the paper's stable scale (theorem
    3.2): with rslora, the size of the layer's output does not depend on its width or on r.
    """
    u, _, vt = torch.linalg.svd(gradient, full_matrices=False)
    factor = gradient.shape[0] ** 0.25 / math.sqrt(stable_gamma)
    return factor * vt[:r], factor * u[:, r : 2 * r]
