"""How the two factors of a layer begin.

    kaiming        A uniform in ± 1/sqrt(in), B = 0             Hu et al. 2021 (arXiv 2106.09685, section 4.1)
    orthogonal     A with orthonormal rows, B = 0
    pissa          s·B A = the r largest singular triplets of W   Meng et al. 2024 (arXiv 2404.02948, section 3)
    gradient-svd   LoRA-GA: A and B along W's first gradient      Wang et al. 2024 (arXiv 2407.05000, section 3)

With B = 0 the layer starts as W. The last two start with a product that is not zero, and W gives it up: the residual is
what stays frozen, so the layer starts as W all the same. Their price is a singular value decomposition per layer, of
order out·in·min(out, in): seconds where a side is 1,000, minutes on a CPU where it is 4,000.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Init = Literal["kaiming", "orthogonal", "pissa", "gradient-svd"]
FROM_WEIGHT = ("pissa", "gradient-svd")
"""Those that take a part of the weight over."""


def kaiming(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """A [r, in], Kaiming-uniform with a = sqrt(5)."""
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(*shape).uniform_(-bound, bound, generator=generator)


def orthogonal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """A [r, in] in float64: r orthonormal rows, all directions alike (the Q of a normal matrix, signs by R)."""
    r, inn = shape
    q, triangle = torch.linalg.qr(torch.empty(inn, r).normal_(generator=generator).double())
    rows: Tensor = (q * triangle.diagonal().sign()).T
    return rows


DRAWS: dict[str, Callable[[Sequence[int], torch.Generator], Tensor]] = {
    **dict.fromkeys(get_args(Init), kaiming),
    "orthogonal": orthogonal,
}
"""What A is drawn from; those that take it from elsewhere begin so until they do."""


def principal(weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] with s·B A = the best approximation of rank r to W [out, in], singular values shared."""
    u, values, vt = torch.linalg.svd(weight, full_matrices=False)
    roots = (values[:r] / scaling).sqrt()
    return roots[:, None] * vt[:r], u[:, :r] * roots


def along_gradient(gradient: Tensor, r: int, stable_gamma: float) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] from the singular vectors of dW [out, in]: A the first r, B the next.

    Their own gradients then lie the other way round, B's along the first r and A's along the next, so the first step
    follows dW in 2r directions. out^(1/4) / sqrt(gamma) is the paper's stable scale (theorem 3.2): under rslora the
    size of the layer's output does not hang on its width or on r.
    """
    u, _, vt = torch.linalg.svd(gradient, full_matrices=False)
    factor = gradient.shape[0] ** 0.25 / math.sqrt(stable_gamma)
    return factor * vt[:r], factor * u[:, r : 2 * r]
