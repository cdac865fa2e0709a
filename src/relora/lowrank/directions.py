"""Where fresh factors point: at random, or along the leading singular vectors of the weight or of its gradient.

    dW ≈ U S Vᵀ,  rank r          lora_A's rows along V [in, r], lora_B's columns along U [out, r]

With B = 0 the first update of B is -lr·s·dW Aᵀ, so A along V lets it follow most of dW; at random it sees r of `in`
directions. The gradient's is LoQT's way (Loeschcke et al. 2024, arXiv 2405.16528), the weight's that of sparse spectral
training (Zhao et al. 2024, arXiv 2405.15481). The price: a randomized singular value decomposition per layer, for the
gradient a forward and a backward pass more, too.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from relora.errors import NonFinite
from relora.lowrank.init import orthogonal
from relora.lowrank.linear import LowRankLinear
from relora.lowrank.weight_gradients import visit_weight_gradients
from relora.seeding import keyed_generator

Directions = Literal["orthogonal", "gradient-svd", "weight-svd"]
SingularBasis = tuple[Tensor, Tensor]
"""Orthonormal U [out, r] and V [in, r]."""

_MORE = 8
_ROUNDS = 2
"""Directions beyond r, and passes over the matrix, that make a randomized decomposition a good one."""


def random_frame(layer: LowRankLinear, r: int, generator: torch.Generator) -> SingularBasis:
    """All directions alike."""
    u = orthogonal((r, layer.out_features), generator).T
    return u.to(layer.lora_B), orthogonal((r, layer.in_features), generator).T.to(layer.lora_A)


def leading_frame(matrix: Tensor, r: int, generator: torch.Generator) -> SingularBasis:
    """The leading singular vectors of a matrix [out, in], nearly (Halko et al. 2011, algorithms 4.4 and 5.1)."""
    wide = min(r + _MORE, *matrix.shape)
    start = torch.randn(matrix.shape[1], wide, generator=generator).to(matrix)
    basis = torch.linalg.qr(matrix @ start).Q  # [out, wide]
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    u, _, vt = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u[:, :r], vt[:r].T


def gradient_frames(
    model: nn.Module, layers: Mapping[str, LowRankLinear], loss_of: Callable[[nn.Module], Tensor], *, cycle: int
) -> dict[str, SingularBasis]:
    """Of each layer the frame of its dW for one loss, of all its ranks.

    Raises:
        NonFinite: a gradient is not finite.
    """
    frames: dict[str, SingularBasis] = {}

    def keep(name: str, gradient: Tensor) -> None:
        if not torch.isfinite(gradient.sum()):
            raise NonFinite(f"the gradient of {name} is not finite before the restart into cycle {cycle}")
        layer = layers[name]
        frames[name] = leading_frame(gradient, layer.r, keyed_generator(layer.seed, "frame", cycle, name))

    visit_weight_gradients(model, layers, loss_of, keep)
    return frames
