"""Initial factors: keyed draws, orthonormal rows, best approximations."""

import pytest
import torch
from torch import nn

from relora.lowrank import LowRankConfig, LowRankLinear, inject, low_rank_layers, restart
from relora.lowrank.init import gradient_factors, orthogonal, principal_factors
from relora.seeding import keyed_generator


def test_orthogonal_rows_are_orthonormal() -> None:
    a = orthogonal((5, 12), keyed_generator(0, "x"))
    torch.testing.assert_close(a @ a.T, torch.eye(5, dtype=torch.float64), rtol=1e-14, atol=1e-14)
    square = orthogonal((12, 12), keyed_generator(0, "x"))
    torch.testing.assert_close(square @ square.T, torch.eye(12, dtype=torch.float64), rtol=1e-14, atol=1e-14)


def test_orthogonal_directions_are_uniform() -> None:
    """400 draws of one row of three numbers have mean zero and a third of the identity as covariance."""
    rows = torch.cat([orthogonal((1, 3), keyed_generator(0, "x", i)) for i in range(400)])
    assert rows.mean(0).abs().max() < 0.1
    torch.testing.assert_close(rows.T @ rows / 400, torch.eye(3, dtype=torch.float64) / 3, rtol=0, atol=0.06)


def test_an_orthogonal_layer_starts_as_the_layer_it_replaces_and_restarts_orthogonal() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10))
    x = torch.randn(4, 12)
    before = model(x)
    inject(model, LowRankConfig(r=3, init="orthogonal"))
    assert torch.equal(model(x), before)
    layer, optimizer = low_rank_layers(model)["0"], torch.optim.SGD(model.parameters(), lr=0.1)
    drawn = layer.lora_A.detach().clone()
    restart(model, optimizer, cycle=1)
    torch.testing.assert_close(layer.lora_A @ layer.lora_A.T, torch.eye(3), rtol=1e-6, atol=1e-6)
    assert not torch.equal(layer.lora_A, drawn)


def test_orthogonal_draws_depend_on_seed_cycle_and_name_only() -> None:
    def drawn(seed: int = 0, cycle: int = 0, name: str = "x") -> torch.Tensor:
        torch.rand(3)  # the global generator must not matter
        layer = LowRankLinear(nn.Linear(8, 6), LowRankConfig(r=2, init="orthogonal"), name=name, seed=seed)
        layer.redraw_(cycle)
        return layer.lora_A.detach().clone()

    assert torch.equal(drawn(), drawn())
    for other in (drawn(seed=1), drawn(cycle=1), drawn(name="y")):
        assert not torch.equal(drawn(), other)


@pytest.mark.parametrize("scaling", [0.5, 4.0])
def test_principal_factors_are_the_best_approximation_of_their_rank(scaling: float) -> None:
    """Eckart and Young: the error's norm is that of the other singular values. Both factors have equal norms."""
    torch.manual_seed(0)
    weight = torch.randn(9, 7, dtype=torch.float64)
    a, b = principal_factors(weight, 3, scaling)
    assert a.shape == (3, 7) and b.shape == (9, 3)
    values = torch.linalg.svdvals(weight)
    torch.testing.assert_close((weight - scaling * b @ a).norm(), values[3:].norm(), rtol=1e-12, atol=0)
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), rtol=1e-12, atol=0)


def test_gradient_factors_are_scaled_singular_vectors() -> None:
    torch.manual_seed(0)
    gradient = torch.randn(16, 9, dtype=torch.float64)
    a, b = gradient_factors(gradient, 2, stable_gamma=4.0)
    u, _, vt = torch.linalg.svd(gradient)
    torch.testing.assert_close((a, b), (vt[:2], u[:, 2:4]))  # 16^(1/4) / sqrt(4) = 1
    torch.testing.assert_close(gradient_factors(gradient, 2, stable_gamma=1.0)[1], 2 * b)
