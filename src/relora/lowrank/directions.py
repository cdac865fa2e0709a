"""Directions for new factors: drawn at random, or the leading singular vectors of the weight or of its gradient.

    dW ≈ U S Vᵀ,  rank r          lora_A's rows along V [in, r], lora_B's columns along U [out, r]

With B = 0 the first update of B is -lr·s·dW Aᵀ, so it depends on A how much of dW the update can follow: with A along V
most of it, with a random A only its part in r random directions of the `in` there are. LoQT takes the directions from
the gradient (Loeschcke et al. 2024, arXiv 2405.16528), sparse spectral training from the weight (Zhao et al. 2024,
arXiv 2405.15481). The price: a randomized singular value decomposition per layer, and for the gradient also a forward
and a backward pass.
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
"""Orthonormal columns U [out, r] and V [in, r]."""

_EXTRA_DIRECTIONS = 8
"""Directions beyond r in the randomized decomposition, which make its first r accurate."""
_POWER_ITERATIONS = 2
"""Further passes over the matrix and its transpose, which make them more accurate."""


def random_basis(layer: LowRankLinear, r: int, generator: torch.Generator) -> SingularBasis:
    """Draw orthonormal U [out, r] and V [in, r], uniformly over all directions."""
    u = orthogonal((r, layer.out_features), generator).T
    v = orthogonal((r, layer.in_features), generator).T
    return u.to(layer.lora_B), v.to(layer.lora_A)


def leading_basis(matrix: Tensor, r: int, generator: torch.Generator) -> SingularBasis:
    """Approximate the r leading singular vectors of a matrix [out, in].

    Randomized decomposition with subspace iteration (Halko et al. 2011, algorithms 4.4 and 5.1).
    """
    width = min(r + _EXTRA_DIRECTIONS, *matrix.shape)
    start = torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
    range_basis = torch.linalg.qr(matrix @ start).Q  # [out, width]
    for _ in range(_POWER_ITERATIONS):
        range_basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ range_basis).Q).Q
    u, _, vt = torch.linalg.svd(range_basis.T @ matrix, full_matrices=False)
    return range_basis @ u[:, :r], vt[:r].T


def in_float64(tensor: Tensor) -> Tensor:
    """Return a tensor in float64 on its device, or in main memory if it is on MPS, which has no float64."""
    return tensor.to("cpu" if tensor.device.type == "mps" else tensor.device, torch.float64)


def factored_svd(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose B A = U S Vᵀ without forming the product; return U [out, r], S [r], descending, and V [in, r].

    With QR decompositions B = Q_B R_B and Aᵀ = Q_A R_A it is that of R_B R_Aᵀ [r, r]. Computed in float64.
    """
    q_b, triangle_b = torch.linalg.qr(in_float64(lora_B))
    q_a, triangle_a = torch.linalg.qr(in_float64(lora_A.T))
    u, values, vt = torch.linalg.svd(triangle_b @ triangle_a.T)
    return q_b @ u, values, q_a @ vt.T


def outside(basis: Tensor, retained: Tensor) -> Tensor:
    """Return orthonormal columns [n, k] that span the part of `basis` [n, k] at right angles to `retained` [n, l]."""
    exact, within = in_float64(basis), in_float64(retained)
    for _ in range(2):  # the second pass removes what rounding left of the first
        exact = torch.linalg.qr(exact - within @ (within.T @ exact)).Q
    return exact


def gradient_bases(
    model: nn.Module, layers: Mapping[str, LowRankLinear], loss_of: Callable[[nn.Module], Tensor], *, cycle: int
) -> dict[str, SingularBasis]:
    """Return by path the leading singular vectors of each layer's dW for one loss, for all ranks of the layer.

    Args:
        loss_of: computes the loss with the model.
        cycle: number of the cycle that begins; part of the key of the randomized decomposition.

    Raises:
        NonFinite: a gradient is not finite.
    """
    bases: dict[str, SingularBasis] = {}

    def decompose(name: str, gradient: Tensor) -> None:
        if not torch.isfinite(gradient.sum()):
            raise NonFinite(f"the gradient of {name} is not finite before the restart into cycle {cycle}")
        layer = layers[name]
        # the purpose "frame" is part of the key of recorded runs: another word would draw other numbers
        bases[name] = leading_basis(gradient, layer.r, keyed_generator(layer.seed, "frame", cycle, name))

    visit_weight_gradients(model, layers, loss_of, decompose)
    return bases
