"""The nearest matrix of low rank, and what it keeps."""

import pytest
import torch

from relora.adapters.low_rank_approximation import nearest_low_rank, nearest_low_rank_of_product, truncated_svd


def test_truncated_svd_of_a_large_matrix() -> None:
    """Subspace iteration comes as near as the exact decomposition on a spectrum that falls slowly."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(side, 1030, generator=generator)).Q for side in (1040, 1060))
    matrix = (u * torch.arange(1, 1031).pow(-0.5)) @ v.T
    left, values, right = truncated_svd(matrix, 8, generator)
    torch.testing.assert_close(values, torch.arange(1, 9).pow(-0.5), rtol=1e-3, atol=0)
    torch.testing.assert_close(left.T @ left, torch.eye(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(right.T @ right, torch.eye(8), atol=1e-4, rtol=0)
    best = 1 / torch.arange(9, 1031).float()
    missed = (matrix - (left * values) @ right.T).square().sum()
    assert missed / best.sum() < 1.001


def test_energy_kept() -> None:
    values = torch.tensor([3.0, 2.0, 1.0])
    u, v = (torch.linalg.qr(torch.randn(side, 3, generator=torch.Generator().manual_seed(side))).Q for side in (7, 5))
    difference = (u * values) @ v.T
    factors, share = nearest_low_rank(difference, 2, torch.Generator())
    assert share == pytest.approx(13 / 14)
    torch.testing.assert_close(factors.delta(), (u[:, :2] * values[:2]) @ v[:, :2].T)
    assert nearest_low_rank(difference, 3, torch.Generator())[1] == pytest.approx(1)


def test_a_product_is_approximated_without_being_formed() -> None:
    generator = torch.Generator().manual_seed(0)
    tall, wide = torch.randn(9, 4, generator=generator), torch.randn(4, 7, generator=generator)
    from_factors = nearest_low_rank_of_product(tall, wide, 2)
    from_matrix, _ = nearest_low_rank((tall.double() @ wide.double()).float(), 2, generator)
    assert from_factors.lora_A.shape == (2, 7) and from_factors.lora_B.shape == (9, 2)
    torch.testing.assert_close(from_factors.delta(), from_matrix.delta(), rtol=1e-4, atol=1e-5)
