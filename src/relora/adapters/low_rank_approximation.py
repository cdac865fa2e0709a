"""The matrix of rank r nearest to a matrix in the Frobenius norm, by its truncated singular value decomposition.

    M ≈ U_r S_r V_rᵀ = lora_B lora_A        lora_B = U_r √S_r [out, r], lora_A = √S_r V_rᵀ [r, in]

No matrix of rank r is nearer (Eckart and Young 1936). Small matrices are decomposed exactly, large ones by subspace
iteration on a keyed random draw (Halko, Martinsson and Tropp 2011, arXiv 0909.4061, algorithms 4.4 and 5.1). The price:
where the spectrum falls slowly, the singular values of large matrices agree to about 1e-4 only.
"""

import torch
from torch import Generator, Tensor

from relora.adapters.adapter import Factors

_EXACT_SIDE = 1024
"""Longest shorter side of a matrix that is decomposed exactly, which then takes less than a second."""
_OVERSAMPLING, _ITERATIONS = 16, 8
"""Additional directions and number of iterations of the randomized decomposition."""


def nearest_low_rank(matrix: Tensor, r: int, generator: Generator) -> tuple[Factors, float]:
    """Approximate a matrix by the nearest update of rank r.

    Args:
        matrix: [out, in].
        generator: of the random draw for large matrices; small ones draw nothing.

    Returns:
        The update (scaling 1; both factors get the square root of the singular values), and the share of the matrix's
        energy (the sum of its squared entries) that the update keeps.
    """
    u, s, v = truncated_svd(matrix, r, generator)
    root = s.sqrt()
    kept, energy = (tensor.double().square().sum().item() for tensor in (s, matrix))
    return Factors((v * root).T.contiguous(), u * root, 1.0), (kept / energy if energy else 1.0)


def nearest_low_rank_of_product(tall: Tensor, wide: Tensor, r: int) -> Factors:
    """Approximate the product of `tall` [out, R] and `wide` [R, in] by the nearest update of rank r (scaling 1).

    The result is exact and the product is not formed: QR decompositions of both sides leave a matrix [R, R] to
    decompose, in fp64.
    """
    left, upper = torch.linalg.qr(tall.double())
    right, lower = torch.linalg.qr(wide.double().T)
    u, s, vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    root = s[:r].sqrt()
    lora_A, lora_B = root[:, None] * (vh[:r] @ right.T), (left @ u[:, :r]) * root
    return Factors(lora_A.to(wide.dtype).contiguous(), lora_B.to(wide.dtype), 1.0)


def truncated_svd(matrix: Tensor, r: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the r largest singular values of a matrix [out, in] and their vectors, in the matrix's precision.

    The result is exact if the matrix is small or r is large in relation to it, and otherwise that of the randomized
    decomposition (see the module).

    Returns:
        U [out, r], s [r], V [in, r].
    """
    width = r + _OVERSAMPLING
    if min(matrix.shape) <= max(_EXACT_SIDE, 4 * width):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :r], s[:r], vh[:r].T
    basis = torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(matrix.T @ torch.linalg.qr(matrix @ basis).Q).Q  # [in, width]
    u, s, vh = torch.linalg.svd(matrix @ basis, full_matrices=False)
    return u[:, :r], s[:r], basis @ vh[:r].T
